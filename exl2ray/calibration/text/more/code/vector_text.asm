; vector_text.asm - draw text on an oscilloscope in X/Y mode from a 6502 and two 8-bit DACs.
;
; A glyph is a list of bytes: pxxxyyyy, p = beam on. x is 0..7, y is 0..15 with the baseline at 4.
; $FF ends a glyph (beam on at 7,15 is never needed, so nothing is lost).
; The CRT has to be refreshed about 50 times a second; at 1 MHz that is 20000 cycles for everything,
; roughly 300 strokes. Longer messages flicker and there is nothing to be done about it.

DACX    = $C000
DACY    = $C001
BLANK   = $C002         ; bit 7: 1 = beam off
VIA_IFR = $C40D
VIA_T1L = $C404

PEN_X   = $20           ; left edge of the current glyph
PEN_Y   = $21
SCALE   = $22           ; shift count, 0..2
TEXT    = $23           ; pointer, low/high
GLYPH   = $25           ; pointer, low/high
TX      = $27
TY      = $28
TEMP    = $29

        .org $E000

reset:  cld
        ldx #$FF
        txs
        stx BLANK
        jsr timer_init
        lda #2
        sta SCALE

frame:  lda #<message
        sta TEXT
        lda #>message
        sta TEXT+1
        lda #8
        sta PEN_X
        lda #160
        sta PEN_Y
        jsr puts
        ; Park in the corner with the beam off, or a bright dot burns in while we wait.
        lda #0
        sta DACX
        sta DACY
wait:   bit VIA_IFR     ; V = timer 1
        bvc wait
        lda VIA_T1L     ; reading clears the flag
        jmp frame

; ---- puts: string at (TEXT), zero-terminated, $0D starts a new line -------------------------------
puts:   ldy #0
        lda (TEXT),y
        beq puts_x
        cmp #$0D
        bne puts_1
        lda #8
        sta PEN_X
        sec
        lda PEN_Y
        sbc #72
        sta PEN_Y
        jmp puts_n
puts_1: jsr draw
puts_n: inc TEXT
        bne puts
        inc TEXT+1
        bne puts        ; always
puts_x: rts

; ---- draw: glyph for the character in A, advances PEN_X -------------------------------------------
draw:   sec
        sbc #$20
        cmp #64         ; space to underscore, lower case folded by the assembler of the message
        bcc draw_ok
        lda #31         ; '?'
draw_ok:
        asl             ; table of words
        tax
        lda glyphs,x
        sta GLYPH
        lda glyphs+1,x
        sta GLYPH+1
        ldy #0
stroke: lda (GLYPH),y
        cmp #$FF
        beq advance
        sta TEMP
        eor #$80        ; stored 1 = on, hardware 1 = off
        sta BLANK       ; only bit 7 is decoded

        lda TEMP
        and #$0F
        ldx SCALE
        beq s_y
sh_y:   asl
        dex
        bne sh_y
s_y:    clc
        adc PEN_Y
        sta TY

        lda TEMP
        and #$70
        lsr
        lsr
        lsr
        lsr
        ldx SCALE
        beq s_x
sh_x:   asl
        dex
        bne sh_x
s_x:    clc
        adc PEN_X
        bcs advance     ; ran off the right edge: drop the rest of this glyph
        sta TX

        ; Both DACs must step together. The 4 cycles between these stores show up as a tiny hook on
        ; diagonals unless the amplifier is slower than that; ours is, thanks to the 10 nF caps.
        lda TX
        ldx TY
        sta DACX
        stx DACY

        ; The beam needs about 12 us to arrive and the phosphor wants some dwell.
        ldx #4
dwell:  dex
        bne dwell
        iny
        bne stroke      ; always

advance:
        lda #$80
        sta BLANK
        lda #9
        ldx SCALE
        beq adv_1
adv_s:  asl
        dex
        bne adv_s
adv_1:  clc
        adc PEN_X
        sta PEN_X
        rts

; ---- 20 ms free-running timer ----------------------------------------------------------------------
timer_init:
        lda #$40
        sta $C40B       ; ACR: T1 continuous
        lda #<19998
        sta $C404
        lda #>19998
        sta $C405       ; starts it
        rts

message:
        .byte "OPEN DAY",$0D,"ROOM 14",0

; Only what the message needs is filled in; everything else points at the box.
g_sp:   .byte $FF
g_box:  .byte $04,$8E,$EE,$E4,$84,$FF
g_0:    .byte $14,$94,$D4,$E5,$ED,$DE,$9E,$8D,$85,$94,$FF
g_1:    .byte $1C,$BE,$B4,$FF
g_4:    .byte $54,$DE,$87,$E7,$FF
g_A:    .byte $04,$BE,$E4,$58,$98,$FF
g_D:    .byte $04,$8E,$CE,$EC,$E6,$C4,$84,$FF
g_E:    .byte $64,$84,$8E,$EE,$49,$89,$FF
g_M:    .byte $04,$8E,$B9,$EE,$E4,$FF
g_N:    .byte $04,$8E,$E4,$EE,$FF
g_P:    .byte $04,$8E,$DE,$EC,$EA,$D9,$89,$FF
g_R:    .byte $04,$8E,$DE,$EC,$EA,$D9,$89,$39,$E4,$FF
g_Y:    .byte $0E,$B9,$EE,$39,$B4,$FF

glyphs: .word g_sp,g_box,g_box,g_box,g_box,g_box,g_box,g_box    ; $20
        .word g_box,g_box,g_box,g_box,g_box,g_box,g_box,g_box   ; $28
        .word g_0,g_1,g_box,g_box,g_4,g_box,g_box,g_box         ; $30
        .word g_box,g_box,g_box,g_box,g_box,g_box,g_box,g_box   ; $38
        .word g_box,g_A,g_box,g_box,g_D,g_E,g_box,g_box         ; $40
        .word g_box,g_box,g_box,g_box,g_box,g_M,g_N,g_0         ; $48, O is a zero
        .word g_P,g_box,g_R,g_box,g_box,g_box,g_box,g_box       ; $50
        .word g_box,g_Y,g_box,g_box,g_box,g_box,g_box,g_box     ; $58

        .org $FFFA
        .word reset,reset,reset
