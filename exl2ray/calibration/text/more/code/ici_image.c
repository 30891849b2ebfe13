/* ici.c - reader and writer of ICI, the image format of the ticket printers (1, 2 or 4 levels of grey)
 *
 * File:
 *	"ICI" version(1)  width(2) height(2)  bits(1) flags(1)  rows...
 *
 * Each row starts with a command byte:
 *	00		same as the row above
 *	01		all paper
 *	02 n		n more rows are the same as this one (only directly behind a row)
 *	10..1F		packed by nibble runs, low nibble is the predictor
 *	20		raw
 *
 * All numbers big endian; the printers have a 6809 in them.
 */
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ici.h"

typedef unsigned char byte;

struct in { const byte *p, *end; int bad; };
struct out { byte *base; size_t n, cap; int bad; };

static int get(struct in *in)
{
	if (in->p < in->end)
		return *in->p++;
	in->bad = 1;
	return 0;
}

static void put(struct out *o, int c)
{
	if (o->n == o->cap) {
		size_t cap = o->cap ? o->cap * 2 : 512;
		byte *b = realloc(o->base, cap);

		if (!b) {
			o->bad = 1;
			return;
		}
		o->base = b;
		o->cap = cap;
	}
	o->base[o->n++] = (byte)c;
}

/* The predictors. Rows are bytes of packed pixels, so they work on several pixels at once. */
enum { PRED_NONE, PRED_UP, PRED_LEFT, PRED_UPLEFT, PRED_DITHER, NPRED };

static byte predict(int kind, const byte *above, const byte *row, size_t i)
{
	switch (kind) {
	case PRED_UP:     return above[i];
	case PRED_LEFT:   return i ? row[i - 1] : 0;
	case PRED_UPLEFT: return i ? (byte)(above[i - 1] << 4 | above[i] >> 4) : (byte)(above[i] >> 4);
	case PRED_DITHER: return (byte)(above[i] << 1 | above[i] >> 7);	/* ordered dither shifts by one each row */
	}
	return 0;
}

/* Residuals as runs. A control nibble: 0..7 = so many + 1 zero bytes, 8..15 = so many - 7 literal bytes. */
static void pack_row(struct out *o, int kind, const byte *above, const byte *row, size_t n)
{
	byte res[ICI_MAX_ROW], ctl[2 * ICI_MAX_ROW];
	size_t i, nctl = 0, at;

	for (i = 0; i < n; i++)
		res[i] = row[i] ^ predict(kind, above, row, i);

	put(o, 0x10 | kind);
	/* The control nibbles go in front, two to a byte, and the literals behind, where a run of printable
	 * bytes stays readable in a hex dump. */
	for (i = 0; i < n; ) {
		size_t j = i;
		int zero = res[i] == 0;

		while (j < n && j - i < 8 && (res[j] == 0) == zero)
			j++;
		ctl[nctl++] = (byte)((zero ? 0 : 8) + (j - i - 1));
		i = j;
	}
	put(o, (int)(nctl >> 8));
	put(o, (int)(nctl & 255));
	for (at = 0; at < nctl; at += 2)
		put(o, ctl[at] << 4 | (at + 1 < nctl ? ctl[at + 1] : 0));
	for (i = 0; i < n; i++)
		if (res[i])
			put(o, res[i]);
}

static void unpack_row(struct in *in, int kind, const byte *above, byte *row, size_t n)
{
	size_t nctl = (size_t)get(in) << 8, i, k = 0;
	const byte *ctl;

	nctl |= (size_t)get(in);
	if ((size_t)(in->end - in->p) < (nctl + 1) / 2) {
		in->bad = 1;
		return;
	}
	ctl = in->p;
	in->p += (nctl + 1) / 2;
	for (i = 0; i < nctl && !in->bad; i++) {
		int c = i & 1 ? ctl[i / 2] & 15 : ctl[i / 2] >> 4;
		int run = (c & 7) + 1;

		for (; run > 0; run--, k++) {
			if (k == n) {
				in->bad = 1;	/* longer than the row: damaged, or somebody tries it on */
				return;
			}
			row[k] = (byte)(predict(kind, above, row, k) ^ (c & 8 ? get(in) : 0));
		}
	}
	if (k != n)
		in->bad = 1;
}

static size_t trial(int kind, const byte *above, const byte *row, size_t n)
{
	struct out o = { 0 };
	size_t len;

	pack_row(&o, kind, above, row, n);
	len = o.bad ? SIZE_MAX : o.n;
	free(o.base);
	return len;
}

int ici_write(const struct ici *im, byte **data, size_t *len)
{
	static const byte paper[ICI_MAX_ROW];
	size_t n = ICI_ROW_BYTES(im), y;
	const byte *above = paper;
	struct out o = { 0 };

	if (n > ICI_MAX_ROW || im->height > 0xffff)
		return ICI_TOO_LARGE;
	put(&o, 'I'); put(&o, 'C'); put(&o, 'I'); put(&o, 2);
	put(&o, (int)(im->width >> 8)); put(&o, (int)(im->width & 255));
	put(&o, (int)(im->height >> 8)); put(&o, (int)(im->height & 255));
	put(&o, im->bits); put(&o, 0);

	for (y = 0; y < im->height; ) {
		const byte *row = im->pixels + y * n;
		size_t same = 0, best = n + 1;
		int k, kind = -1;

		if (!memcmp(row, paper, n))
			put(&o, 0x01);
		else if (!memcmp(row, above, n))
			put(&o, 0x00);
		else {
			for (k = 0; k < NPRED; k++) {
				size_t t = trial(k, above, row, n);

				if (t < best) {
					best = t;
					kind = k;
				}
			}
			if (kind >= 0)
				pack_row(&o, kind, above, row, n);
			else {
				size_t i;

				put(&o, 0x20);
				for (i = 0; i < n; i++)
					put(&o, row[i]);
			}
		}
		while (same < 255 && y + 1 + same < im->height && !memcmp(row, row + (same + 1) * n, n))
			same++;
		if (same >= 2) {
			put(&o, 0x02);
			put(&o, (int)same);
			y += same;
		}
		above = im->pixels + y * n;
		y++;
	}
	if (o.bad) {
		free(o.base);
		return ICI_NO_MEMORY;
	}
	*data = o.base;
	*len = o.n;
	return ICI_OK;
}

int ici_read(struct ici *im, const byte *data, size_t len)
{
	static const byte paper[ICI_MAX_ROW];
	struct in in = { data, data + len, 0 };
	const byte *above = paper;
	size_t n, y;

	if (len < 10 || memcmp(data, "ICI\2", 4))
		return ICI_NOT_ICI;
	im->width = (unsigned)data[4] << 8 | data[5];
	im->height = (unsigned)data[6] << 8 | data[7];
	im->bits = data[8];
	in.p += 10;
	if (im->bits != 1 && im->bits != 2 && im->bits != 4)
		return ICI_DAMAGED;
	n = ICI_ROW_BYTES(im);
	if (n == 0 || n > ICI_MAX_ROW || im->height == 0)
		return ICI_DAMAGED;
	if (!(im->pixels = malloc(n * im->height)))
		return ICI_NO_MEMORY;

	for (y = 0; y < im->height && !in.bad; y++) {
		byte *row = im->pixels + y * n;
		int cmd = get(&in);

		if (cmd == 0x02) {
			int k = get(&in);

			if (y == 0 || (size_t)k > im->height - y) {
				in.bad = 1;
				break;
			}
			while (k--) {
				memcpy(row, above, n);
				above = row;
				row += n;
				y++;
			}
			y--;		/* the loop counts once more */
			continue;
		}
		if (cmd == 0x00)
			memcpy(row, above, n);
		else if (cmd == 0x01)
			memset(row, 0, n);
		else if (cmd >= 0x10 && cmd < 0x10 + NPRED)
			unpack_row(&in, cmd & 15, above, row, n);
		else if (cmd == 0x20 && (size_t)(in.end - in.p) >= n) {
			memcpy(row, in.p, n);
			in.p += n;
		} else
			in.bad = 1;
		above = row;
	}
	if (in.bad) {
		free(im->pixels);
		im->pixels = NULL;
		return ICI_DAMAGED;
	}
	return ICI_OK;
}
