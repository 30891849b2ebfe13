// Four-channel mixer in front of an I2S DAC, for the carillon practice console.
//
// Each channel delivers a signed 16-bit sample on its own strobe, somewhere within a frame; what has
// not arrived by the end of the frame repeats the previous value (a click beats a gap: on bells
// nobody hears it). Gains are Q1.7, 128 = unity. Sum saturates instead of wrapping.
//
// clk is 12.288 MHz = 256 fs, bclk = clk/4 = 64 fs, so there are 32 bit clocks per channel half and
// only the first 16 after the one-bit I2S delay carry data.
`default_nettype none

module i2s_mixer #(
    parameter integer CH = 4
) (
    input  wire              clk,
    input  wire              rst_n,
    input  wire [CH-1:0]     s_valid,
    input  wire [16*CH-1:0]  s_data,
    input  wire [8*CH-1:0]   gain,
    input  wire [CH-1:0]     pan_right,     // 0: left only, 1: right only; bells hang on one side
    output reg               bclk,
    output reg               lrclk,
    output reg               sdata,
    output reg               clip           // stretched to one frame, for the red LED
);

    // ---- sample hold ------------------------------------------------------------------------------
    reg signed [15:0] hold [0:CH-1];
    integer i;

    always @(posedge clk) begin
        if (!rst_n) begin
            for (i = 0; i < CH; i = i + 1)
                hold[i] <= 16'sd0;
        end else begin
            for (i = 0; i < CH; i = i + 1)
                if (s_valid[i])
                    hold[i] <= s_data[16*i +: 16];
        end
    end

    // ---- frame counter ----------------------------------------------------------------------------
    reg [7:0] phase;                        // 0..255 within a frame
    always @(posedge clk)
        if (!rst_n) phase <= 8'd0;
        else        phase <= phase + 8'd1;

    wire frame_start = (phase == 8'd0);

    // ---- one multiplier, time-shared --------------------------------------------------------------
    // Phases 16 .. 16+CH-1 feed the product, one clock later it is added.
    reg  signed [24:0] product;
    reg                product_side, product_ok;
    reg  signed [27:0] acc_l, acc_r;

    wire [7:0] slot = phase - 8'd16;
    wire       slot_ok = (phase >= 8'd16) && (slot < CH);
    wire signed [8:0] g = slot_ok ? {1'b0, gain[8*slot[1:0] +: 8]} : 9'sd0;

    always @(posedge clk) begin
        product      <= hold[slot[1:0]] * g;
        product_side <= pan_right[slot[1:0]];
        product_ok   <= slot_ok && rst_n;

        if (frame_start || !rst_n) begin
            acc_l <= 28'sd0;
            acc_r <= 28'sd0;
        end else if (product_ok) begin
            if (product_side) acc_r <= acc_r + product;
            else              acc_l <= acc_l + product;
        end
    end

    // ---- rounding and saturation ------------------------------------------------------------------
    function signed [16:0] squash;          // {clipped, sample}
        input signed [27:0] a;
        reg   signed [27:0] r;
        begin
            r = (a + 28'sd64) >>> 7;
            if (r > 28'sd32767)       squash = {1'b1, 16'h7fff};
            else if (r < -28'sd32768) squash = {1'b1, 16'h8000};
            else                      squash = {1'b0, r[15:0]};
        end
    endfunction

    reg [15:0] next_l, next_r;
    reg        over_l, over_r;
    always @(posedge clk)
        if (phase == 8'd200) begin          // long after the last addition
            {over_l, next_l} <= squash(acc_l);
            {over_r, next_r} <= squash(acc_r);
        end

    // ---- serialiser -------------------------------------------------------------------------------
    // Data changes on the falling edge of bclk, i.e. when phase[1:0] wraps to 0.
    reg [31:0] shift;
    wire [5:0] bit_no = phase[7:2];

    always @(posedge clk) begin
        if (!rst_n) begin
            bclk  <= 1'b0;
            lrclk <= 1'b1;
            sdata <= 1'b0;
            clip  <= 1'b0;
            shift <= 32'd0;
        end else begin
            bclk <= phase[1];
            if (phase[1:0] == 2'd0) begin
                lrclk <= bit_no[5];
                // The word starts one bit clock after the lrclk edge.
                if (bit_no == 6'd0)
                    shift <= {next_l, 16'd0};
                else if (bit_no == 6'd32)
                    shift <= {next_r, 16'd0};
                else
                    shift <= {shift[30:0], 1'b0};
                sdata <= (bit_no == 6'd0 || bit_no == 6'd32) ? 1'b0 : shift[31];
            end
            if (frame_start)
                clip <= over_l | over_r;
        end
    end

`ifdef FORMAL
    // With every gain at a quarter or less four channels cannot clip, whatever the samples.
    reg quiet;
    always @(*) begin
        quiet = 1'b1;
        for (i = 0; i < CH; i = i + 1)
            if (gain[8*i +: 8] > 8'd32) quiet = 1'b0;
    end
    always @(posedge clk) if (rst_n && quiet && $past(quiet, 256)) assert (!clip);
`endif

endmodule

`default_nettype wire
