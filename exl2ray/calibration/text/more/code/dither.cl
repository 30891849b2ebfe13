/* OpenCL kernels of the e-paper sign: greyscale frame -> four-level panel.
 *
 * Error diffusion is serial by nature. We run it along diagonals: a work-group handles one band of
 * BAND rows; row r may work on column x once row r-1 has finished column x+1. Between bands the error
 * of the last row goes through a global buffer.
 *
 * Build options: -D BAND=32 -D LEVELS=4
 */
#ifndef BAND
#define BAND 32
#endif
#ifndef LEVELS
#define LEVELS 4
#endif

#define WHITE 255

/* Panel levels are not evenly spaced: measured reflectance, sample 7, at 21 degrees. */
__constant short level_value[4] = { 12, 86, 158, 231 };

static uchar nearest(short v)
{
    uchar best = 0;
    short gap = 32767;

    for (uchar i = 0; i < LEVELS; i++) {
        short g = abs_diff(v, level_value[i]);
        if (g < gap) {
            gap = g;
            best = i;
        }
    }
    return best;
}

/* Box-filter the 8-bit source down to panel size; linear light, so undo the gamma first. */
__kernel void downscale(__read_only image2d_t src, __global uchar *dst, const int2 panel)
{
    const sampler_t smp = CLK_NORMALIZED_COORDS_FALSE | CLK_ADDRESS_CLAMP_TO_EDGE | CLK_FILTER_NEAREST;
    const int2 at = (int2)(get_global_id(0), get_global_id(1));
    const float2 ratio = convert_float2(get_image_dim(src)) / convert_float2(panel);

    if (any(at >= panel))
        return;

    const int2 lo = convert_int2_rtn(convert_float2(at) * ratio);
    const int2 hi = max(lo + 1, convert_int2_rtn(convert_float2(at + 1) * ratio));
    float sum = 0.0f;

    for (int y = lo.y; y < hi.y; y++)
        for (int x = lo.x; x < hi.x; x++)
            sum += native_powr(read_imagef(src, smp, (int2)(x, y)).x, 2.2f);

    sum /= (float)((hi.x - lo.x) * (hi.y - lo.y));
    dst[at.y * panel.x + at.x] = convert_uchar_sat_rte(255.0f * native_powr(sum, 1.0f / 2.2f));
}

/* One work-group of BAND items per band; enqueue the bands one after another in an in-order queue.
 * carry holds panel.x shorts: the error pushed down by the last row of the band above, in 1/16. */
__kernel __attribute__((reqd_work_group_size(BAND, 1, 1)))
void diffuse(__global const uchar *grey, __global uchar *panel_px, __global short *carry,
             const int2 panel, const int band)
{
    /* Per row, the error that is on its way down to columns x-1, x, x+1 of the next row. */
    __local short down[BAND][4];
    const int r = get_local_id(0);
    const int y = band * BAND + r;
    const int steps = panel.x + 2 * (BAND - 1);
    short right = 0;
    short d0 = 0, d1 = 0;       /* partial sums for the row below: column x-1 and column x */

    for (int i = 0; i < 4; i++)
        down[r][i] = 0;
    barrier(CLK_LOCAL_MEM_FENCE);

    for (int s = 0; s < steps; s++) {
        const int x = s - 2 * r;            /* two columns behind the row above */
        const bool live = x >= 0 && x < panel.x && y < panel.y;
        short from_above = 0;

        if (live)
            from_above = r == 0 ? carry[x] : down[r - 1][x & 3];
        barrier(CLK_LOCAL_MEM_FENCE);

        if (live) {
            const short v = clamp((short)(grey[y * panel.x + x] + (right + from_above) / 16),
                                  (short)-64, (short)(WHITE + 64));
            const uchar q = nearest(v);
            const short e = v - level_value[q];

            panel_px[y * panel.x + x] = q;
            right = 7 * e;
            /* 3/16 down-left completes column x-1 for the row below; 5/16 down, 1/16 down-right stay */
            if (x > 0) {
                const short complete = d0 + 3 * e;
                if (r == BAND - 1)
                    carry[x - 1] = complete;
                else
                    down[r][(x - 1) & 3] = complete;
            }
            d0 = d1 + 5 * e;
            d1 = e;
            if (x == panel.x - 1) {
                if (r == BAND - 1)
                    carry[x] = d0;
                else
                    down[r][x & 3] = d0;
            }
        }
        barrier(CLK_LOCAL_MEM_FENCE);
    }
}

/* Two bits a pixel, leftmost pixel in the high bits, rows padded to whole bytes. */
__kernel void pack(__global const uchar *panel_px, __global uchar *packed, const int2 panel)
{
    const int stride = (panel.x + 3) / 4;
    const int b = get_global_id(0), y = get_global_id(1);
    uchar out = 0;

    if (b >= stride || y >= panel.y)
        return;
    for (int i = 0; i < 4; i++) {
        const int x = 4 * b + i;
        const uchar q = x < panel.x ? panel_px[y * panel.x + x] : LEVELS - 1;
        out = (uchar)(out << 2 | q);
    }
    packed[y * stride + b] = out;
}
