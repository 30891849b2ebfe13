/*
 * Slab allocator for the nucleus.
 *
 * The page allocator hands out 4 KiB frames. Nearly everything the kernel wants is smaller than that
 * and comes in a handful of sizes (task, port, vm_region, timer), so each of those types gets a cache
 * of pages cut into equal cells.
 *
 *   page:  | struct slab | pad | cell 0 | cell 1 | ...            | cell n-1 |
 *
 * Because a slab is exactly one page and begins at its start, masking the low twelve bits of any cell's
 * address finds the slab header: kfree-style calls need no size and no lookup.
 *
 * Free cells are chained through their first word. The chain is not by pointer but by index, xored with a
 * per-boot secret, so a write after free is unlikely to produce a chain that still makes sense and is caught
 * by the range check in slab_alloc().
 *
 * Locking: one spinlock per cache, taken with interrupts disabled since timers are freed from the tick.
 */
#include <nucleus/kernel.h>
#include <nucleus/list.h>
#include <nucleus/page.h>
#include <nucleus/slab.h>
#include <nucleus/spinlock.h>
#include <nucleus/string.h>

#define SLAB_MAGIC      0x51abu
#define CELL_ALIGN      16u
#define END_OF_CHAIN    0xffffu
#define KEEP_EMPTY      2           /* empty slabs a cache may hoard before pages go back */

struct slab {
    struct list_node    node;       /* in cache->partial, ->full or ->empty */
    struct slab_cache   *cache;
    uint16_t            magic;
    uint16_t            in_use;
    uint16_t            first_free;
    uint16_t            pad;
};

static uint16_t chain_key;
static struct slab_cache cache_of_caches;

#define CELLS_OFFSET    ROUND_UP(sizeof(struct slab), CELL_ALIGN)

static inline struct slab *slab_of(const void *cell)
{
    return (struct slab *)((uintptr_t)cell & ~(uintptr_t)(PAGE_SIZE - 1));
}

static inline void *cell_at(const struct slab *s, unsigned index)
{
    return (char *)s + CELLS_OFFSET + index * s->cache->cell_size;
}

static inline unsigned index_of(const struct slab *s, const void *cell)
{
    return ((const char *)cell - (const char *)s - CELLS_OFFSET) / s->cache->cell_size;
}

static struct slab *slab_grow(struct slab_cache *c)
{
    struct slab *s = page_alloc(PAGE_NOWAIT);
    if (s == NULL)
        return NULL;

    s->cache = c;
    s->magic = SLAB_MAGIC;
    s->in_use = 0;
    s->first_free = 0;
    for (unsigned i = 0; i < c->per_slab; i++) {
        uint16_t next = i + 1 < c->per_slab ? i + 1 : END_OF_CHAIN;
        *(uint16_t *)cell_at(s, i) = next ^ chain_key;
    }
    list_add_head(&c->empty, &s->node);
    c->empty_count++;
    return s;
}

void *slab_alloc(struct slab_cache *c)
{
    irqflags_t flags = spin_lock_irqsave(&c->lock);
    struct slab *s;

    /* Partial slabs first: fill the holes, so that empty pages stay empty and can be returned. */
    if (!list_is_empty(&c->partial)) {
        s = LIST_FIRST(&c->partial, struct slab, node);
    } else {
        s = list_is_empty(&c->empty) ? slab_grow(c) : LIST_FIRST(&c->empty, struct slab, node);
        if (s == NULL) {
            c->failures++;
            spin_unlock_irqrestore(&c->lock, flags);
            return NULL;
        }
        c->empty_count--;
        list_move_head(&c->partial, &s->node);
    }

    unsigned index = s->first_free;
    if (index >= c->per_slab)
        panic("slab %s: free chain of %p leads to cell %u", c->name, s, index);

    void *cell = cell_at(s, index);
    s->first_free = *(uint16_t *)cell ^ chain_key;
    if (++s->in_use == c->per_slab)
        list_move_head(&c->full, &s->node);
    spin_unlock_irqrestore(&c->lock, flags);

    memset(cell, 0, c->object_size);
    return cell;
}

void slab_free(void *cell)
{
    if (cell == NULL)
        return;

    struct slab *s = slab_of(cell);
    if (s->magic != SLAB_MAGIC)
        panic("slab_free(%p): not a slab page", cell);

    struct slab_cache *c = s->cache;
    unsigned index = index_of(s, cell);
    if (index >= c->per_slab || cell_at(s, index) != cell)
        panic("slab %s: %p is not the start of a cell", c->name, cell);

    struct slab *surplus = NULL;
    irqflags_t flags = spin_lock_irqsave(&c->lock);

    if (s->in_use == 0)
        panic("slab %s: double free of %p", c->name, cell);
#ifdef CONFIG_SLAB_DEBUG
    memset(cell, 0x6b, c->cell_size);
#endif
    *(uint16_t *)cell = s->first_free ^ chain_key;
    s->first_free = index;

    if (s->in_use-- == c->per_slab)
        list_move_head(&c->partial, &s->node);
    if (s->in_use == 0) {
        list_move_head(&c->empty, &s->node);
        if (++c->empty_count > KEEP_EMPTY) {
            /* The oldest empty page, not this one: its cells are still warm in the data cache. */
            surplus = LIST_LAST(&c->empty, struct slab, node);
            list_remove(&surplus->node);
            c->empty_count--;
        }
    }
    spin_unlock_irqrestore(&c->lock, flags);

    if (surplus != NULL) {
        surplus->magic = 0;
        page_free(surplus);
    }
}

static void cache_setup(struct slab_cache *c, const char *name, size_t size)
{
    c->name = name;
    c->object_size = size;
    c->cell_size = ROUND_UP(MAX(size, sizeof(uint16_t)), CELL_ALIGN);
    c->per_slab = (PAGE_SIZE - CELLS_OFFSET) / c->cell_size;
    c->empty_count = 0;
    c->failures = 0;
    spin_init(&c->lock);
    list_init(&c->partial);
    list_init(&c->full);
    list_init(&c->empty);
    ASSERT(c->per_slab >= 1);
}

struct slab_cache *slab_cache_create(const char *name, size_t size)
{
    if (size > PAGE_SIZE - CELLS_OFFSET)
        return NULL;        /* such objects should take whole pages */

    struct slab_cache *c = slab_alloc(&cache_of_caches);
    if (c != NULL)
        cache_setup(c, name, size);
    return c;
}

void slab_init(uint32_t boot_entropy)
{
    chain_key = (uint16_t)(boot_entropy ^ boot_entropy >> 16) | 0x8000u;
    cache_setup(&cache_of_caches, "slab_cache", sizeof(struct slab_cache));
}
