/*
 * pouch - TLSF-style allocator for the flight recorder's audio ring
 *
 * Two-level segregated fit: the first level is the power of two of the size, the second cuts each power into
 * sixteen. Two bitmaps find a list that is certainly big enough, so both calls take bounded time. Neighbours
 * are merged at once. No locks; one pool belongs to one task.
 */
#include "pouch.h"

#include <stdalign.h>
#include <stdint.h>
#include <string.h>

#define SL_BITS		4
#define SL_COUNT	(1u << SL_BITS)
#define ALIGN_BITS	3
#define FL_SHIFT	(SL_BITS + ALIGN_BITS)		/* below 128 bytes there is a single first level */
#define FL_COUNT	(POUCH_MAX_BITS - FL_SHIFT + 1)
#define SMALL		(1u << FL_SHIFT)

#define FREE_BIT	1u
#define PREV_FREE_BIT	2u
#define FLAGS		3u

struct block {
	struct block *prev_phys;	/* only valid while the block before is free */
	uint32_t size;			/* of the payload; lowest bits are flags */
	struct block *next_free;	/* these two lie in the payload */
	struct block *prev_free;
};

#define OVERHEAD	sizeof(uint32_t)
#define PAYLOAD_OFF	(offsetof(struct block, size) + sizeof(size_t))
#define MIN_PAYLOAD	(sizeof(struct block) - PAYLOAD_OFF + sizeof(void *))

struct pouch {
	struct block null;		/* every empty list points here, which saves the tests for NULL */
	uint32_t fl_map;
	uint32_t sl_map[FL_COUNT];
	struct block *list[FL_COUNT][SL_COUNT];
	size_t in_use, peak;
};

static inline size_t size_of(const struct block *b)	{ return b->size & ~FLAGS; }
static inline int is_free(const struct block *b)	{ return b->size & FREE_BIT; }
static inline void *payload(struct block *b)		{ return (char *)b + PAYLOAD_OFF; }
static inline struct block *block_of(void *p)		{ return (struct block *)((char *)p - PAYLOAD_OFF); }

static inline struct block *next_phys(struct block *b)
{
	/* the next header overlaps our last word, where its prev_phys is */
	return (struct block *)((char *)payload(b) + size_of(b) - sizeof(void *));
}

static void set_size(struct block *b, size_t n) { b->size = (uint32_t)n | (b->size & FLAGS); }

static inline int top_bit(uint32_t v) { return 31 - __builtin_clz(v); }
static inline int low_bit(uint32_t v) { return __builtin_ctz(v); }

static void classify(size_t size, int *fl, int *sl)
{
	if (size < SMALL) {
		*fl = 0;
		*sl = (int)(size / (SMALL / SL_COUNT));
	} else {
		int t = top_bit((uint32_t)size);

		*sl = (int)(size >> (t - SL_BITS)) ^ (int)SL_COUNT;
		*fl = t - (FL_SHIFT - 1);
	}
}

/* Rounded up to the next class border: the head of any list found then fits without being looked at. */
static size_t round_for_search(size_t size)
{
	return size < SMALL ? size : size + (1u << (top_bit((uint32_t)size) - SL_BITS)) - 1;
}

static void unlink_free(struct pouch *p, struct block *b)
{
	int fl, sl;

	classify(size_of(b), &fl, &sl);
	b->next_free->prev_free = b->prev_free;
	b->prev_free->next_free = b->next_free;
	if (p->list[fl][sl] == b) {
		p->list[fl][sl] = b->next_free;
		if (b->next_free == &p->null) {
			p->sl_map[fl] &= ~(1u << sl);
			if (!p->sl_map[fl])
				p->fl_map &= ~(1u << fl);
		}
	}
}

static void link_free(struct pouch *p, struct block *b)
{
	int fl, sl;

	classify(size_of(b), &fl, &sl);
	b->next_free = p->list[fl][sl];
	b->prev_free = &p->null;
	p->list[fl][sl]->prev_free = b;
	p->list[fl][sl] = b;
	p->fl_map |= 1u << fl;
	p->sl_map[fl] |= 1u << sl;
}

static struct block *find(struct pouch *p, size_t size)
{
	uint32_t map;
	int fl, sl;

	classify(round_for_search(size), &fl, &sl);
	if (fl >= (int)FL_COUNT)
		return NULL;
	map = p->sl_map[fl] & (~0u << sl);
	if (!map) {
		uint32_t higher = fl + 1 < 32 ? p->fl_map & (~0u << (fl + 1)) : 0;

		if (!higher)
			return NULL;
		fl = low_bit(higher);
		map = p->sl_map[fl];
	}
	return p->list[fl][low_bit(map)];
}

static void mark(struct block *b, int is_now_free)
{
	struct block *n = next_phys(b);

	if (is_now_free) {
		b->size |= FREE_BIT;
		n->size |= PREV_FREE_BIT;
		n->prev_phys = b;
	} else {
		b->size &= ~FREE_BIT;
		n->size &= ~PREV_FREE_BIT;
	}
}

void *pouch_take(struct pouch *p, size_t want)
{
	struct block *b;
	size_t size;

	if (want == 0 || want > ((size_t)1 << POUCH_MAX_BITS) - SMALL)
		return NULL;
	size = (want + 7) & ~(size_t)7;
	if (size < MIN_PAYLOAD)
		size = MIN_PAYLOAD;
	b = find(p, size);
	if (!b)
		return NULL;
	unlink_free(p, b);

	if (size_of(b) >= size + OVERHEAD + MIN_PAYLOAD + 8) {
		struct block *rest = (struct block *)((char *)payload(b) + size - sizeof(void *));

		rest->size = 0;
		set_size(rest, size_of(b) - size - sizeof(size_t));
		set_size(b, size);
		mark(rest, 1);
		link_free(p, rest);
	}
	mark(b, 0);
	p->in_use += size_of(b);
	if (p->in_use > p->peak)
		p->peak = p->in_use;
	return payload(b);
}

void pouch_give(struct pouch *p, void *mem)
{
	struct block *b, *n;

	if (!mem)
		return;
	b = block_of(mem);
	if (is_free(b))
		pouch_panic("given back twice", mem);
	p->in_use -= size_of(b);

	if (b->size & PREV_FREE_BIT) {
		struct block *before = b->prev_phys;

		unlink_free(p, before);
		set_size(before, size_of(before) + size_of(b) + sizeof(size_t));
		b = before;
	}
	n = next_phys(b);
	if (is_free(n)) {
		unlink_free(p, n);
		set_size(b, size_of(b) + size_of(n) + sizeof(size_t));
	}
	mark(b, 1);
	link_free(p, b);
}

struct pouch *pouch_make(void *mem, size_t bytes)
{
	struct pouch *p = mem;
	struct block *b, *sentinel;
	size_t i, j, room;

	if ((uintptr_t)mem % alignof(max_align_t) || bytes < sizeof *p + 256)
		return NULL;
	memset(p, 0, sizeof *p);
	p->null.next_free = p->null.prev_free = &p->null;
	for (i = 0; i < FL_COUNT; i++)
		for (j = 0; j < SL_COUNT; j++)
			p->list[i][j] = &p->null;

	room = (bytes - sizeof *p - 2 * sizeof(size_t)) & ~(size_t)7;
	b = (struct block *)((char *)(p + 1) - offsetof(struct block, size));
	b->size = 0;
	set_size(b, room);
	sentinel = next_phys(b);
	sentinel->size = 0;		/* never free, so nothing merges past the end */
	mark(b, 1);
	link_free(p, b);
	return p;
}
