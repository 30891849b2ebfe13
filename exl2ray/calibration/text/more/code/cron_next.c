/* cron_next.c - when does a crontab line fire next?
 *
 * Works on broken-down local time, most significant field first, and lets mktime() judge. Two oddities of the
 * calendar are handled on purpose:
 *
 *   - in spring an hour is missing. Jobs that fall into it run once, right after the jump.
 *   - in autumn an hour comes twice. Jobs at a fixed hour run in the first of the two; jobs with "*" as hour
 *     run in both.
 */
#include "cron_next.h"

#include <ctype.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>

static const struct field {
	const char *what;
	int lo, hi;
	const char *names;	/* three letters each, first one is lo */
} fields[5] = {
	{ "minute",	  0, 59, NULL },
	{ "hour",	  0, 23, NULL },
	{ "day of month", 1, 31, NULL },
	{ "month",	  1, 12, "janfebmaraprmayjunjulaugsepoctnovdec" },
	{ "day of week",  0,  7, "sunmontuewedthufrisat" },
};

static const struct { const char *nick, *line; } nicks[] = {
	{ "@hourly", "0 * * * *" }, { "@daily", "0 0 * * *" }, { "@midnight", "0 0 * * *" },
	{ "@weekly", "0 0 * * 0" }, { "@monthly", "0 0 1 * *" }, { "@yearly", "0 0 1 1 *" },
};

static int value(const struct field *f, const char **s)
{
	if (isdigit((unsigned char)**s)) {
		char *end;
		long v = strtol(*s, &end, 10);

		*s = end;
		return v < f->lo || v > f->hi ? -1 : (int)v;
	}
	if (f->names && isalpha((unsigned char)**s)) {
		const char *n = f->names;
		int i;

		for (i = 0; n[3 * i]; i++)
			if (!strncasecmp(*s, n + 3 * i, 3)) {
				*s += 3;
				return f->lo + i;
			}
	}
	return -1;
}

/* item [, item]...   with item = *[/n] | v | a-b[/n] */
static int parse_field(const struct field *f, const char *s, uint64_t *set, int *star)
{
	*set = 0;
	*star = *s == '*';
	for (;;) {
		int a, b, step = 1, v;

		if (*s == '*') {
			a = f->lo;
			b = f->hi;
			s++;
		} else {
			if ((a = b = value(f, &s)) < 0)
				return -1;
			if (*s == '-') {
				s++;
				if ((b = value(f, &s)) < a)
					return -1;
			}
		}
		if (*s == '/') {
			char *end;

			step = (int)strtol(s + 1, &end, 10);
			if (end == s + 1 || step < 1 || step > f->hi)
				return -1;
			s = end;
		}
		for (v = a; v <= b; v += step)
			*set |= UINT64_C(1) << v;
		if (*s == '\0')
			return 0;
		if (*s++ != ',')
			return -1;
	}
}

const char *cron_parse(struct cron *c, const char *line)
{
	char copy[128], *save = NULL, *tok;
	uint64_t *sets[5] = { &c->min, &c->hour, &c->dom, &c->mon, &c->dow };
	int stars[5], i;
	size_t k;

	for (k = 0; k < sizeof nicks / sizeof *nicks; k++)
		if (!strcasecmp(line, nicks[k].nick))
			line = nicks[k].line;
	if (strlen(line) >= sizeof copy)
		return "line too long";
	strcpy(copy, line);

	tok = strtok_r(copy, " \t", &save);
	for (i = 0; i < 5; i++, tok = strtok_r(NULL, " \t", &save))
		if (!tok || parse_field(&fields[i], tok, sets[i], &stars[i]) < 0)
			return fields[i].what;
	if (tok)
		return "something follows the day of week";

	if (c->dow >> 7 & 1)		/* 7 is Sunday as well */
		c->dow |= 1;
	c->any_hour = stars[1];
	/* The rule everybody trips over: if both day fields are restricted, either one is enough. */
	c->either_day = !stars[2] && !stars[4];
	return NULL;
}

static int bit_from(uint64_t set, int from)
{
	if (from > 63)
		return -1;
	set &= ~UINT64_C(0) << from;
	return set ? __builtin_ctzll(set) : -1;
}

static int month_length(int year, int mon)
{
	static const int len[12] = { 31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31 };

	return mon == 1 && (year % 4 == 0 && (year % 100 != 0 || year % 400 == 0)) ? 29 : len[mon];
}

/* Sakamoto's rule, 0 is Sunday */
static int weekday(int y, int m, int d)
{
	static const int t[] = { 0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4 };

	y -= m < 2;
	return (y + y / 4 - y / 100 + y / 400 + t[m] + d) % 7;
}

static int day_fits(const struct cron *c, int y, int m, int d)
{
	int dom = (int)(c->dom >> d & 1), dow = (int)(c->dow >> weekday(y, m, d) & 1);

	return c->either_day ? dom || dow : dom && dow;
}

time_t cron_next(const struct cron *c, time_t after)
{
	struct tm tm, want;
	time_t t;
	int y, m, d, h, mi, last_year;

	after += 60 - after % 60;
	if (!localtime_r(&after, &tm))
		return (time_t)-1;
	y = tm.tm_year + 1900;
	m = tm.tm_mon;
	d = tm.tm_mday;
	h = tm.tm_hour;
	mi = tm.tm_min;
	last_year = y + 8;		/* 29 February may be eight years away, around 2100 */

	for (; y <= last_year; y++, m = 0, d = 1, h = 0, mi = 0) {
		int nm;

		for (; (nm = bit_from(c->mon, m + 1) - 1) >= 0; m++, d = 1, h = 0, mi = 0) {
			if (nm != m)
				m = nm, d = 1, h = 0, mi = 0;
			for (; d <= month_length(y, m); d++, h = 0, mi = 0) {
				int nh;

				if (!day_fits(c, y, m, d))
					continue;
				for (; (nh = bit_from(c->hour, h)) >= 0; h++, mi = 0) {
					if (nh != h)
						h = nh, mi = 0;
					if ((mi = bit_from(c->min, mi)) < 0)
						continue;

					memset(&want, 0, sizeof want);
					want.tm_year = y - 1900;
					want.tm_mon = m;
					want.tm_mday = d;
					want.tm_hour = h;
					want.tm_min = mi;
					want.tm_isdst = c->any_hour ? tm.tm_isdst : -1;
					t = mktime(&want);
					if (t == (time_t)-1)
						return t;
					if (want.tm_hour != h && !c->any_hour) {
						/* h does not exist today: mktime went past the gap, go to its edge */
						t -= want.tm_min * 60 + want.tm_sec;
					}
					if (t >= after)
						return t;
				}
			}
		}
	}
	return (time_t)-1;		/* 31 February and its like */
}
