#include "ember.h"
#include "byterange.h"

#include <ctype.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

/*
 * Byte ranges of RFC 9110, section 14.  The parser fills a small fixed array.
 * Whoever asks for more pieces than that gets the whole thing, which is always
 * a correct answer; so is it for anything that does not parse.
 */

#define FIRST_UNSET UINT64_MAX

static const char *number(const char *s, uint64_t *out)
{
    uint64_t v = 0;

    if (!isdigit((unsigned char)*s))
        return NULL;
    for (; isdigit((unsigned char)*s); s++) {
        unsigned d = *s - '0';

        if (v > (UINT64_MAX - 1 - d) / 10)
            return NULL;
        v = v * 10 + d;
    }
    *out = v;
    return s;
}

static int by_start(const struct em_range *a, const struct em_range *b)
{
    return a->pos < b->pos ? -1 : a->pos > b->pos;
}

/* Join ranges that overlap or leave a gap cheaper to send than a part header. */
static int coalesce(struct em_range *r, int n)
{
    int i, j, kept = 0;

    for (i = 1; i < n; i++)
        for (j = i; j > 0 && by_start(&r[j - 1], &r[j]) > 0; j--) {
            struct em_range t = r[j];
            r[j] = r[j - 1];
            r[j - 1] = t;
        }

    for (i = 1; i < n; i++) {
        uint64_t end = r[kept].pos + r[kept].len;

        if (r[i].pos <= end + EM_PART_OVERHEAD) {
            uint64_t e2 = r[i].pos + r[i].len;
            if (e2 > end)
                r[kept].len = e2 - r[kept].pos;
        } else {
            r[++kept] = r[i];
        }
    }
    return kept + 1;
}

enum em_range_result
em_range_parse(const char *value, uint64_t size, struct em_range_set *set)
{
    const char *s = value;
    int seen = 0;

    set->n = 0;
    if (strncasecmp(s, "bytes=", 6) != 0)
        return EM_RANGE_IGNORE;
    s += 6;

    do {
        uint64_t first = FIRST_UNSET, last = size - 1, tail = 0;

        s += strspn(s, " \t,");
        if (*s == '\0')
            break;

        if (*s == '-') {
            if (!(s = number(s + 1, &tail)))
                return EM_RANGE_IGNORE;
        } else {
            if (!(s = number(s, &first)) || *s++ != '-')
                return EM_RANGE_IGNORE;
            if (isdigit((unsigned char)*s)) {
                s = number(s, &last);
                if (!s || last < first)
                    return EM_RANGE_IGNORE;
            }
        }
        s += strspn(s, " \t");
        if (*s != ',' && *s != '\0')
            return EM_RANGE_IGNORE;
        seen++;

        if (size == 0)
            continue;
        if (first == FIRST_UNSET) {
            if (tail == 0)
                continue;
            first = tail < size ? size - tail : 0;
            last = size - 1;
        }
        if (first >= size)
            continue;
        if (last >= size)
            last = size - 1;

        if (set->n == EM_MAX_RANGES)
            return EM_RANGE_IGNORE;
        set->r[set->n].pos = first;
        set->r[set->n].len = last - first + 1;
        set->n++;
    } while (*s == ',');

    if (!seen)
        return EM_RANGE_IGNORE;
    if (set->n == 0)
        return EM_RANGE_UNSATISFIABLE;
    set->n = coalesce(set->r, set->n);
    return EM_RANGE_OK;
}

/* Length of the multipart body, computed from what will be printed later. */
uint64_t em_range_body_length(const struct em_range_set *set, const char *type,
                              const char *boundary, uint64_t size)
{
    uint64_t total = 0;
    int i;

    if (set->n == 1)
        return set->r[0].len;
    for (i = 0; i < set->n; i++)
        total += em_range_part_header(NULL, 0, &set->r[i], type, boundary, size) + set->r[i].len;
    return total + snprintf(NULL, 0, "\r\n--%s--\r\n", boundary);
}

int em_range_part_header(char *buf, size_t room, const struct em_range *r,
                         const char *type, const char *boundary, uint64_t size)
{
    return snprintf(buf, room,
                    "\r\n--%s\r\n"
                    "Content-Type: %s\r\n"
                    "Content-Range: bytes %" PRIu64 "-%" PRIu64 "/%" PRIu64 "\r\n\r\n",
                    boundary, type, r->pos, r->pos + r->len - 1, size);
}
