/*-
 * A hash set of 64-bit keys with hopscotch probing.
 *
 * Every key lives within HOP slots of its home, and the home slot carries a bitmap
 * saying which of those neighbours belong to it.  Lookup therefore touches one or
 * two cache lines at any load up to about 90 %.  Zero is a legal key.
 *
 * Not thread-safe.  Iteration order is arbitrary and changes on growth.
 */
#include <sys/types.h>

#include <assert.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "hopscotch.h"

#define HOP		32
#define ADD_RANGE	(HOP * 16)	/* how far to look for a free slot */
#define MINBITS		6

struct hs_slot {
	uint64_t key;
	uint32_t hop;			/* bit i: slot home+i holds one of mine */
	uint32_t used;
};

struct hs {
	struct hs_slot *tab;		/* 1 << bits slots, then HOP + ADD_RANGE of slack */
	size_t count;
	unsigned bits;
};

/* Fibonacci hashing alone is weak for keys that differ only in the high bits. */
static inline size_t
hs_home(const struct hs *h, uint64_t key)
{
	key ^= key >> 32;
	return (size_t)(key * 0x9e3779b97f4a7c15ull >> (64 - h->bits));
}

static inline size_t
hs_slots(const struct hs *h)
{
	return ((size_t)1 << h->bits) + HOP + ADD_RANGE;
}

struct hs *
hs_new(size_t expect)
{
	struct hs *h = malloc(sizeof(*h));

	if (h == NULL)
		return NULL;
	h->bits = MINBITS;
	while (((size_t)1 << h->bits) < expect + expect / 8)
		h->bits++;
	h->count = 0;
	h->tab = calloc(hs_slots(h), sizeof(*h->tab));
	if (h->tab == NULL) {
		free(h);
		return NULL;
	}
	return h;
}

void
hs_destroy(struct hs *h)
{
	if (h == NULL)
		return;
	free(h->tab);
	free(h);
}

static struct hs_slot *
hs_find(const struct hs *h, uint64_t key)
{
	struct hs_slot *home = &h->tab[hs_home(h, key)];
	uint32_t hop;

	for (hop = home->hop; hop != 0; hop &= hop - 1) {
		struct hs_slot *s = home + __builtin_ctz(hop);

		if (s->key == key)
			return s;
	}
	return NULL;
}

bool
hs_has(const struct hs *h, uint64_t key)
{
	return hs_find(h, key) != NULL;
}

/*
 * Move the hole at *freep closer to the beginning by swapping it with a key whose
 * home permits the exchange.  Returns false if nobody in reach can move.
 */
static bool
hs_hop_closer(struct hs *h, size_t *freep)
{
	size_t at;

	for (at = *freep < HOP - 1 ? 0 : *freep - (HOP - 1); at < *freep; at++) {
		struct hs_slot *home = &h->tab[at];
		unsigned dist = (unsigned)(*freep - at);
		unsigned first;

		if (home->hop == 0)
			continue;
		first = (unsigned)__builtin_ctz(home->hop);
		if (first >= dist)
			continue;
		h->tab[*freep].key = home[first].key;
		h->tab[*freep].used = 1;
		home[first].used = 0;
		home->hop &= ~(UINT32_C(1) << first);
		home->hop |= UINT32_C(1) << dist;
		*freep = at + first;
		return true;
	}
	return false;
}

static int
hs_insert(struct hs *h, uint64_t key)
{
	size_t home = hs_home(h, key);
	size_t hole, end = home + ADD_RANGE;

	for (hole = home; hole < end && h->tab[hole].used; hole++)
		continue;
	if (hole == end)
		return HS_FULL;
	while (hole - home >= HOP)
		if (!hs_hop_closer(h, &hole))
			return HS_FULL;
	h->tab[hole].key = key;
	h->tab[hole].used = 1;
	h->tab[home].hop |= UINT32_C(1) << (hole - home);
	h->count++;
	return HS_ADDED;
}

static int
hs_grow(struct hs *h)
{
	struct hs bigger = { .bits = h->bits };
	size_t i;

again:
	/*
	 * Almost always one doubling is enough.  Several mean that the keys collide
	 * by construction; stop before the table eats the machine.
	 */
	if (++bigger.bits > h->bits + 4 || bigger.bits > 40)
		return HS_NOMEM;
	bigger.count = 0;
	bigger.tab = calloc(hs_slots(&bigger), sizeof(*bigger.tab));
	if (bigger.tab == NULL)
		return HS_NOMEM;
	for (i = 0; i < hs_slots(h); i++) {
		if (h->tab[i].used && hs_insert(&bigger, h->tab[i].key) == HS_FULL) {
			free(bigger.tab);
			goto again;
		}
	}
	assert(bigger.count == h->count);
	free(h->tab);
	*h = bigger;
	return HS_OK;
}

int
hs_add(struct hs *h, uint64_t key)
{
	int rc;

	if (hs_find(h, key) != NULL)
		return HS_PRESENT;
	while ((rc = hs_insert(h, key)) == HS_FULL)
		if ((rc = hs_grow(h)) != HS_OK)
			return rc;
	return rc;
}

bool
hs_remove(struct hs *h, uint64_t key)
{
	struct hs_slot *s = hs_find(h, key);
	size_t home;

	if (s == NULL)
		return false;
	home = hs_home(h, key);
	s->used = 0;
	h->tab[home].hop &= ~(UINT32_C(1) << (s - &h->tab[home]));
	h->count--;
	return true;
}

size_t
hs_count(const struct hs *h)
{
	return h->count;
}

/* Start with *cookie = 0.  Removing the key just returned is allowed, adding is not. */
bool
hs_next(const struct hs *h, size_t *cookie, uint64_t *key)
{
	while (*cookie < hs_slots(h)) {
		const struct hs_slot *s = &h->tab[(*cookie)++];

		if (s->used) {
			*key = s->key;
			return true;
		}
	}
	return false;
}
