/* pdiff OLD NEW

   Compare two text files line by line. Lines that occur exactly once in both files are matched
   first, the longest increasing run of them is kept, and the gaps in between are compared the
   same way. What no unique line can split is printed as a plain replacement. On source code
   this keeps closing braces from being matched with somebody else's closing braces.

   Exit status: 0 same, 1 different, 2 trouble. */

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct { const char *s; size_t len; unsigned long hash; } Line;
typedef struct { char *buf; Line *line; int n; } Text;

static int changes;

static void die(const char *what)
{
    fprintf(stderr, "pdiff: %s: %s\n", what, strerror(errno));
    exit(2);
}

static void *need(void *p)
{
    if (!p) die("memory");
    return p;
}

static unsigned long fnv(const char *s, size_t n)
{
    unsigned long h = 2166136261u;
    for (; n; n--) h = ((h ^ (unsigned char)*s++) * 16777619u) & 0xffffffffu;
    return h;
}

static Text slurp(const char *name)
{
    Text t = {0};
    size_t used = 0, room = 1 << 16, got;
    FILE *f = fopen(name, "rb");
    if (!f) die(name);
    t.buf = need(malloc(room));
    while ((got = fread(t.buf + used, 1, room - used, f)) > 0) {
        used += got;
        if (used == room) t.buf = need(realloc(t.buf, room *= 2));
    }
    if (ferror(f)) die(name);
    fclose(f);

    int cap = 256;
    t.line = need(malloc(cap * sizeof *t.line));
    for (char *p = t.buf, *end = t.buf + used; p < end; ) {
        char *nl = memchr(p, '\n', end - p);
        size_t len = (nl ? nl : end) - p;
        if (t.n == cap) t.line = need(realloc(t.line, (cap *= 2) * sizeof *t.line));
        t.line[t.n++] = (Line){ p, len, fnv(p, len) };
        p += len + 1;
    }
    return t;
}

static int same(const Line *a, const Line *b)
{
    return a->hash == b->hash && a->len == b->len && !memcmp(a->s, b->s, a->len);
}

/* One bucket entry per distinct line of the current range. */
typedef struct Entry { const Line *key; int na, nb, ia, ib; struct Entry *next; } Entry;

static Entry *find(Entry **tab, unsigned mask, Entry *pool, int *used, const Line *k)
{
    Entry **slot = &tab[k->hash & mask];
    for (Entry *e = *slot; e; e = e->next)
        if (same(e->key, k)) return e;
    Entry *e = &pool[(*used)++];
    *e = (Entry){ .key = k, .next = *slot };
    return *slot = e;
}

static void report(Text *a, int a0, int a1, Text *b, int b0, int b1)
{
    if (a0 == a1 && b0 == b1) return;
    changes = 1;
    printf("@@ -%d,%d +%d,%d @@\n", a0 + 1, a1 - a0, b0 + 1, b1 - b0);
    for (; a0 < a1; a0++) printf("-%.*s\n", (int)a->line[a0].len, a->line[a0].s);
    for (; b0 < b1; b0++) printf("+%.*s\n", (int)b->line[b0].len, b->line[b0].s);
}

static void compare(Text *a, int a0, int a1, Text *b, int b0, int b1)
{
    while (a0 < a1 && b0 < b1 && same(&a->line[a0], &b->line[b0])) a0++, b0++;
    while (a0 < a1 && b0 < b1 && same(&a->line[a1 - 1], &b->line[b1 - 1])) a1--, b1--;
    if (a0 == a1 || b0 == b1) { report(a, a0, a1, b, b0, b1); return; }

    int total = (a1 - a0) + (b1 - b0), used = 0;
    unsigned size = 16;
    while (size < (unsigned)total) size *= 2;
    Entry **tab = need(calloc(size, sizeof *tab));
    Entry *pool = need(malloc(total * sizeof *pool));
    Entry **uniq = need(malloc((a1 - a0) * sizeof *uniq));
    int *top = need(malloc((a1 - a0) * sizeof *top)), *prev = need(malloc((a1 - a0) * sizeof *prev));

    for (int i = a0; i < a1; i++) {
        Entry *e = find(tab, size - 1, pool, &used, &a->line[i]);
        e->na++, e->ia = i;
    }
    for (int i = b0; i < b1; i++) {
        Entry *e = find(tab, size - 1, pool, &used, &b->line[i]);
        e->nb++, e->ib = i;
    }

    /* Unique in both, in the order of a; then patience sorting on the positions in b. */
    int n = 0, piles = 0;
    for (int i = a0; i < a1; i++) {
        Entry *e = find(tab, size - 1, pool, &used, &a->line[i]);
        if (e->na == 1 && e->nb == 1) uniq[n++] = e;
    }
    for (int i = 0; i < n; i++) {
        int lo = 0, hi = piles;
        while (lo < hi) {
            int mid = (lo + hi) / 2;
            if (uniq[top[mid]]->ib < uniq[i]->ib) lo = mid + 1; else hi = mid;
        }
        prev[i] = lo ? top[lo - 1] : -1;
        top[lo] = i;
        if (lo == piles) piles++;
    }

    if (piles == 0) {
        report(a, a0, a1, b, b0, b1);
    } else {
        int (*anchor)[2] = need(malloc(piles * sizeof *anchor));
        for (int k = piles, i = top[piles - 1]; k-- > 0; i = prev[i])
            anchor[k][0] = uniq[i]->ia, anchor[k][1] = uniq[i]->ib;
        for (int k = 0; k < piles; k++) {
            compare(a, a0, anchor[k][0], b, b0, anchor[k][1]);
            a0 = anchor[k][0] + 1, b0 = anchor[k][1] + 1;
        }
        compare(a, a0, a1, b, b0, b1);
        free(anchor);
    }
    free(tab), free(pool), free(uniq), free(top), free(prev);
}

int main(int argc, char **argv)
{
    if (argc != 3) {
        fputs("usage: pdiff OLD NEW\n", stderr);
        return 2;
    }
    Text a = slurp(argv[1]), b = slurp(argv[2]);
    compare(&a, 0, a.n, &b, 0, b.n);
    if (fflush(stdout)) die("stdout");
    return changes;
}
