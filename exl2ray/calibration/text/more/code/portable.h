#ifndef CASTANET_PORTABLE_H
#define CASTANET_PORTABLE_H
/*
 * One header that hides the compilers from the rest of Castanet. Built on: GCC 3.4 and later, Clang,
 * MSVC 2008 and later, Watcom 1.9 (DOS, OS/2), Sun Studio 12, the Atari build with vbcc.
 *
 * Rules: no code in here but inlines; every macro has the prefix CN_; a feature that cannot be had is
 * defined as something harmless, and CN_HAVE_xxx says so.
 */

#if defined(__STDC_VERSION__) && __STDC_VERSION__ >= 202311L
#  define CN_C 23
#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 201112L
#  define CN_C 11
#elif defined(__STDC_VERSION__) && __STDC_VERSION__ >= 199901L
#  define CN_C 99
#elif defined(__STDC__) || defined(_MSC_VER)
#  define CN_C 90
#else
#  error "Castanet needs at least an ANSI compiler; see doc/ports.txt for the K&R branch"
#endif

/* ---- which compiler ---------------------------------------------------------------------------- */

#if defined(__clang__)
#  define CN_CLANG (__clang_major__ * 100 + __clang_minor__)
#  define CN_GNUC  409
#elif defined(__GNUC__)
#  define CN_GNUC  (__GNUC__ * 100 + __GNUC_MINOR__)
#endif
#ifndef CN_GNUC
#  define CN_GNUC 0
#endif
#ifndef CN_CLANG
#  define CN_CLANG 0
#endif

#ifdef __has_attribute
#  define CN_HAS_ATTR(x) __has_attribute(x)
#else
#  define CN_HAS_ATTR(x) 0
#endif
#ifdef __has_builtin
#  define CN_HAS_BUILTIN(x) __has_builtin(x)
#else
#  define CN_HAS_BUILTIN(x) 0
#endif

#include <stddef.h>

/* ---- integers ---------------------------------------------------------------------------------- */

#if CN_C >= 99 || (defined(_MSC_VER) && _MSC_VER >= 1600) || defined(__WATCOMC__)
#  include <stdint.h>
#else
   typedef signed char    int8_t;
   typedef unsigned char  uint8_t;
   typedef short          int16_t;
   typedef unsigned short uint16_t;
#  include <limits.h>
#  if INT_MAX >= 2147483647
     typedef int           int32_t;
     typedef unsigned      uint32_t;
#  else
     typedef long          int32_t;
     typedef unsigned long uint32_t;
#  endif
#  if defined(_MSC_VER)
     typedef __int64          int64_t;
     typedef unsigned __int64 uint64_t;
#  else
     typedef long long          int64_t;
     typedef unsigned long long uint64_t;
#  endif
#endif

/* ---- words that came late ---------------------------------------------------------------------- */

#if defined(__cplusplus) || CN_C >= 99
#  define CN_INLINE static inline
#elif CN_GNUC
#  define CN_INLINE static __inline__
#elif defined(_MSC_VER) || defined(__WATCOMC__)
#  define CN_INLINE static __inline
#else
#  define CN_INLINE static
#endif

#if CN_C >= 99 && !defined(__cplusplus)
#  define CN_RESTRICT restrict
#elif CN_GNUC || (defined(_MSC_VER) && _MSC_VER >= 1400)
#  define CN_RESTRICT __restrict
#else
#  define CN_RESTRICT
#endif

#if CN_C >= 23
#  define CN_NORETURN  [[noreturn]]
#  define CN_NODISCARD [[nodiscard]]
#  define CN_FALL      [[fallthrough]]
#  define CN_THREAD    thread_local
#elif CN_GNUC >= 304
#  define CN_NORETURN  __attribute__((__noreturn__))
#  define CN_NODISCARD __attribute__((__warn_unused_result__))
#  define CN_THREAD    __thread
#  if CN_HAS_ATTR(__fallthrough__) || CN_GNUC >= 700
#    define CN_FALL    __attribute__((__fallthrough__))
#  endif
#elif defined(_MSC_VER)
#  define CN_NORETURN  __declspec(noreturn)
#  define CN_NODISCARD
#  define CN_THREAD    __declspec(thread)
#else
#  define CN_NORETURN
#  define CN_NODISCARD
#endif
#ifndef CN_FALL
#  define CN_FALL ((void)0)
#endif
#ifdef CN_THREAD
#  define CN_HAVE_THREAD_LOCAL 1
#else
#  define CN_THREAD                  /* single-threaded ports only: a plain static will do */
#  define CN_HAVE_THREAD_LOCAL 0
#endif

/* ---- assertions at compile time ---------------------------------------------------------------- */

#define CN_CAT_(a, b) a##b
#define CN_CAT(a, b)  CN_CAT_(a, b)
#if CN_C >= 11 || (defined(__cplusplus) && __cplusplus >= 201103L)
#  ifdef __cplusplus
#    define CN_STATIC_ASSERT(c, msg) static_assert(c, #msg)
#  else
#    define CN_STATIC_ASSERT(c, msg) _Static_assert(c, #msg)
#  endif
#else
   /* a negative array size; the message becomes part of the name, so use_underscores */
#  define CN_STATIC_ASSERT(c, msg) typedef char CN_CAT(cn_##msg##_, __LINE__)[(c) ? 1 : -1]
#endif

CN_STATIC_ASSERT(sizeof(int32_t) == 4, int32_is_not_32_bits);
CN_STATIC_ASSERT((-1 >> 1) == -1, right_shift_of_negatives_is_not_arithmetic);

/* ---- byte order -------------------------------------------------------------------------------- */

#if defined(__BYTE_ORDER__) && defined(__ORDER_BIG_ENDIAN__)
#  define CN_BIG_ENDIAN (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__)
#elif defined(__sparc) || defined(__m68k__) || defined(__ATARI__) || defined(_MIPSEB) || defined(__hppa)
#  define CN_BIG_ENDIAN 1
#else
#  define CN_BIG_ENDIAN 0
#endif

CN_INLINE uint32_t cn_swap32(uint32_t v)
{
#if CN_GNUC >= 403
    return __builtin_bswap32(v);
#else
    return v << 24 | (v & 0xff00u) << 8 | (v >> 8 & 0xff00u) | v >> 24;
#endif
}

#define CN_BE32(v) (CN_BIG_ENDIAN ? (uint32_t)(v) : cn_swap32(v))
#define CN_LE32(v) (CN_BIG_ENDIAN ? cn_swap32(v) : (uint32_t)(v))

/* ---- arithmetic that must not overflow --------------------------------------------------------- */

/* Returns nonzero on overflow, like the builtins. */
CN_INLINE int cn_mul_size(size_t a, size_t b, size_t *out)
{
#if CN_GNUC >= 500 || CN_HAS_BUILTIN(__builtin_mul_overflow)
    return __builtin_mul_overflow(a, b, out);
#else
    if (b != 0 && a > (size_t)-1 / b)
        return 1;
    *out = a * b;
    return 0;
#endif
}

#define CN_COUNT(a)         (sizeof(a) / sizeof *(a))
#define CN_MIN(a, b)        ((a) < (b) ? (a) : (b))
#define CN_MAX(a, b)        ((a) > (b) ? (a) : (b))
#define CN_CONTAINER(p, t, m) ((t *)((char *)(p) - offsetof(t, m)))

/* X-macro over the note names; the sequencer, the MIDI exporter and the help text all expand it. */
#define CN_NOTES(X) \
    X(C, 0, "C") X(CS, 1, "C#") X(D, 2, "D") X(DS, 3, "D#") X(E, 4, "E") X(F, 5, "F") \
    X(FS, 6, "F#") X(G, 7, "G") X(GS, 8, "G#") X(A, 9, "A") X(AS, 10, "A#") X(B, 11, "B")

enum cn_note {
#define X(id, n, text) CN_NOTE_##id = n,
    CN_NOTES(X)
#undef X
    CN_NOTE_COUNT
};

#endif /* CASTANET_PORTABLE_H */
