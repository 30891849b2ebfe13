/*
 * spsc_ring.c - a byte queue between exactly one writer thread and one reader thread.
 *
 * The audio callback of a sound card must never block: no mutex, no malloc, no printf. It pushes
 * blocks of samples here and a slower thread drains them to disk.
 *
 * The two indices only ever grow (modulo 2^32) and are masked on access. Keeping them unmasked
 * distinguishes "empty" (head == tail) from "full" (head - tail == capacity) without wasting a slot.
 *
 *     cc -std=c11 -O2 -Wall -Wextra -pthread spsc_ring.c -o spsc_ring && ./spsc_ring
 */
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CACHE_LINE 64

struct ring {
    /* Writer and reader each own one line, otherwise every push would invalidate the reader's copy
       of its own index and the queue would run at the speed of the interconnect. */
    _Alignas(CACHE_LINE) _Atomic uint32_t head; /* bytes written so far */
    uint32_t cached_tail;                       /* writer's last view of tail */
    _Alignas(CACHE_LINE) _Atomic uint32_t tail; /* bytes read so far */
    uint32_t cached_head;                       /* reader's last view of head */
    _Alignas(CACHE_LINE) uint32_t mask;
    unsigned char *data;
};

/* capacity must be a power of two; returns false when it is not or when memory is short. */
static bool ring_init(struct ring *r, uint32_t capacity)
{
    if (capacity == 0 || (capacity & (capacity - 1)) != 0)
        return false;
    memset(r, 0, sizeof *r);
    r->mask = capacity - 1;
    r->data = malloc(capacity);
    return r->data != NULL;
}

static void ring_free(struct ring *r)
{
    free(r->data);
    r->data = NULL;
}

/* A run of n bytes starting at index may wrap around; copy it as at most two pieces. */
static void copy_in(struct ring *r, uint32_t index, const unsigned char *src, uint32_t n)
{
    uint32_t at = index & r->mask;
    uint32_t first = r->mask + 1 - at;
    if (first > n)
        first = n;
    memcpy(r->data + at, src, first);
    memcpy(r->data, src + first, n - first);
}

static void copy_out(const struct ring *r, uint32_t index, unsigned char *dst, uint32_t n)
{
    uint32_t at = index & r->mask;
    uint32_t first = r->mask + 1 - at;
    if (first > n)
        first = n;
    memcpy(dst, r->data + at, first);
    memcpy(dst + first, r->data, n - first);
}

/* All or nothing: a half-written audio block would shift the channels of everything after it. */
bool ring_push(struct ring *r, const void *src, uint32_t n)
{
    uint32_t head = atomic_load_explicit(&r->head, memory_order_relaxed);
    uint32_t capacity = r->mask + 1;

    if (capacity - (head - r->cached_tail) < n) {
        /* acquire: the reader must be done with the bytes before we overwrite them */
        r->cached_tail = atomic_load_explicit(&r->tail, memory_order_acquire);
        if (capacity - (head - r->cached_tail) < n)
            return false;
    }
    copy_in(r, head, src, n);
    atomic_store_explicit(&r->head, head + n, memory_order_release);
    return true;
}

/* Takes what is there, up to n bytes, and returns how many. */
uint32_t ring_pop(struct ring *r, void *dst, uint32_t n)
{
    uint32_t tail = atomic_load_explicit(&r->tail, memory_order_relaxed);

    if (r->cached_head - tail < n)
        r->cached_head = atomic_load_explicit(&r->head, memory_order_acquire);
    uint32_t available = r->cached_head - tail;
    if (n > available)
        n = available;
    copy_out(r, tail, dst, n);
    atomic_store_explicit(&r->tail, tail + n, memory_order_release);
    return n;
}

/* ---- stress test: the reader must see an unbroken counter ------------------------------------ */

enum { BLOCKS = 200000, WORDS = 37 }; /* 148 bytes a block: wraps at every possible offset */

static struct ring shared;

static void *producer(void *unused)
{
    uint32_t block[WORDS], next = 0;
    (void)unused;
    for (int b = 0; b < BLOCKS; b++) {
        for (int i = 0; i < WORDS; i++)
            block[i] = next++;
        while (!ring_push(&shared, block, sizeof block))
            ; /* a real callback would count the overrun and drop the block */
    }
    return NULL;
}

int main(void)
{
    if (!ring_init(&shared, 4096)) {
        fputs("cannot allocate the ring\n", stderr);
        return EXIT_FAILURE;
    }
    /* Start near the wrap-around of the 32-bit counters, where sign mistakes would show. */
    atomic_store(&shared.head, UINT32_MAX - 100);
    atomic_store(&shared.tail, UINT32_MAX - 100);
    shared.cached_head = shared.cached_tail = UINT32_MAX - 100;

    pthread_t thread;
    if (pthread_create(&thread, NULL, producer, NULL) != 0)
        return EXIT_FAILURE;

    uint32_t expected = 0;
    uint64_t bytes = 0, wanted = (uint64_t)BLOCKS * WORDS * sizeof(uint32_t);
    unsigned char buffer[1000];
    uint32_t held = 0; /* bytes of an incomplete word carried over from the last pop */
    while (bytes < wanted) {
        uint32_t got = ring_pop(&shared, buffer + held, sizeof buffer - held);
        bytes += got;
        held += got;
        uint32_t used = 0;
        for (; used + sizeof(uint32_t) <= held; used += sizeof(uint32_t)) {
            uint32_t word;
            memcpy(&word, buffer + used, sizeof word);
            if (word != expected++) {
                fprintf(stderr, "expected %u, got %u\n", expected - 1, word);
                return EXIT_FAILURE;
            }
        }
        held -= used;
        memmove(buffer, buffer + used, held);
    }
    pthread_join(thread, NULL);
    printf("%llu bytes in order\n", (unsigned long long)bytes);
    ring_free(&shared);
    return EXIT_SUCCESS;
}
