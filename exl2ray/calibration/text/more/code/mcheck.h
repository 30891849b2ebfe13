/**
 * @file mcheck.h
 * @brief A unit test framework in one header.
 *
 * In exactly one source file:
 * @code
 *   #define MCHECK_MAIN
 *   #include "mcheck.h"
 * @endcode
 * and in as many others as you like:
 * @code
 *   #include "mcheck.h"
 *
 *   TEST(queue, empty_queue_has_no_head)
 *   {
 *       struct queue q = QUEUE_INIT;
 *       CHECK_NULL(queue_head(&q));
 *   }
 * @endcode
 *
 * Tests register themselves before main() is entered. Each runs in a process
 * of its own where there is fork(), so that a crash is one failed test and not
 * the end of the run. Pass -n to stay in one process (for the debugger), -k
 * followed by a word to run only tests whose name contains it, -v to see the
 * names go by.
 *
 * Needs a compiler with __attribute__((constructor)).
 */
#ifndef MCHECK_H
#define MCHECK_H

#include <math.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef __cplusplus
extern "C" {
#endif

/** One registered test; a list of these is kept in reverse link order. */
struct mcheck_test {
    const char *suite;
    const char *name;
    const char *file;
    int line;
    void (*run)(void);
    struct mcheck_test *next;
};

/** Everything the assertions need to know. There is one of it. */
struct mcheck_state {
    struct mcheck_test *tests;
    jmp_buf bail;          /**< where REQUIRE goes on failure */
    unsigned checks;
    unsigned failures;     /**< in the test that is running */
    const char *skipped;
};

extern struct mcheck_state mcheck_;

/** @cond internal */
void mcheck_register_(struct mcheck_test *t);
void mcheck_fail_(const char *file, int line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
/** @endcond */

/**
 * Define a test.
 * @param s suite, an identifier
 * @param n name, an identifier; unique within the suite
 */
#define TEST(s, n)                                                        \
    static void mcheck_##s##__##n(void);                                  \
    __attribute__((constructor)) static void mcheck_reg_##s##__##n(void)  \
    {                                                                     \
        static struct mcheck_test t = { #s, #n, __FILE__, __LINE__,       \
                                        mcheck_##s##__##n, 0 };           \
        mcheck_register_(&t);                                             \
    }                                                                     \
    static void mcheck_##s##__##n(void)

/** Note a failure if @a cond is false, and go on. */
#define CHECK(cond)                                                       \
    (mcheck_.checks++, (cond) ? (void)0                                   \
        : mcheck_fail_(__FILE__, __LINE__, "%s is false", #cond))

/** Like CHECK, but the rest of the test makes no sense after a failure. */
#define REQUIRE(cond)                                                     \
    do {                                                                  \
        mcheck_.checks++;                                                 \
        if (!(cond)) {                                                    \
            mcheck_fail_(__FILE__, __LINE__, "%s is false", #cond);       \
            longjmp(mcheck_.bail, 1);                                     \
        }                                                                 \
    } while (0)

#define CHECK_NULL(p)                                                     \
    do {                                                                  \
        const void *p_ = (p);                                             \
        mcheck_.checks++;                                                 \
        if (p_)                                                           \
            mcheck_fail_(__FILE__, __LINE__, "%s is %p", #p, p_);         \
    } while (0)

/** Both sides are evaluated once and shown in decimal. */
#define CHECK_INT(got, want)                                              \
    do {                                                                  \
        long long g_ = (got), w_ = (want);                                \
        mcheck_.checks++;                                                 \
        if (g_ != w_)                                                     \
            mcheck_fail_(__FILE__, __LINE__, "%s is %lld, not %lld",      \
                         #got, g_, w_);                                   \
    } while (0)

#define CHECK_STR(got, want)                                              \
    do {                                                                  \
        const char *g_ = (got), *w_ = (want);                             \
        mcheck_.checks++;                                                 \
        if (!g_ || strcmp(g_, w_) != 0)                                   \
            mcheck_fail_(__FILE__, __LINE__, "%s is \"%s\", not \"%s\"",  \
                         #got, g_ ? g_ : "(null)", w_);                   \
    } while (0)

/** Equal within @a eps, absolutely. NaN equals nothing, itself included. */
#define CHECK_NEAR(got, want, eps)                                        \
    do {                                                                  \
        double g_ = (got), w_ = (want);                                   \
        mcheck_.checks++;                                                 \
        if (!(fabs(g_ - w_) <= (eps)))                                    \
            mcheck_fail_(__FILE__, __LINE__, "%s is %.17g, not %.17g",    \
                         #got, g_, w_);                                   \
    } while (0)

/** Leave the test without passing or failing it. */
#define SKIP(why)                                                         \
    do {                                                                  \
        mcheck_.skipped = (why);                                          \
        longjmp(mcheck_.bail, 2);                                         \
    } while (0)

#ifdef __cplusplus
}
#endif

#endif /* MCHECK_H */
