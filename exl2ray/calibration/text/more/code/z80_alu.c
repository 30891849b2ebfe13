// license:BSD-3-Clause
// copyright-holders:the Marrowfat emulator team

#include "z80core.h"

#define SF 0x80
#define ZF 0x40
#define YF 0x20
#define HF 0x10
#define XF 0x08
#define PF 0x04
#define VF PF
#define NF 0x02
#define CF 0x01

#define A   (z->af.b.h)
#define F   (z->af.b.l)
#define B   (z->bc.b.h)
#define C   (z->bc.b.l)
#define D   (z->de.b.h)
#define E   (z->de.b.l)
#define H   (z->hl.b.h)
#define L   (z->hl.b.l)
#define HL  (z->hl.w)
#define PC  (z->pc)
#define SP  (z->sp)

static uint8_t SZ[256];
static uint8_t SZP[256];

void z80_init_tables(void)
{
    for (int i = 0; i < 256; i++) {
        int bits = 0;
        for (int b = 0; b < 8; b++)
            bits += (i >> b) & 1;
        SZ[i] = (i ? i & SF : ZF) | (i & (YF | XF));
        SZP[i] = SZ[i] | ((bits & 1) ? 0 : PF);
    }
}

static inline void add8(z80_t *z, uint8_t v, int carry)
{
    unsigned r = A + v + carry;
    F = SZ[r & 0xff] | ((r >> 8) & CF) | ((A ^ v ^ r) & HF)
      | (((A ^ ~v) & (A ^ r) & 0x80) >> 5);
    A = r;
}

static inline uint8_t sub8(z80_t *z, uint8_t v, int carry)
{
    unsigned r = A - v - carry;
    F = SZ[r & 0xff] | ((r >> 8) & CF) | NF | ((A ^ v ^ r) & HF)
      | (((A ^ v) & (A ^ r) & 0x80) >> 5);
    return r;
}

static inline void cp8(z80_t *z, uint8_t v)
{
    sub8(z, v, 0);
    F = (F & ~(YF | XF)) | (v & (YF | XF));   // from the operand, not the result
}

static inline uint8_t inc8(z80_t *z, uint8_t v)
{
    uint8_t r = v + 1;
    F = (F & CF) | SZ[r] | ((r & 0x0f) ? 0 : HF) | (r == 0x80 ? VF : 0);
    return r;
}

static inline uint8_t dec8(z80_t *z, uint8_t v)
{
    uint8_t r = v - 1;
    F = (F & CF) | NF | SZ[r] | ((v & 0x0f) ? 0 : HF) | (r == 0x7f ? VF : 0);
    return r;
}

static void daa(z80_t *z)
{
    uint8_t fix = 0, c = F & CF;

    if ((F & HF) || (A & 0x0f) > 9)
        fix |= 0x06;
    if (c || A > 0x99) {
        fix |= 0x60;
        c = CF;
    }
    uint8_t r = (F & NF) ? A - fix : A + fix;
    F = SZP[r] | c | (F & NF) | ((A ^ r) & HF);
    A = r;
}

static uint8_t *reg8(z80_t *z, int n)
{
    switch (n & 7) {
    case 0: return &B;
    case 1: return &C;
    case 2: return &D;
    case 3: return &E;
    case 4: return &H;
    case 5: return &L;
    case 7: return &A;
    }
    return NULL;                              // 6 is (HL)
}

static int cond(const z80_t *z, int n)
{
    static const uint8_t mask[4] = { ZF, CF, PF, SF };
    int set = (z->af.b.l & mask[n >> 1]) != 0;
    return (n & 1) ? set : !set;
}

// Rotates and shifts of the CB page; 6 is the undocumented SLL, which shifts a one in.
static uint8_t cb_shift(z80_t *z, int kind, uint8_t v)
{
    uint8_t r, c;

    switch (kind) {
    case 0: c = v >> 7; r = (v << 1) | c;              break;   // RLC
    case 1: c = v & 1;  r = (v >> 1) | (c << 7);       break;   // RRC
    case 2: c = v >> 7; r = (v << 1) | (F & CF);       break;   // RL
    case 3: c = v & 1;  r = (v >> 1) | ((F & CF) << 7); break;  // RR
    case 4: c = v >> 7; r = v << 1;                    break;   // SLA
    case 5: c = v & 1;  r = (v >> 1) | (v & 0x80);     break;   // SRA
    case 6: c = v >> 7; r = (v << 1) | 1;              break;   // SLL
    default: c = v & 1; r = v >> 1;                    break;   // SRL
    }
    F = SZP[r] | c;
    return r;
}

int z80_step_cb(z80_t *z)
{
    uint8_t op = z80_fetch_m1(z);
    uint8_t *reg = reg8(z, op);
    uint8_t v = reg ? *reg : z80_read(z, HL);
    int bit = (op >> 3) & 7;

    switch (op >> 6) {
    case 0:
        v = cb_shift(z, bit, v);
        break;
    case 1: {
        uint8_t r = v & (1 << bit);
        F = (F & CF) | HF | (r ? (r & SF) : ZF | PF);
        F |= (reg ? v : z->wz >> 8) & (YF | XF);      // BIT n,(HL) leaks the high byte of WZ
        return reg ? 8 : 12;
    }
    case 2:
        v &= ~(1 << bit);
        break;
    case 3:
        v |= 1 << bit;
        break;
    }

    if (reg) {
        *reg = v;
        return 8;
    }
    z80_write(z, HL, v);
    return 15;
}

int z80_step_alu(z80_t *z, uint8_t op)
{
    uint8_t *reg = reg8(z, op);
    uint8_t v = op >= 0xc0 ? z80_fetch(z) : reg ? *reg : z80_read(z, HL);

    switch ((op >> 3) & 7) {
    case 0: add8(z, v, 0);              break;
    case 1: add8(z, v, F & CF);         break;
    case 2: A = sub8(z, v, 0);          break;
    case 3: A = sub8(z, v, F & CF);     break;
    case 4: A &= v; F = SZP[A] | HF;    break;
    case 5: A ^= v; F = SZP[A];         break;
    case 6: A |= v; F = SZP[A];         break;
    case 7: cp8(z, v);                  break;
    }
    return reg && op < 0xc0 ? 4 : 7;
}
