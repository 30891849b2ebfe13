#include <ctype.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* Solver for the crate puzzles of "Harbour Night". Reads one level on standard input, prints the pushes.
 *
 *   #  quay wall     .  berth      $  crate     *  crate in its berth     @  docker     +  docker on a berth
 *
 * A* over pushes, not steps: a state is the set of crates plus the reachable region of the docker, named by its
 * smallest square. The estimate is the sum of push distances to the nearest berth, each computed backwards
 * once, ignoring other crates. Squares from which no berth can be reached are dead and never pushed onto. */

#define MAXSQ   256
#define MAXBOX  20
#define TABLE   (1u << 21)

typedef struct { uint8_t box[MAXBOX]; uint8_t man; } Pos;
typedef struct { Pos pos; uint32_t parent; uint16_t g, f; uint8_t sq, dir; int32_t next; } Node;

static int w, h, nbox;
static uint8_t wall[MAXSQ], berth[MAXSQ];
static uint16_t dist[MAXSQ];
static int step[4];
static const char dirname[] = "URDL";

static Node *node;
static uint32_t nnodes, maxnodes = 1u << 20;
static uint32_t *table;
static int32_t bucket[1024];

static void die(const char *s) { fprintf(stderr, "sokopush: %s\n", s); exit(1); }

static Pos read_level(void)
{
    char line[64];
    Pos p = {{0}, 0};
    bool man = false;
    int goals = 0;

    w = 16;
    memset(wall, 1, sizeof wall);
    while (fgets(line, sizeof line, stdin)) {
        int x, n = (int)strcspn(line, "\r\n");

        if (n == 0 || !strchr("# ", line[0]))
            continue;
        if (n > w || h == 16)
            die("level is larger than 16 by 16");
        for (x = 0; x < n; x++) {
            int s = h * w + x, c = line[x];

            wall[s] = c == '#';
            if (c == '.' || c == '*' || c == '+') { berth[s] = 1; goals++; }
            if (c == '$' || c == '*') {
                if (nbox == MAXBOX) die("too many crates");
                p.box[nbox++] = (uint8_t)s;
            }
            if (c == '@' || c == '+') {
                if (man) die("two dockers");
                man = true;
                p.man = (uint8_t)s;
            }
        }
        h++;
    }
    if (!man) die("nobody there to push");
    if (goals < nbox || nbox == 0) die("crates and berths do not go together");
    step[0] = -w; step[1] = 1; step[2] = w; step[3] = -1;
    return p;
}

/* Pulling a crate away from every berth at once. */
static void distances(void)
{
    int q[MAXSQ], head = 0, tail = 0, s, d;

    memset(dist, 0xff, sizeof dist);
    for (s = 0; s < MAXSQ; s++)
        if (berth[s]) { dist[s] = 0; q[tail++] = s; }
    while (head < tail) {
        s = q[head++];
        for (d = 0; d < 4; d++) {
            int from = s - step[d], stand = from - step[d];

            if (from < 0 || from >= MAXSQ || stand < 0 || stand >= MAXSQ || wall[from] || wall[stand])
                continue;
            if (dist[from] == 0xffff) { dist[from] = dist[s] + 1; q[tail++] = from; }
        }
    }
}

static void sort_boxes(Pos *p)
{
    for (int i = 1; i < nbox; i++) {
        uint8_t b = p->box[i];
        int j = i;
        for (; j > 0 && p->box[j - 1] > b; j--) p->box[j] = p->box[j - 1];
        p->box[j] = b;
    }
}

/* Marks where the docker can go; returns the smallest square. */
static int flood(const Pos *p, uint8_t *reach, uint8_t *crate)
{
    int stack[MAXSQ], n = 0, least = p->man;

    memset(reach, 0, MAXSQ);
    memset(crate, 0, MAXSQ);
    for (int i = 0; i < nbox; i++) crate[p->box[i]] = 1;
    stack[n++] = p->man;
    reach[p->man] = 1;
    while (n) {
        int s = stack[--n];
        if (s < least) least = s;
        for (int d = 0; d < 4; d++) {
            int t = s + step[d];
            if (t >= 0 && t < MAXSQ && !wall[t] && !crate[t] && !reach[t]) { reach[t] = 1; stack[n++] = t; }
        }
    }
    return least;
}

/* Four crates or walls in a square never move again. Fatal unless all the crates are in berths. */
static bool frozen(int s, const uint8_t *crate)
{
    static const int corner[4][3] = { {-17, -16, -1}, {-16, -15, 1}, {-1, 15, 16}, {1, 16, 17} };

    for (int c = 0; c < 4; c++) {
        bool stuck = true, lost = !berth[s];
        for (int k = 0; k < 3; k++) {
            int t = s + corner[c][k];
            if (!wall[t] && !crate[t]) stuck = false;
            if (crate[t] && !berth[t]) lost = true;
        }
        if (stuck && lost) return true;
    }
    return false;
}

static uint32_t hash(const Pos *p)
{
    uint32_t x = 2166136261u;
    const uint8_t *b = p->box;

    for (int i = 0; i < nbox; i++) x = (x ^ b[i]) * 16777619u;
    x = (x ^ p->man) * 16777619u;
    return x ^ x >> 15;
}

static void consider(const Pos *p, uint32_t parent, int g, int sq, int dir)
{
    uint32_t slot = hash(p) & (TABLE - 1), id;
    int f = g;

    for (int i = 0; i < nbox; i++) f += dist[p->box[i]];
    while ((id = table[slot]) != 0) {
        if (!memcmp(node[id].pos.box, p->box, (size_t)nbox) && node[id].pos.man == p->man) {
            if (node[id].g <= g) return;
            break;                          /* reached again with fewer pushes */
        }
        slot = (slot + 1) & (TABLE - 1);
    }
    if (nnodes == maxnodes || f >= 1024) die("gave up, the harbour is too full");
    id = nnodes++;
    node[id] = (Node){ *p, parent, (uint16_t)g, (uint16_t)f, (uint8_t)sq, (uint8_t)dir, bucket[f] };
    bucket[f] = (int32_t)id;
    table[slot] = id;
}

static void print_plan(uint32_t id)
{
    if (node[id].parent == 0) return;
    print_plan(node[id].parent);
    int from = node[id].sq;
    printf("%c%d%c ", 'a' + from % w, from / w + 1, dirname[node[id].dir]);
}

int main(void)
{
    Pos start = read_level();
    uint8_t reach[MAXSQ], crate[MAXSQ];

    node = calloc(maxnodes, sizeof *node);
    table = calloc(TABLE, sizeof *table);
    if (!node || !table) die("not enough memory");
    memset(bucket, 0xff, sizeof bucket);
    nnodes = 1;                             /* node 0 means "none" */
    distances();
    sort_boxes(&start);
    start.man = (uint8_t)flood(&start, reach, crate);
    consider(&start, 0, 0, 0, 0);

    for (int f = 0; f < 1024; ) {
        int32_t id = bucket[f];
        if (id < 0) { f++; continue; }
        bucket[f] = node[id].next;
        Pos here = node[id].pos;
        bool done = true;

        for (int i = 0; i < nbox; i++) done &= berth[here.box[i]];
        if (done) {
            print_plan((uint32_t)id);
            printf("\n%d pushes, %u states\n", node[id].g, nnodes - 1);
            return 0;
        }
        flood(&here, reach, crate);
        for (int i = 0; i < nbox; i++)
            for (int d = 0; d < 4; d++) {
                int b = here.box[i], to = b + step[d], man = b - step[d];
                Pos next;

                if (!reach[man] || wall[to] || crate[to] || dist[to] == 0xffff) continue;
                crate[b] = 0;
                crate[to] = 1;
                bool bad = frozen(to, crate);
                crate[to] = 0;
                crate[b] = 1;
                if (bad) continue;
                next = here;
                next.box[i] = (uint8_t)to;
                next.man = (uint8_t)b;
                sort_boxes(&next);
                uint8_t r2[MAXSQ], c2[MAXSQ];
                next.man = (uint8_t)flood(&next, r2, c2);
                consider(&next, (uint32_t)id, node[id].g + 1, b, d);
            }
        if (f > 0) f--;                     /* a consistent estimate never needs more than this */
    }
    puts("no solution");
    return 1;
}
