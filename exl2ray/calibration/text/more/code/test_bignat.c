/* Tests for bignat: arbitrary-size natural numbers, little-endian limbs of 32 bits.
 * No framework. Every check prints on failure only; the exit status is the number of failures,
 * capped at 99 because the build farm treats 125 and up as "machine broken". */
#include "bignat.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int failures;
static const char *current;

#define CHECK(cond)                                                                      \
    do {                                                                                 \
        if (!(cond)) {                                                                   \
            failures++;                                                                  \
            fprintf(stderr, "%s:%d: [%s] %s\n", __FILE__, __LINE__, current, #cond);     \
        }                                                                                \
    } while (0)

#define CHECK_STR(n, want)                                                               \
    do {                                                                                 \
        char *got_ = bn_to_decimal(n);                                                   \
        if (!got_ || strcmp(got_, want) != 0) {                                          \
            failures++;                                                                  \
            fprintf(stderr, "%s:%d: [%s] got %s, want %s\n", __FILE__, __LINE__,         \
                    current, got_ ? got_ : "(null)", want);                              \
        }                                                                                \
        free(got_);                                                                      \
    } while (0)

static bignat *dec(const char *s)
{
    bignat *n = bn_from_decimal(s);
    if (!n) {
        fprintf(stderr, "bad literal in the test itself: %s\n", s);
        abort();
    }
    return n;
}

static void test_parsing(void)
{
    static const char *bad[] = { "", " 1", "1 ", "-1", "+1", "0x10", "1_000", "12a" };

    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        bignat *n = bn_from_decimal(bad[i]);
        CHECK(n == NULL);
        bn_free(n);
    }

    bignat *zero = dec("0000");
    CHECK(bn_is_zero(zero));
    CHECK(bn_limbs(zero) == 0);     /* canonical form has no leading zero limbs, not even one */
    CHECK_STR(zero, "0");
    bn_free(zero);

    bignat *edge = dec("4294967296");
    CHECK(bn_limbs(edge) == 2);
    bn_free(edge);
}

static void test_carry_chains(void)
{
    bignat *a = dec("340282366920938463463374607431768211455");   /* 2^128 - 1 */
    bignat *one = dec("1");
    bignat *sum = bn_add(a, one);

    CHECK_STR(sum, "340282366920938463463374607431768211456");
    CHECK(bn_limbs(sum) == 5);

    bignat *back = bn_sub(sum, one);
    CHECK(bn_cmp(back, a) == 0);
    CHECK(bn_sub(one, a) == NULL);                                /* would be negative */

    bn_free(a), bn_free(one), bn_free(sum), bn_free(back);
}

static void test_factorial(void)
{
    bignat *f = dec("1");

    for (uint32_t i = 2; i <= 25; i++) {
        bignat *next = bn_mul_small(f, i);
        bn_free(f);
        f = next;
    }
    CHECK_STR(f, "15511210043330985984000000");
    bn_free(f);
}

/* Long division has one branch (the guessed digit is one too large) that random operands hit about
 * once in 2^31 tries. These operands were built by hand to go through it. */
static void test_division_add_back(void)
{
    static const struct { uint32_t u[4], v[3], q, r[3]; } c = {
        .u = { 0x00000003, 0x00000000, 0x80000000, 0x00000000 },
        .v = { 0x00000001, 0x00000000, 0x20000000 },
        .q = 3,
        .r = { 0x00000000, 0x00000000, 0x20000000 },
    };
    bignat *u = bn_from_limbs(c.u, 4), *v = bn_from_limbs(c.v, 3), *q, *r;

    CHECK(bn_divmod(u, v, &q, &r) == 0);
    CHECK(bn_limbs(q) == 1 && bn_limb(q, 0) == c.q);
    CHECK(bn_cmp(r, v) < 0);

    bignat *prod = bn_mul(q, v), *sum = bn_add(prod, r);
    CHECK(bn_cmp(sum, u) == 0);
    bn_free(u), bn_free(v), bn_free(q), bn_free(r), bn_free(prod), bn_free(sum);
}

static void test_divide_by_zero(void)
{
    bignat *u = dec("17"), *v = dec("0");
    bignat *q = (bignat *)0x1, *r = (bignat *)0x1;

    CHECK(bn_divmod(u, v, &q, &r) == -1);
    CHECK(q == NULL && r == NULL);      /* outputs are cleared even on error: callers free blindly */
    bn_free(u), bn_free(v);
}

static uint32_t lcg = 20210704;

static bignat *random_nat(int max_limbs)
{
    uint32_t limb[64];
    int n;

    lcg = lcg * 1664525u + 1013904223u;
    n = (int)(lcg >> 16) % max_limbs + 1;
    for (int i = 0; i < n; i++) {
        lcg = lcg * 1664525u + 1013904223u;
        /* runs of ones and zeros find more bugs than noise does */
        limb[i] = (lcg >> 29) == 0 ? 0 : (lcg >> 29) == 1 ? UINT32_MAX : lcg ^ lcg >> 15;
    }
    return bn_from_limbs(limb, n);
}

static void test_random_identities(void)
{
    for (int round = 0; round < 20000 && failures == 0; round++) {
        bignat *a = random_nat(12), *b = random_nat(6), *c = random_nat(6);
        bignat *bc = bn_add(b, c);
        bignat *left = bn_mul(a, bc);
        bignat *ab = bn_mul(a, b), *ac = bn_mul(a, c);
        bignat *right = bn_add(ab, ac);

        CHECK(bn_cmp(left, right) == 0);
        if (!bn_is_zero(b)) {
            bignat *q, *r;
            CHECK(bn_divmod(ab, b, &q, &r) == 0);
            CHECK(bn_cmp(q, a) == 0 && bn_is_zero(r));
            bn_free(q), bn_free(r);
        }
        if (failures)
            fprintf(stderr, "round %d, generator state %" PRIu32 "\n", round, lcg);
        bn_free(a), bn_free(b), bn_free(c), bn_free(bc);
        bn_free(left), bn_free(ab), bn_free(ac), bn_free(right);
    }
}

int main(int argc, char **argv)
{
    static const struct { const char *name; void (*fn)(void); } tests[] = {
        { "parsing", test_parsing },
        { "carry", test_carry_chains },
        { "factorial", test_factorial },
        { "add-back", test_division_add_back },
        { "div0", test_divide_by_zero },
        { "random", test_random_identities },
    };

    for (size_t i = 0; i < sizeof tests / sizeof *tests; i++) {
        if (argc > 1 && strcmp(argv[1], tests[i].name) != 0)
            continue;
        current = tests[i].name;
        tests[i].fn();
    }
    return failures > 99 ? 99 : failures;
}
