/* A loadable SQLite extension: the table-valued function soundslike(word).
 *
 *	select p.* from soundslike('Meyer') s join people p on p.surname_code = s.code;
 *
 * yields the Cologne phonetics code of the word (Kölner Verfahren) and, for compound names, of every part:
 *
 *	code	text	part	text	pos	integer
 *
 * Build: cc -fPIC -shared -o soundslike.so soundslike_vtab.c
 */
#include <sqlite3ext.h>
SQLITE_EXTENSION_INIT1

#include <stdlib.h>
#include <string.h>

enum column { COL_CODE, COL_PART, COL_POS, COL_WORD /* hidden */ };

struct cursor {
	sqlite3_vtab_cursor base;
	char *word;
	const char *at;		/* start of the present part */
	size_t len;
	int pos;
	char code[64];
};

/* Folds one UTF-8 letter to A..Z; umlauts to their vowels, sharp s to S. Returns bytes used, *out 0 if none. */
static size_t fold(const unsigned char *s, size_t n, char *out)
{
	*out = 0;
	if (s[0] < 0x80) {
		if ((s[0] | 32) >= 'a' && (s[0] | 32) <= 'z')
			*out = (char)(s[0] & ~32);
		return 1;
	}
	if (s[0] == 0xc3 && n > 1) {
		switch (s[1]) {
		case 0x84: case 0xa4: *out = 'A'; break;
		case 0x96: case 0xb6: *out = 'O'; break;
		case 0x9c: case 0xbc: *out = 'U'; break;
		case 0x9f: *out = 'S'; break;
		case 0x89: case 0xa9: case 0x88: case 0xa8: *out = 'E'; break;
		}
		return 2;
	}
	return s[0] >= 0xf0 ? 4 : s[0] >= 0xe0 ? 3 : 2;
}

static int in(char c, const char *set) { return c && strchr(set, c) != NULL; }

static void encode(const char *s, size_t n, char *code, size_t room)
{
	char w[128];
	size_t i, len = 0, k = 0;
	char last = 0;

	for (i = 0; i < n && len < sizeof w - 1; ) {
		char c;

		i += fold((const unsigned char *)s + i, n - i, &c);
		if (c)
			w[len++] = c;
	}
	w[len] = 0;

	for (i = 0; i < len && k < room - 2; i++) {
		char c = w[i], before = i ? w[i - 1] : 0, after = w[i + 1], d, e = 0;

		if (in(c, "AEIJOUY"))       d = '0';
		else if (c == 'H')          continue;
		else if (c == 'B')          d = '1';
		else if (c == 'P')          d = after == 'H' ? '3' : '1';
		else if (in(c, "DT"))       d = in(after, "CSZ") ? '8' : '2';
		else if (in(c, "FVW"))      d = '3';
		else if (in(c, "GKQ"))      d = '4';
		else if (c == 'C') {
			if (i == 0)
				d = in(after, "AHKLOQRUX") ? '4' : '8';
			else
				d = !in(before, "SZ") && in(after, "AHKOQUX") ? '4' : '8';
		}
		else if (c == 'X') {
			if (in(before, "CKQ"))
				d = '8';
			else {
				d = '4';
				e = '8';
			}
		}
		else if (c == 'L')          d = '5';
		else if (in(c, "MN"))       d = '6';
		else if (c == 'R')          d = '7';
		else                        d = '8';	/* S, Z */

		/* doubles collapse first, then the zeros go, except in front */
		if (d != last && (d != '0' || k == 0))
			code[k++] = d;
		last = d;
		if (e) {
			code[k++] = e;
			last = e;
		}
	}
	code[k] = 0;
}

static int is_sep(char c) { return c == ' ' || c == '-' || c == '\'' || c == '.'; }

static void next_part(struct cursor *c)
{
	const char *p = c->at + c->len;

	while (*p && is_sep(*p))
		p++;
	c->at = p;
	c->len = 0;
	while (p[c->len] && !is_sep(p[c->len]))
		c->len++;
	c->pos++;
	encode(c->at, c->len, c->code, sizeof c->code);
}

static int x_connect(sqlite3 *db, void *aux, int argc, const char *const *argv, sqlite3_vtab **out, char **err)
{
	int rc = sqlite3_declare_vtab(db, "create table x(code text, part text, pos integer, word hidden)");

	(void)aux; (void)argc; (void)argv; (void)err;
	if (rc != SQLITE_OK)
		return rc;
	sqlite3_vtab_config(db, SQLITE_VTAB_INNOCUOUS);
	*out = sqlite3_malloc(sizeof **out);
	if (!*out)
		return SQLITE_NOMEM;
	memset(*out, 0, sizeof **out);
	return SQLITE_OK;
}

static int x_disconnect(sqlite3_vtab *v)
{
	sqlite3_free(v);
	return SQLITE_OK;
}

static int x_best_index(sqlite3_vtab *v, sqlite3_index_info *info)
{
	int i;

	(void)v;
	for (i = 0; i < info->nConstraint; i++) {
		const struct sqlite3_index_constraint *k = &info->aConstraint[i];

		if (k->iColumn != COL_WORD || k->op != SQLITE_INDEX_CONSTRAINT_EQ)
			continue;
		if (!k->usable)
			return SQLITE_CONSTRAINT;	/* this join order cannot work, try another */
		info->aConstraintUsage[i].argvIndex = 1;
		info->aConstraintUsage[i].omit = 1;
		info->estimatedCost = 1;
		info->estimatedRows = 2;
		info->idxNum = 1;
		return SQLITE_OK;
	}
	info->estimatedCost = 1e12;		/* no argument: nothing to list */
	info->idxNum = 0;
	return SQLITE_OK;
}

static int x_open(sqlite3_vtab *v, sqlite3_vtab_cursor **out)
{
	struct cursor *c = sqlite3_malloc(sizeof *c);

	(void)v;
	if (!c)
		return SQLITE_NOMEM;
	memset(c, 0, sizeof *c);
	*out = &c->base;
	return SQLITE_OK;
}

static int x_close(sqlite3_vtab_cursor *base)
{
	struct cursor *c = (struct cursor *)base;

	sqlite3_free(c->word);
	sqlite3_free(c);
	return SQLITE_OK;
}

static int x_filter(sqlite3_vtab_cursor *base, int idx, const char *idxstr, int argc, sqlite3_value **argv)
{
	struct cursor *c = (struct cursor *)base;
	const unsigned char *text;

	(void)idxstr;
	sqlite3_free(c->word);
	c->word = NULL;
	c->at = "";
	c->len = 0;
	c->pos = 0;
	if (idx != 1 || argc != 1 || !(text = sqlite3_value_text(argv[0])))
		return SQLITE_OK;		/* soundslike(NULL) has no rows */
	c->word = sqlite3_mprintf("%s", text);
	if (!c->word)
		return SQLITE_NOMEM;
	c->at = c->word;
	next_part(c);
	return SQLITE_OK;
}

static int x_next(sqlite3_vtab_cursor *base)
{
	next_part((struct cursor *)base);
	return SQLITE_OK;
}

static int x_eof(sqlite3_vtab_cursor *base)
{
	return ((struct cursor *)base)->len == 0;
}

static int x_column(sqlite3_vtab_cursor *base, sqlite3_context *ctx, int col)
{
	struct cursor *c = (struct cursor *)base;

	switch ((enum column)col) {
	case COL_CODE: sqlite3_result_text(ctx, c->code, -1, SQLITE_TRANSIENT); break;
	case COL_PART: sqlite3_result_text(ctx, c->at, (int)c->len, SQLITE_TRANSIENT); break;
	case COL_POS:  sqlite3_result_int(ctx, c->pos); break;
	case COL_WORD: sqlite3_result_text(ctx, c->word, -1, SQLITE_TRANSIENT); break;
	}
	return SQLITE_OK;
}

static int x_rowid(sqlite3_vtab_cursor *base, sqlite3_int64 *id)
{
	*id = ((struct cursor *)base)->pos;
	return SQLITE_OK;
}

static sqlite3_module module = {
	.iVersion = 0,
	.xConnect = x_connect,			/* no xCreate: eponymous only */
	.xBestIndex = x_best_index,
	.xDisconnect = x_disconnect,
	.xOpen = x_open,
	.xClose = x_close,
	.xFilter = x_filter,
	.xNext = x_next,
	.xEof = x_eof,
	.xColumn = x_column,
	.xRowid = x_rowid,
};

int sqlite3_soundslike_init(sqlite3 *db, char **err, const sqlite3_api_routines *api)
{
	(void)err;
	SQLITE_EXTENSION_INIT2(api);
	return sqlite3_create_module(db, "soundslike", &module, NULL);
}
