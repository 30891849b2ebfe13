/* treap_split.h -- ordered sequence with cheap cut and paste, header only.
 *
 * Define TREAP_SPLIT_IMPLEMENTATION in exactly one source file before including.
 *
 * A sequence is a pointer to its root; NULL is the empty sequence. All functions that take a root
 * by value consume it. Nothing here is thread-safe and nothing allocates except tsq_leaf().
 *
 *     tsq *a = NULL, *b, *c;
 *     for (i = 0; i < n; i++)
 *         a = tsq_join(a, tsq_leaf(lines[i]));
 *     tsq_cut(a, 10, &a, &b);        // a: first ten, b: the rest
 *     tsq_cut(b, 3, &b, &c);         // b: three lines
 *     a = tsq_join(tsq_join(c, a), b);
 */
#ifndef TREAP_SPLIT_H
#define TREAP_SPLIT_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tsq tsq;

tsq    *tsq_leaf(void *value);                       /* NULL if out of memory */
tsq    *tsq_join(tsq *left, tsq *right);             /* O(log n) expected */
void    tsq_cut(tsq *whole, size_t at, tsq **left, tsq **right);
size_t  tsq_len(const tsq *t);
void   *tsq_at(tsq *t, size_t index);                /* index must be < tsq_len(t) */
void    tsq_reverse(tsq *t);                         /* O(1), lazily pushed down */
int     tsq_each(tsq *t, int (*fn)(void *value, void *ctx), void *ctx);
void    tsq_free(tsq *t, void (*free_value)(void *));

#ifdef __cplusplus
}
#endif
#endif /* TREAP_SPLIT_H */

#ifdef TREAP_SPLIT_IMPLEMENTATION
#ifndef TSQ_MALLOC
#include <stdlib.h>
#define TSQ_MALLOC(n) malloc(n)
#define TSQ_FREE(p)   free(p)
#endif
#include <assert.h>
#include <stdint.h>

struct tsq {
    tsq     *l, *r;
    void    *value;
    size_t   count;        /* nodes in this subtree, including this one */
    uint32_t prio;
    uint32_t flip;         /* children are to be exchanged before anyone looks at them */
};

/* Priorities need no quality, only independence of the insertion order. */
static uint32_t tsq__random(void)
{
    static uint32_t x = 2463534242u;
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x;
}

size_t tsq_len(const tsq *t) { return t ? t->count : 0; }

static void tsq__fix(tsq *t) { t->count = tsq_len(t->l) + tsq_len(t->r) + 1; }

static void tsq__push(tsq *t)
{
    tsq *swap;
    if (!t->flip)
        return;
    swap = t->l;
    t->l = t->r;
    t->r = swap;
    if (t->l) t->l->flip ^= 1;
    if (t->r) t->r->flip ^= 1;
    t->flip = 0;
}

tsq *tsq_leaf(void *value)
{
    tsq *t = (tsq *)TSQ_MALLOC(sizeof *t);
    if (!t)
        return NULL;
    t->l = t->r = NULL;
    t->value = value;
    t->count = 1;
    t->prio = tsq__random();
    t->flip = 0;
    return t;
}

tsq *tsq_join(tsq *a, tsq *b)
{
    if (!a) return b;
    if (!b) return a;
    if (a->prio >= b->prio) {
        tsq__push(a);
        a->r = tsq_join(a->r, b);
        tsq__fix(a);
        return a;
    }
    tsq__push(b);
    b->l = tsq_join(a, b->l);
    tsq__fix(b);
    return b;
}

/* Writes through left and right only after the recursion, so they may alias the caller's root. */
void tsq_cut(tsq *t, size_t at, tsq **left, tsq **right)
{
    if (!t) {
        *left = *right = NULL;
        return;
    }
    tsq__push(t);
    if (tsq_len(t->l) >= at) {
        tsq *rest;
        tsq_cut(t->l, at, left, &rest);
        t->l = rest;
        tsq__fix(t);
        *right = t;
    } else {
        tsq *rest;
        tsq_cut(t->r, at - tsq_len(t->l) - 1, &rest, right);
        t->r = rest;
        tsq__fix(t);
        *left = t;
    }
}

void *tsq_at(tsq *t, size_t index)
{
    assert(index < tsq_len(t));
    for (;;) {
        size_t before;
        tsq__push(t);
        before = tsq_len(t->l);
        if (index == before)
            return t->value;
        if (index < before) {
            t = t->l;
        } else {
            index -= before + 1;
            t = t->r;
        }
    }
}

void tsq_reverse(tsq *t) { if (t) t->flip ^= 1; }

/* Stops at, and returns, the first non-zero result. fn must not modify the sequence. */
int tsq_each(tsq *t, int (*fn)(void *, void *), void *ctx)
{
    int rc;
    while (t) {
        tsq__push(t);
        if ((rc = tsq_each(t->l, fn, ctx)) != 0)
            return rc;
        if ((rc = fn(t->value, ctx)) != 0)
            return rc;
        t = t->r;
    }
    return 0;
}

void tsq_free(tsq *t, void (*free_value)(void *))
{
    while (t) {
        tsq *right = t->r;
        tsq_free(t->l, free_value);
        if (free_value)
            free_value(t->value);
        TSQ_FREE(t);
        t = right;
    }
}
#endif /* TREAP_SPLIT_IMPLEMENTATION */
