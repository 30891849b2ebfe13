#pragma once
/* Fold decompressor, shared by the cartridge loader and the desktop packer.
 * Keep this header free of anything the loader's toolchain (a 2014 one) does not understand. */
#include <stdint.h>

#define FOLD_E_INPUT   (-1)     /* ran off the end of the packed data */
#define FOLD_E_OUTPUT  (-2)     /* destination too small, or asset over FOLD_MAX_ASSET */
#define FOLD_E_FORMAT  (-3)     /* reserved token, zero-length run, or reference before the start */

/* One RAM bank minus the 256 bytes the display controller keeps for itself. */
#define FOLD_MAX_ASSET (65536u - 256u)

/* Ordinary case: both buffers apart.
 *
 * In-place case: the packed data may sit at the very end of dst if it starts at least
 * FOLD_INPLACE_GAP(packed size) bytes behind the last unpacked byte's final position. The packer
 * checks this when it writes an asset with the INPLACE flag; do not guess. */
#define FOLD_INPLACE_GAP(packed) (((packed) >> 7) + 4u)

#if defined(__GNUC__)
#define FOLD_PURE __attribute__((pure))
#define FOLD_CHECKED __attribute__((warn_unused_result))
#else
#define FOLD_PURE
#define FOLD_CHECKED
#endif

/* Number of bytes written, or one of the negative codes above. On error dst holds whatever had been
 * unpacked so far, which is handy in a debugger and must not be shown to visitors. */
FOLD_CHECKED int32_t fold_expand(uint8_t *dst, uint32_t dst_size, const uint8_t *src, uint32_t src_size);

/* Size after expansion without expanding. */
FOLD_CHECKED FOLD_PURE int32_t fold_measure(const uint8_t *src, uint32_t src_size);
