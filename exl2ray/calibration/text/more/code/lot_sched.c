// Lottery scheduling for the green threads of the greenhouse controller.
//
// Every fibre owns tickets. At each switch a number is drawn and the fibre holding that ticket runs. A
// fibre that waits for a mutex lends its tickets to the owner, which cures priority inversion without any
// priorities. Tickets live in a Fenwick tree, so drawing costs log2(MAX_FIBRES) steps.

#include "lot_sched.h"

#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { MAX_FIBRES = 64, STACK = 32 * 1024 };

enum fstate { FREE, READY, BLOCKED, ASLEEP, DEAD };

struct fibre {
    ucontext_t  ctx;
    void      (*entry)(void *);
    void       *arg;
    void       *stack;
    const char *name;
    enum fstate state;
    uint32_t    base;       // tickets of its own
    uint32_t    lent;       // tickets that waiters have lent to it
    int         lender_to;  // to whom its tickets are lent, -1 if to nobody
    uint64_t    wake_ns;
    uint64_t    ran_ns;
};

static struct fibre fibres[MAX_FIBRES];
static uint32_t     tree[MAX_FIBRES + 1];
static ucontext_t   idle_ctx;
static int          running = -1;
static uint64_t     rng = 0x853c49e6748fea9bULL;

static uint64_t now_ns(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000000000u + (uint64_t)ts.tv_nsec;
}

static uint32_t draw(uint32_t n)
{
    rng ^= rng << 13;
    rng ^= rng >> 7;
    rng ^= rng << 17;
    return (uint32_t)(((rng >> 32) * n) >> 32);
}

static void tickets_add(int i, int32_t delta)
{
    for (int k = i + 1; k <= MAX_FIBRES; k += k & -k)
        tree[k] += (uint32_t)delta;
}

static uint32_t tickets_total(void) { return tree[MAX_FIBRES]; }   // because MAX_FIBRES is a power of two

static int tickets_find(uint32_t t)
{
    int pos = 0;
    for (int step = MAX_FIBRES; step; step /= 2) {
        if (pos + step <= MAX_FIBRES && tree[pos + step] <= t) {
            pos += step;
            t -= tree[pos];
        }
    }
    return pos;
}

static uint32_t weight(const struct fibre *f) { return f->base + f->lent; }

static void set_state(int i, enum fstate s)
{
    struct fibre *f = &fibres[i];
    if ((f->state == READY) != (s == READY))
        tickets_add(i, s == READY ? (int32_t)weight(f) : -(int32_t)weight(f));
    f->state = s;
}

// Lending is transitive: if the owner is blocked itself, whoever it waits for must hurry too.
static void lend(int from, int to, uint32_t amount, int sign)
{
    while (to >= 0) {
        struct fibre *f = &fibres[to];
        f->lent += (uint32_t)(sign * (int32_t)amount);
        if (f->state == READY)
            tickets_add(to, sign * (int32_t)amount);
        to = f->lender_to;
        if (to == from)
            abort();            // deadlock: the chain bites its own tail
    }
}

static void trampoline(void)
{
    struct fibre *f = &fibres[running];
    f->entry(f->arg);
    set_state(running, DEAD);
    swapcontext(&f->ctx, &idle_ctx);
}

int fibre_start(const char *name, uint32_t tickets, void (*entry)(void *), void *arg)
{
    for (int i = 0; i < MAX_FIBRES; i++) {
        struct fibre *f = &fibres[i];
        if (f->state != FREE)
            continue;
        // One guard page below the stack. An overflow in the irrigation parser once ate the fan table.
        size_t page = (size_t)sysconf(_SC_PAGESIZE);
        char *mem = mmap(NULL, STACK + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mem == MAP_FAILED)
            return -ENOMEM;
        mprotect(mem, page, PROT_NONE);

        *f = (struct fibre){ .entry = entry, .arg = arg, .stack = mem, .name = name,
                             .base = tickets ? tickets : 1, .lender_to = -1 };
        getcontext(&f->ctx);
        f->ctx.uc_stack.ss_sp = mem + page;
        f->ctx.uc_stack.ss_size = STACK;
        makecontext(&f->ctx, trampoline, 0);
        set_state(i, READY);
        return i;
    }
    return -EAGAIN;
}

void fibre_yield(void) { swapcontext(&fibres[running].ctx, &idle_ctx); }

void fibre_sleep_ms(uint32_t ms)
{
    fibres[running].wake_ns = now_ns() + ms * 1000000ULL;
    set_state(running, ASLEEP);
    fibre_yield();
}

void fibre_lock(struct fmutex *m)
{
    while (m->owner >= 0) {
        int me = running;
        uint32_t w = weight(&fibres[me]);
        fibres[me].lender_to = m->owner;
        lend(me, m->owner, w, +1);
        m->waiting |= 1ULL << me;
        set_state(me, BLOCKED);
        fibre_yield();
    }
    m->owner = running;
}

void fibre_unlock(struct fmutex *m)
{
    for (int i = 0; i < MAX_FIBRES; i++) {
        if (!(m->waiting >> i & 1))
            continue;
        lend(i, m->owner, weight(&fibres[i]), -1);
        fibres[i].lender_to = -1;
        set_state(i, READY);
    }
    m->waiting = 0;
    m->owner = -1;
}

static uint64_t wake_sleepers(void)
{
    uint64_t t = now_ns(), next = UINT64_MAX;
    for (int i = 0; i < MAX_FIBRES; i++) {
        if (fibres[i].state != ASLEEP)
            continue;
        if (fibres[i].wake_ns <= t)
            set_state(i, READY);
        else if (fibres[i].wake_ns < next)
            next = fibres[i].wake_ns;
    }
    return next == UINT64_MAX ? 0 : next - t;
}

int sched_run(void)
{
    for (;;) {
        uint64_t nap = wake_sleepers();
        uint32_t total = tickets_total();
        if (total == 0) {
            if (nap == 0)
                return 0;       // nobody ready and nobody asleep
            struct timespec ts = { (time_t)(nap / 1000000000u), (long)(nap % 1000000000u) };
            nanosleep(&ts, NULL);
            continue;
        }
        running = tickets_find(draw(total));
        struct fibre *f = &fibres[running];
        uint64_t t0 = now_ns();
        swapcontext(&idle_ctx, &f->ctx);
        f->ran_ns += now_ns() - t0;
        if (f->state == DEAD) {
            munmap(f->stack, STACK + (size_t)sysconf(_SC_PAGESIZE));
            memset(f, 0, sizeof *f);
        }
    }
}
