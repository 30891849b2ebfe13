/*
 * tree.c - the layout of one desktop as a binary tree
 *
 * Inner nodes split their rectangle, leaves hold one window each (or none:
 * a receptacle, waiting for a window that was promised).  Nothing in here
 * talks to the server; apply_layout() hands rectangles to a callback.
 */
#include <limits.h>
#include <stdbool.h>
#include <stdlib.h>

#include "tree.h"
#include "log.h"

#define MIN_RATIO 0.08

node_t *make_leaf(client_t *c)
{
	node_t *n = calloc(1, sizeof *n);

	if (!n)
		die("out of memory for a node");
	n->ratio = 0.5;
	n->client = c;
	return n;
}

static bool is_leaf(const node_t *n)
{
	return !n->kid[0];
}

static int which_kid(const node_t *n)
{
	return n->up->kid[1] == n;
}

/* Windows that float or are hidden leave their place to the sibling. */
static bool takes_space(const node_t *n)
{
	if (!is_leaf(n))
		return takes_space(n->kid[0]) || takes_space(n->kid[1]);
	return !n->client || (!n->client->floating && !n->client->hidden);
}

/* Split the leaf `at` and put `n` on the given side of it. */
void insert_beside(desktop_t *d, node_t *at, node_t *n, enum side side)
{
	node_t *fork = make_leaf(NULL);
	int second = side == RIGHT || side == BELOW;

	fork->axis = side == LEFT || side == RIGHT ? ACROSS : DOWN;
	fork->up = at->up;
	if (at->up)
		at->up->kid[which_kid(at)] = fork;
	else
		d->root = fork;

	fork->kid[second] = n;
	fork->kid[!second] = at;
	n->up = at->up = fork;
	d->focus = n;
}

/*
 * Take a leaf out.  Its sibling moves up into the place of the fork.  The
 * focus goes to the leaf that will cover most of the gap, i.e. the nearest
 * one on the side of the sibling.
 */
void take_out(desktop_t *d, node_t *n)
{
	node_t *fork = n->up, *sib;

	if (!fork) {
		d->root = d->focus = NULL;
		return;
	}

	sib = fork->kid[!which_kid(n)];
	sib->up = fork->up;
	if (fork->up)
		fork->up->kid[which_kid(fork)] = sib;
	else
		d->root = sib;

	if (d->focus == n) {
		int near = which_kid(n);

		while (!is_leaf(sib))
			sib = sib->kid[sib->axis == fork->axis ? near : 0];
		d->focus = sib;
	}
	n->up = NULL;
	free(fork);
}

static rect_t shrink(rect_t r, int by)
{
	r.x += by;
	r.y += by;
	r.w = r.w > 2 * by ? r.w - 2 * by : 1;
	r.h = r.h > 2 * by ? r.h - 2 * by : 1;
	return r;
}

void apply_layout(node_t *n, rect_t r, int gap, place_fn *place)
{
	rect_t a = r, b = r;

	if (!n)
		return;
	n->rect = r;
	if (is_leaf(n)) {
		if (n->client && takes_space(n))
			place(n->client, shrink(r, gap + n->client->border));
		return;
	}

	if (!takes_space(n->kid[0])) {
		apply_layout(n->kid[1], r, gap, place);
		return;
	}
	if (!takes_space(n->kid[1])) {
		apply_layout(n->kid[0], r, gap, place);
		return;
	}

	if (n->axis == ACROSS) {
		a.w = r.w * n->ratio;
		b.x += a.w;
		b.w -= a.w;
	} else {
		a.h = r.h * n->ratio;
		b.y += a.h;
		b.h -= a.h;
	}
	apply_layout(n->kid[0], a, gap, place);
	apply_layout(n->kid[1], b, gap, place);
}

/* Move the edge of `n` that faces `side` by `px` pixels, if there is one. */
bool drag_edge(node_t *n, enum side side, int px)
{
	enum axis axis = side == LEFT || side == RIGHT ? ACROSS : DOWN;
	int far = side == RIGHT || side == BELOW;
	node_t *up;
	double total, ratio;

	for (; (up = n->up); n = up)
		if (up->axis == axis && which_kid(n) != far)
			break;
	if (!up)
		return false;

	total = axis == ACROSS ? up->rect.w : up->rect.h;
	ratio = up->ratio + px / total;
	if (ratio < MIN_RATIO || ratio > 1 - MIN_RATIO)
		return false;
	up->ratio = ratio;
	return true;
}

static void leaves(node_t *n, void (*f)(node_t *, void *), void *arg)
{
	if (!n)
		return;
	if (is_leaf(n)) {
		f(n, arg);
		return;
	}
	leaves(n->kid[0], f, arg);
	leaves(n->kid[1], f, arg);
}

struct hunt {
	const node_t *from;
	enum side side;
	node_t *best;
	long score;
};

/*
 * Neighbour in a direction: must lie beyond our edge and overlap our span.
 * Distance counts first; among equals the one used last wins.
 */
static void consider(node_t *n, void *arg)
{
	struct hunt *h = arg;
	const rect_t *a = &h->from->rect, *b = &n->rect;
	long dist = 0, score;

	if (n == h->from || !n->client || n->client->hidden)
		return;

	switch (h->side) {
	case LEFT:  dist = a->x - (b->x + b->w); break;
	case RIGHT: dist = b->x - (a->x + a->w); break;
	case ABOVE: dist = a->y - (b->y + b->h); break;
	case BELOW: dist = b->y - (a->y + a->h); break;
	}
	if (dist < 0)
		return;
	if (h->side == LEFT || h->side == RIGHT) {
		if (b->y >= a->y + a->h || a->y >= b->y + b->h)
			return;
	} else if (b->x >= a->x + a->w || a->x >= b->x + b->w)
		return;

	score = dist * 4096 - (n->client->last_focus & 4095);
	if (score < h->score) {
		h->score = score;
		h->best = n;
	}
}

node_t *neighbour(desktop_t *d, node_t *from, enum side side)
{
	struct hunt h = { from, side, NULL, LONG_MAX };

	leaves(d->root, consider, &h);
	return h.best;
}

/* Give every window the same share, whatever the shape of the tree. */
int even_out(node_t *n)
{
	int a, b;

	if (!n || !takes_space(n))
		return 0;
	if (is_leaf(n))
		return 1;
	a = even_out(n->kid[0]);
	b = even_out(n->kid[1]);
	if (a && b)
		n->ratio = (double)a / (a + b);
	return a + b;
}
