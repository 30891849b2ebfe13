/* lzfold.c - decompressor for the "fold" format used on the exhibition cartridges.
 *
 * Runs on the cartridge side too, so: no heap, no recursion, no division, 32-bit at most, and the
 * whole thing must compile to less than 700 bytes of Thumb code (it is 612 with -Os at the moment).
 *
 * Token byte:
 *    0LLLLLLL            L+1 literal bytes follow
 *    10LLLLOO OOOOOOOO   copy L+3 bytes from O+1 back              (near)
 *    110LLLLL + 2 bytes  copy L+4 bytes from (le16)+1 back         (far)
 *    1110RRRR + 1 byte   repeat that byte R+4 times
 *    1111NNNN            N = 0 end; N = 15 long literal, le16 count follows; others reserved
 */
#include "lzfold.h"

struct fold_in {
    const uint8_t *p, *end;
};

#define NEED(n)                                   \
    do {                                          \
        if ((uint32_t)(in.end - in.p) < (n))      \
            return FOLD_E_INPUT;                  \
    } while (0)

#define ROOM(n)                                   \
    do {                                          \
        if ((uint32_t)(limit - out) < (n))        \
            return FOLD_E_OUTPUT;                 \
    } while (0)

int32_t fold_expand(uint8_t *dst, uint32_t dst_size, const uint8_t *src, uint32_t src_size)
{
    struct fold_in in = { src, src + src_size };
    uint8_t *out = dst;
    uint8_t *const limit = dst + dst_size;

    for (;;) {
        uint32_t t, len, dist;
        const uint8_t *from;

        NEED(1);
        t = *in.p++;

        if (t < 0x80) {
            len = t + 1;
        literals:
            NEED(len);
            ROOM(len);
            do
                *out++ = *in.p++;
            while (--len);
            continue;
        }

        if (t < 0xc0) {
            NEED(1);
            len = (t >> 2 & 15) + 3;
            dist = ((t & 3) << 8 | *in.p++) + 1;
        } else if (t < 0xe0) {
            NEED(2);
            len = (t & 31) + 4;
            dist = (in.p[0] | (uint32_t)in.p[1] << 8) + 1;
            in.p += 2;
        } else if (t < 0xf0) {
            NEED(1);
            len = (t & 15) + 4;
            ROOM(len);
            do
                *out++ = *in.p;
            while (--len);
            in.p++;
            continue;
        } else if (t == 0xf0) {
            /* Trailing bytes are fine: cartridges pad every asset to a flash page with 0xff. */
            return (int32_t)(out - dst);
        } else if (t == 0xff) {
            NEED(2);
            len = in.p[0] | (uint32_t)in.p[1] << 8;
            in.p += 2;
            if (len == 0)
                return FOLD_E_FORMAT;
            goto literals;
        } else {
            return FOLD_E_FORMAT;
        }

        if (dist > (uint32_t)(out - dst))
            return FOLD_E_FORMAT;
        ROOM(len);
        from = out - dist;
        do                              /* overlapping on purpose: dist 1 means "again" */
            *out++ = *from++;
        while (--len);
    }
}

/* How large will it get? Same walk without writing; lets the loader pick a RAM bank first. */
int32_t fold_measure(const uint8_t *src, uint32_t src_size)
{
    struct fold_in in = { src, src + src_size };
    uint32_t total = 0, len;

    for (;;) {
        uint32_t t;

        NEED(1);
        t = *in.p++;
        if (t == 0xf0)
            return (int32_t)total;
        if (t < 0x80) {
            len = t + 1;
            NEED(len);
            in.p += len;
        } else if (t < 0xc0) {
            NEED(1);
            in.p += 1;
            len = (t >> 2 & 15) + 3;
        } else if (t < 0xe0) {
            NEED(2);
            in.p += 2;
            len = (t & 31) + 4;
        } else if (t < 0xf0) {
            NEED(1);
            in.p += 1;
            len = (t & 15) + 4;
        } else if (t == 0xff) {
            NEED(2);
            len = in.p[0] | (uint32_t)in.p[1] << 8;
            in.p += 2;
            NEED(len);
            in.p += len;
        } else {
            return FOLD_E_FORMAT;
        }
        total += len;
        if (total > FOLD_MAX_ASSET)
            return FOLD_E_OUTPUT;
    }
}

#ifdef FOLD_SELFTEST
#include <stdio.h>
#include <string.h>

int main(void)
{
    static const uint8_t packed[] = {
        0x02, 'r', 'u', 'm',            /* rum */
        0x80 | (2 << 2), 2,             /* copy 5 from 3 back: rumru */
        0xe1, '!',                      /* five of them */
        0xf0, 0xff, 0xff
    };
    uint8_t buf[64];
    int32_t n = fold_expand(buf, sizeof buf, packed, sizeof packed);

    if (n != 13 || memcmp(buf, "rumrumru!!!!!", 13) != 0 || fold_measure(packed, sizeof packed) != 13) {
        printf("selftest: got %d \"%.*s\"\n", (int)n, n > 0 ? (int)n : 0, buf);
        return 1;
    }
    /* every truncation must be refused, and none may touch memory behind the buffer */
    for (uint32_t cut = 0; cut < 8; cut++)
        if (fold_expand(buf, sizeof buf, packed, cut) != FOLD_E_INPUT)
            return printf("cut at %u was accepted\n", (unsigned)cut), 1;
    for (uint32_t room = 0; room < 13; room++)
        if (fold_expand(buf, room, packed, sizeof packed) != FOLD_E_OUTPUT)
            return printf("room %u was enough\n", (unsigned)room), 1;
    return 0;
}
#endif
