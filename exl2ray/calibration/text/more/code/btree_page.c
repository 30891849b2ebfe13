#include "btree_page.h"

#include <stdbool.h>
#include <stddef.h>
#include <string.h>

/* Slotted leaf page.
 *
 *   0            16                       lower              upper                    8192
 *   +------------+------------------------+------------------+------------------------+
 *   | header     | slot 0 | slot 1 | ...  |   free           |  cells, newest lowest  |
 *   +------------+------------------------+------------------+------------------------+
 *
 * A slot is a 16-bit offset of its cell. A cell is  klen(2) vlen(2) key value, unaligned. Slots are kept
 * in key order, cells are not. Deleting leaves a hole that is counted in `dead`; the page is compacted
 * only when an insertion would fit afterwards and does not fit now.
 */

struct header {
    uint64_t lsn;
    uint16_t nslots;
    uint16_t lower;
    uint16_t upper;
    uint16_t dead;
};

_Static_assert(sizeof(struct header) == 16, "page header has holes");

static struct header *hdr(void *page) { return page; }
static const struct header *chdr(const void *page) { return page; }

static uint16_t rd16(const uint8_t *p) { uint16_t v; memcpy(&v, p, 2); return v; }
static void wr16(uint8_t *p, uint16_t v) { memcpy(p, &v, 2); }

static uint8_t *slot(void *page, unsigned i)
{
    return (uint8_t *)page + sizeof(struct header) + 2 * i;
}

static const uint8_t *cell(const void *page, unsigned i)
{
    const uint8_t *base = page;
    return base + rd16(base + sizeof(struct header) + 2 * i);
}

static size_t cell_size(const uint8_t *c) { return 4u + rd16(c) + rd16(c + 2); }

static int compare(const uint8_t *c, const void *key, size_t klen)
{
    size_t have = rd16(c);
    int r = memcmp(c + 4, key, have < klen ? have : klen);
    if (r)
        return r;
    return (have > klen) - (have < klen);
}

void page_init(void *page)
{
    memset(page, 0, BTREE_PAGE);
    hdr(page)->lower = sizeof(struct header);
    hdr(page)->upper = BTREE_PAGE;
}

/* First slot whose key is not less than `key`. */
unsigned page_lower_bound(const void *page, const void *key, size_t klen, bool *exact)
{
    unsigned lo = 0, hi = chdr(page)->nslots;

    *exact = false;
    while (lo < hi) {
        unsigned mid = lo + (hi - lo) / 2;
        int r = compare(cell(page, mid), key, klen);
        if (r < 0) {
            lo = mid + 1;
        } else {
            if (r == 0)
                *exact = true;
            hi = mid;
        }
    }
    return lo;
}

static void compact(void *page)
{
    uint8_t copy[BTREE_PAGE];
    struct header *h = hdr(page);
    uint16_t top = BTREE_PAGE;

    memcpy(copy, page, BTREE_PAGE);
    for (unsigned i = 0; i < h->nslots; i++) {
        const uint8_t *c = cell(copy, i);
        size_t n = cell_size(c);
        top -= n;
        memcpy((uint8_t *)page + top, c, n);
        wr16(slot(page, i), top);
    }
    h->upper = top;
    h->dead = 0;
    /* Stale bytes would make two replicas' checksums differ. */
    memset((uint8_t *)page + h->lower, 0, h->upper - h->lower);
}

enum page_result page_insert(void *page, const void *key, size_t klen, const void *val, size_t vlen)
{
    struct header *h = hdr(page);
    size_t need = 4 + klen + vlen;
    bool exact;

    /* At least four cells per page, or splitting could produce a half that is still too full. */
    if (need > BTREE_MAX_CELL)
        return PAGE_TOO_BIG;

    unsigned at = page_lower_bound(page, key, klen, &exact);
    if (exact)
        return PAGE_EXISTS;

    size_t gap = h->upper - h->lower;
    if (gap < need + 2) {
        if (gap + h->dead < need + 2)
            return PAGE_FULL;
        compact(page);
    }

    h->upper -= need;
    uint8_t *c = (uint8_t *)page + h->upper;
    wr16(c, klen);
    wr16(c + 2, vlen);
    memcpy(c + 4, key, klen);
    memcpy(c + 4 + klen, val, vlen);

    memmove(slot(page, at + 1), slot(page, at), 2 * (h->nslots - at));
    wr16(slot(page, at), h->upper);
    h->nslots++;
    h->lower += 2;
    return PAGE_OK;
}

bool page_remove(void *page, const void *key, size_t klen)
{
    struct header *h = hdr(page);
    bool exact;
    unsigned at = page_lower_bound(page, key, klen, &exact);

    if (!exact)
        return false;
    h->dead += cell_size(cell(page, at));
    memmove(slot(page, at), slot(page, at + 1), 2 * (h->nslots - at - 1));
    h->nslots--;
    h->lower -= 2;
    wr16((uint8_t *)page + h->lower, 0);
    return true;
}

/* Where to cut so that both halves hold about the same number of bytes. Rightmost inserts (an id that
 * only grows) are common enough to deserve their own rule: then the old page stays nine tenths full. */
unsigned page_split_point(const void *page, unsigned incoming, size_t incoming_size)
{
    const struct header *h = chdr(page);
    size_t total = BTREE_PAGE - h->upper - h->dead + incoming_size;
    size_t target = incoming == h->nslots ? total * 9 / 10 : total / 2;
    size_t sum = 0;
    unsigned i;

    for (i = 0; i < h->nslots; i++) {
        if (i == incoming)
            sum += incoming_size;
        sum += cell_size(cell(page, i));
        if (sum >= target)
            break;
    }
    if (i == 0)
        return 1;
    return i < h->nslots ? i : h->nslots - 1u;
}

/* For the checker. Returns NULL or what is wrong. */
const char *page_verify(const void *page)
{
    const struct header *h = chdr(page);
    size_t live = 0;

    if (h->lower != sizeof *h + 2u * h->nslots)
        return "lower bound does not match the slot count";
    if (h->upper < h->lower || h->upper > BTREE_PAGE)
        return "free space is inside out";
    for (unsigned i = 0; i < h->nslots; i++) {
        const uint8_t *c = cell(page, i);
        ptrdiff_t off = c - (const uint8_t *)page;
        if (off < h->upper || off + 4 > BTREE_PAGE || off + cell_size(c) > BTREE_PAGE)
            return "cell lies outside the heap";
        if (i && compare(cell(page, i - 1), c + 4, rd16(c)) >= 0)
            return "keys are out of order";
        live += cell_size(c);
    }
    return live + h->dead == (size_t)(BTREE_PAGE - h->upper) ? NULL : "heap accounting is off";
}
