/* lexer for "gantry", the motion script of the wood router
 *
 *	feed 1200 mm/min
 *	pocket { depth 6mm; step 40% }
 *	repeat 4 { rotate 90deg; call corner }
 *
 * Tokens point into the source, nothing is copied. Newlines end a statement unless the line could not
 * have ended there, which is decided by the token before it.
 */
#include "lex.h"

#include <string.h>

enum cls { C_BAD, C_WS, C_NL, C_ALPHA, C_DIGIT, C_PUNCT, C_QUOTE, C_HASH, C_DOT, C_END };

static const unsigned char cls[256] = {
	[0] = C_END,
	['\t'] = C_WS, [' '] = C_WS, ['\r'] = C_WS,
	['\n'] = C_NL,
	['a' ... 'z'] = C_ALPHA, ['A' ... 'Z'] = C_ALPHA, ['_'] = C_ALPHA,
	[0x80 ... 0xf7] = C_ALPHA,		/* umlauts in labels are fine; we do not look inside UTF-8 */
	['0' ... '9'] = C_DIGIT,
	['{'] = C_PUNCT, ['}'] = C_PUNCT, ['('] = C_PUNCT, [')'] = C_PUNCT, [','] = C_PUNCT, [';'] = C_PUNCT,
	['+'] = C_PUNCT, ['-'] = C_PUNCT, ['*'] = C_PUNCT, ['/'] = C_PUNCT, ['%'] = C_PUNCT,
	['='] = C_PUNCT, ['<'] = C_PUNCT, ['>'] = C_PUNCT, ['!'] = C_PUNCT,
	['"'] = C_QUOTE, ['#'] = C_HASH, ['.'] = C_DOT,
};

static enum tok keyword(const char *s, size_t n)
{
	static const struct { const char *name; enum tok tok; } list[] = {
		{ "call", T_CALL }, { "depth", T_DEPTH }, { "else", T_ELSE }, { "feed", T_FEED }, { "if", T_IF },
		{ "let", T_LET }, { "pocket", T_POCKET }, { "repeat", T_REPEAT }, { "rotate", T_ROTATE },
		{ "spindle", T_SPINDLE }, { "step", T_STEP }, { "to", T_TO },
	};
	size_t lo = 0, hi = sizeof list / sizeof *list;

	while (lo < hi) {
		size_t mid = (lo + hi) / 2;
		int r = strncmp(s, list[mid].name, n);

		if (r == 0 && list[mid].name[n])
			r = -1;
		if (r == 0)
			return list[mid].tok;
		if (r < 0)
			hi = mid;
		else
			lo = mid + 1;
	}
	return T_NAME;
}

static enum tok fail(struct lex *lx, const char *why)
{
	if (!lx->error) {
		lx->error = why;
		lx->error_line = lx->line;
		lx->error_col = (int)(lx->p - lx->bol) + 1;
	}
	return lx->tok = T_ERROR;
}

/* Numbers carry their unit: 6mm, 1.5in, 90deg, 40%. All lengths leave here in micrometres. */
static enum tok number(struct lex *lx)
{
	static const struct { const char *suffix; enum unit unit; double scale; } units[] = {
		{ "mm", U_LENGTH, 1e3 }, { "cm", U_LENGTH, 1e4 }, { "um", U_LENGTH, 1 }, { "in", U_LENGTH, 25400 },
		{ "deg", U_ANGLE, 1 }, { "turn", U_ANGLE, 360 }, { "rpm", U_SPEED, 1 }, { "s", U_TIME, 1 },
		{ "ms", U_TIME, 1e-3 }, { "%", U_RATIO, 0.01 },
	};
	const char *p = lx->p;
	double v = 0, place = 1;
	size_t n = 0;

	for (; cls[(unsigned char)*p] == C_DIGIT; p++)
		v = v * 10 + (*p - '0');
	if (*p == '.' && cls[(unsigned char)p[1]] == C_DIGIT)
		for (p++; cls[(unsigned char)*p] == C_DIGIT; p++)
			v += (*p - '0') * (place /= 10);

	while (cls[(unsigned char)p[n]] == C_ALPHA)
		n++;
	if (n == 0 && *p == '%')
		n = 1;
	lx->unit = U_NONE;
	if (n) {
		size_t i;

		for (i = 0; i < sizeof units / sizeof *units; i++)
			if (strlen(units[i].suffix) == n && memcmp(units[i].suffix, p, n) == 0)
				break;
		lx->p = p;
		if (i == sizeof units / sizeof *units)
			return fail(lx, "unknown unit");
		lx->unit = units[i].unit;
		v *= units[i].scale;
	}
	lx->p = p + n;
	lx->num = v;
	return lx->tok = T_NUMBER;
}

static int may_end(enum tok t)
{
	return t == T_NAME || t == T_NUMBER || t == T_STRING || t == ')' || t == '}';
}

enum tok lex_next(struct lex *lx)
{
	enum tok before = lx->tok;

	if (before == T_ERROR)
		return T_ERROR;			/* sticky, the parser may look as often as it likes */
	for (;;) {
		unsigned char c = *lx->p;

		lx->start = lx->p;
		switch ((enum cls)cls[c]) {
		case C_WS:
			lx->p++;
			continue;
		case C_HASH:
			lx->p += strcspn(lx->p, "\n");
			continue;
		case C_NL:
			lx->p++;
			lx->line++;
			lx->bol = lx->p;
			if (may_end(before) && lx->parens == 0)
				return lx->tok = ';';
			continue;
		case C_END:
			if (lx->p < lx->end)
				return fail(lx, "zero byte in the source");
			if (may_end(before))
				return lx->tok = ';';	/* next time round `before` is ';' */
			return lx->tok = T_EOF;
		case C_DIGIT:
			return number(lx);
		case C_DOT:
			if (cls[(unsigned char)lx->p[1]] == C_DIGIT)
				return fail(lx, "write 0.5, not .5");
			if (lx->p[1] == '.') {
				lx->p += 2;
				return lx->tok = T_RANGE;
			}
			return fail(lx, "stray dot");
		case C_ALPHA:
			do
				lx->p++;
			while (cls[(unsigned char)*lx->p] == C_ALPHA || cls[(unsigned char)*lx->p] == C_DIGIT);
			lx->len = (size_t)(lx->p - lx->start);
			return lx->tok = keyword(lx->start, lx->len);
		case C_QUOTE:
			lx->start = ++lx->p;
			lx->p += strcspn(lx->p, "\"\n");
			if (*lx->p != '"')
				return fail(lx, "string is not closed on its line");
			lx->len = (size_t)(lx->p - lx->start);
			lx->p++;
			return lx->tok = T_STRING;
		case C_PUNCT:
			lx->p++;
			if (c == '(')
				lx->parens++;
			if (c == ')' && lx->parens > 0)
				lx->parens--;
			if (*lx->p == '=' && strchr("=<>!", c)) {
				lx->p++;
				return lx->tok = c == '=' ? T_EQ : c == '<' ? T_LE : c == '>' ? T_GE : T_NE;
			}
			return lx->tok = c;
		case C_BAD:
			return fail(lx, c < 32 ? "control character" : "character means nothing here");
		}
	}
}
