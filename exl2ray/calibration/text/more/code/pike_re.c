/* pike_re.c -- a small regular expression matcher that never goes exponential.
 *
 * Syntax: literals, ., [set], [^set], *, +, ?, |, ( ), ^ at the start, $ at the end, \ to quote.
 * Compiles to a program for a two-list simulation: time is O(program * text), memory O(program).
 * No captures; the routing table only asks yes or no.
 */
#include "pike_re.h"

#include <stdlib.h>
#include <string.h>

enum op { CHAR, ANY, SET, SPLIT, JMP, BOL, EOL, MATCH };

typedef struct inst {
	unsigned char op;
	unsigned char c;
	short x, y;		/* branch targets; for SET, x is the set number */
} inst;

struct pike_re {
	inst *prog;
	int n, cap;
	unsigned char (*sets)[32];
	int nsets;
};

typedef struct parser {
	const unsigned char *p;
	pike_re *re;
	int depth;
	const char *err;
} parser;

#define MAX_DEPTH	64
#define MAX_PROG	4000

static int emit(parser *ps, int op, int c, int x, int y)
{
	pike_re *re = ps->re;

	if (ps->err)
		return 0;
	if (re->n == re->cap) {
		int cap = re->cap ? re->cap * 2 : 32;
		inst *bigger = realloc(re->prog, (size_t)cap * sizeof *bigger);

		if (!bigger || cap > 2 * MAX_PROG) {
			if (bigger)
				re->prog = bigger;
			ps->err = bigger ? "pattern too long" : "out of memory";
			return 0;
		}
		re->prog = bigger;
		re->cap = cap;
	}
	re->prog[re->n] = (inst){ (unsigned char)op, (unsigned char)c, (short)x, (short)y };
	return re->n++;
}

/* Make room for one instruction at `at` and shift the branch targets behind it. */
static void insert_split(parser *ps, int at)
{
	pike_re *re = ps->re;
	int i;

	emit(ps, JMP, 0, 0, 0);
	if (ps->err)
		return;
	memmove(re->prog + at + 1, re->prog + at, (size_t)(re->n - 1 - at) * sizeof(inst));
	for (i = at + 1; i < re->n; i++) {
		inst *in = &re->prog[i];

		if (in->op == SPLIT || in->op == JMP) {
			if (in->x >= at)
				in->x++;
			if (in->op == SPLIT && in->y >= at)
				in->y++;
		}
	}
	re->prog[at] = (inst){ SPLIT, 0, (short)(at + 1), 0 };
}

static void parse_set(parser *ps)
{
	pike_re *re = ps->re;
	unsigned char set[32] = { 0 };
	int negate = 0, first = 1, i;
	void *more;

	if (*ps->p == '^') {
		negate = 1;
		ps->p++;
	}
	/* A ] directly after the bracket is an ordinary member. */
	for (; *ps->p && (*ps->p != ']' || first); first = 0) {
		int lo = *ps->p++, hi = lo;

		if (lo == '\\' && *ps->p)
			lo = hi = *ps->p++;
		if (ps->p[0] == '-' && ps->p[1] && ps->p[1] != ']') {
			hi = ps->p[1];
			ps->p += 2;
			if (hi < lo) {
				ps->err = "range is upside down";
				return;
			}
		}
		for (; lo <= hi; lo++)
			set[lo >> 3] |= (unsigned char)(1 << (lo & 7));
	}
	if (*ps->p++ != ']') {
		ps->p--;
		ps->err = "missing ]";
		return;
	}
	if (negate)
		for (i = 0; i < 32; i++)
			set[i] = (unsigned char)~set[i];
	more = realloc(re->sets, (size_t)(re->nsets + 1) * sizeof *re->sets);
	if (!more) {
		ps->err = "out of memory";
		return;
	}
	re->sets = more;
	memcpy(re->sets[re->nsets], set, sizeof set);
	emit(ps, SET, 0, re->nsets++, 0);
}

static void parse_alt(parser *ps);

static void parse_atom(parser *ps)
{
	int c = *ps->p++;

	switch (c) {
	case '(':
		if (++ps->depth > MAX_DEPTH) {
			ps->err = "nested too deeply";
			return;
		}
		parse_alt(ps);
		ps->depth--;
		if (!ps->err && *ps->p++ != ')')
			ps->err = "missing )";
		return;
	case '[':
		parse_set(ps);
		return;
	case '.':
		emit(ps, ANY, 0, 0, 0);
		return;
	case '^':
		emit(ps, BOL, 0, 0, 0);
		return;
	case '$':
		emit(ps, EOL, 0, 0, 0);
		return;
	case '*': case '+': case '?':
		ps->err = "nothing to repeat";
		return;
	case '\\':
		if (*ps->p == '\0') {
			ps->err = "lone backslash at the end";
			return;
		}
		c = *ps->p++;
		/* fall through */
	default:
		emit(ps, CHAR, c, 0, 0);
	}
}

static void parse_concat(parser *ps)
{
	while (!ps->err && *ps->p && *ps->p != '|' && *ps->p != ')') {
		int at = ps->re->n;

		parse_atom(ps);
		while (!ps->err && *ps->p && strchr("*+?", *ps->p)) {
			int c = *ps->p++;

			if (c == '+') {
				emit(ps, SPLIT, 0, at, ps->re->n + 1);
				continue;
			}
			insert_split(ps, at);
			if (ps->err)
				return;
			if (c == '*')
				emit(ps, JMP, 0, at, 0);
			if (!ps->err)
				ps->re->prog[at].y = (short)ps->re->n;
		}
	}
}

static void parse_alt(parser *ps)
{
	int at = ps->re->n;

	parse_concat(ps);
	if (!ps->err && *ps->p == '|') {
		int jump;

		ps->p++;
		insert_split(ps, at);
		jump = emit(ps, JMP, 0, 0, 0);
		if (ps->err)
			return;
		ps->re->prog[at].y = (short)ps->re->n;
		parse_alt(ps);
		if (!ps->err)
			ps->re->prog[jump].x = (short)ps->re->n;
	}
}

pike_re *pike_compile(const char *pattern, const char **err)
{
	pike_re *re = calloc(1, sizeof *re);
	parser ps = { (const unsigned char *)pattern, re, 0, NULL };

	if (!re) {
		*err = "out of memory";
		return NULL;
	}
	parse_alt(&ps);
	if (!ps.err && *ps.p == ')')
		ps.err = "unexpected )";
	emit(&ps, MATCH, 0, 0, 0);
	if (ps.err) {
		*err = ps.err;
		pike_free(re);
		return NULL;
	}
	return re;
}

typedef struct list {
	int n;
	short *pc;
} list;

/* Follow the instructions that consume nothing. mark[] holds the step number at which a pc was last
 * added, so the lists never need clearing and (a*)* cannot loop. */
static void add(const pike_re *re, list *l, unsigned *mark, unsigned step, int pc, int bol, int eol)
{
	const inst *in;

	if (mark[pc] == step)
		return;
	mark[pc] = step;
	in = &re->prog[pc];
	switch (in->op) {
	case JMP:
		add(re, l, mark, step, in->x, bol, eol);
		break;
	case SPLIT:
		add(re, l, mark, step, in->x, bol, eol);
		add(re, l, mark, step, in->y, bol, eol);
		break;
	case BOL:
		if (bol)
			add(re, l, mark, step, pc + 1, bol, eol);
		break;
	case EOL:
		if (eol)
			add(re, l, mark, step, pc + 1, bol, eol);
		break;
	default:
		l->pc[l->n++] = (short)pc;
	}
}

int pike_search(const pike_re *re, const char *text, size_t len)
{
	size_t bytes = (size_t)re->n * (2 * sizeof(short) + sizeof(unsigned));
	unsigned *mark = calloc(1, bytes);
	list cur, nxt, swap;
	size_t i;
	int k, result = 0;

	if (!mark)
		return -1;
	cur.pc = (short *)(mark + re->n);
	nxt.pc = cur.pc + re->n;
	cur.n = 0;
	for (i = 0; ; i++) {
		unsigned step = (unsigned)i + 1;

		/* unanchored search: start a new thread at every position */
		add(re, &cur, mark, step, 0, i == 0, i == len);
		nxt.n = 0;
		for (k = 0; k < cur.n; k++)
			if (re->prog[cur.pc[k]].op == MATCH) {
				result = 1;
				goto out;
			}
		if (i == len)
			break;
		for (k = 0; k < cur.n; k++) {
			const inst *in = &re->prog[cur.pc[k]];
			unsigned char c = (unsigned char)text[i];

			if (in->op == ANY || (in->op == CHAR && in->c == c) ||
			    (in->op == SET && re->sets[in->x][c >> 3] >> (c & 7) & 1))
				add(re, &nxt, mark, step + 1, cur.pc[k] + 1, 0, i + 1 == len);
		}
		swap = cur;
		cur = nxt;
		nxt = swap;
	}
out:
	free(mark);
	return result;
}

void pike_free(pike_re *re)
{
	if (re) {
		free(re->prog);
		free(re->sets);
		free(re);
	}
}
