/*
 * drbg.c - key-erasing random generator around ChaCha20, one instance per thread
 *
 * The first 32 bytes of every refill replace the key, so a memory dump taken later cannot be run
 * backwards. Handed-out bytes are wiped from the buffer for the same reason. fork() is noticed through a
 * page that the kernel wipes in the child.
 */
#define _DEFAULT_SOURCE
#include <errno.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <unistd.h>

#include "drbg.h"

#define KEYSZ		32
#define BUFSZ		(16 * 64)
#define RESEED_AFTER	(1u << 20)

struct state {
	uint32_t canary;	/* becomes 0 in a child */
	uint32_t key[8];
	size_t	 have;		/* unread bytes, at the end of buf */
	size_t	 budget;	/* bytes until fresh entropy is mixed in */
	uint8_t	 buf[BUFSZ];
};

static _Thread_local struct state *self;

static inline uint32_t rotl(uint32_t v, int n) { return v << n | v >> (32 - n); }

#define QR(a, b, c, d) do {				\
	a += b; d = rotl(d ^ a, 16);			\
	c += d; b = rotl(b ^ c, 12);			\
	a += b; d = rotl(d ^ a, 8);			\
	c += d; b = rotl(b ^ c, 7);			\
} while (0)

static void put32(uint8_t *p, uint32_t v)
{
	p[0] = v;
	p[1] = v >> 8;
	p[2] = v >> 16;
	p[3] = v >> 24;
}

/* Zero nonce, because no key is used twice. */
static void block(const uint32_t key[8], uint32_t counter, uint8_t out[64])
{
	const uint32_t in[16] = {
		0x61707865, 0x3320646e, 0x79622d32, 0x6b206574,
		key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7],
		counter, 0, 0, 0
	};
	uint32_t x[16];
	int i;

	memcpy(x, in, sizeof x);
	for (i = 0; i < 10; i++) {
		QR(x[0], x[4], x[8],  x[12]);
		QR(x[1], x[5], x[9],  x[13]);
		QR(x[2], x[6], x[10], x[14]);
		QR(x[3], x[7], x[11], x[15]);
		QR(x[0], x[5], x[10], x[15]);
		QR(x[1], x[6], x[11], x[12]);
		QR(x[2], x[7], x[8],  x[13]);
		QR(x[3], x[4], x[9],  x[14]);
	}
	for (i = 0; i < 16; i++)
		put32(out + 4 * i, x[i] + in[i]);
	explicit_bzero(x, sizeof x);
}

static void load_key(struct state *s, const uint8_t *p)
{
	int i;

	for (i = 0; i < 8; i++, p += 4)
		s->key[i] = p[0] | p[1] << 8 | p[2] << 16 | (uint32_t)p[3] << 24;
}

static void refill(struct state *s)
{
	uint32_t c;

	for (c = 0; c < BUFSZ / 64; c++)
		block(s->key, c, s->buf + 64 * c);
	load_key(s, s->buf);
	explicit_bzero(s->buf, KEYSZ);
	s->have = BUFSZ - KEYSZ;
}

static int stir(struct state *s)
{
	uint8_t fresh[KEYSZ];
	size_t got = 0;
	int i;

	while (got < sizeof fresh) {
		ssize_t n = getrandom(fresh + got, sizeof fresh - got, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return -1;
		got += (size_t)n;
	}
	/* Mix in, do not replace: should the kernel ever hand us zeros we are no worse off than before. */
	for (i = 0; i < KEYSZ; i += 4) {
		uint32_t w;

		memcpy(&w, fresh + i, 4);
		s->key[i / 4] ^= w;
	}
	explicit_bzero(fresh, sizeof fresh);
	refill(s);
	s->budget = RESEED_AFTER;
	return 0;
}

static struct state *get_state(void)
{
	if (!self) {
		size_t page = (size_t)sysconf(_SC_PAGESIZE);
		size_t len = (sizeof *self + page - 1) / page * page;
		void *m = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

		if (m == MAP_FAILED)
			return NULL;
		if (madvise(m, len, MADV_WIPEONFORK) < 0) {
			/* Kernels before 4.14. Refusing is better than two processes sharing one stream. */
			munmap(m, len);
			errno = ENOTSUP;
			return NULL;
		}
		(void)madvise(m, len, MADV_DONTDUMP);
		(void)mlock(m, len);
		self = m;
	}
	if (self->canary == 0 || self->budget == 0) {
		if (stir(self) < 0)
			return NULL;
		self->canary = 0x5eed5eed;
	}
	return self;
}

int drbg_bytes(void *out, size_t n)
{
	uint8_t *p = out;

	while (n) {
		struct state *s = get_state();
		size_t take;

		if (!s)
			return -1;
		if (s->have == 0)
			refill(s);
		take = n < s->have ? n : s->have;
		if (take > s->budget)
			take = s->budget;
		memcpy(p, s->buf + BUFSZ - s->have, take);
		explicit_bzero(s->buf + BUFSZ - s->have, take);
		s->have -= take;
		s->budget -= take;
		p += take;
		n -= take;
	}
	return 0;
}

/* Uniform in [0, bound). Multiplication instead of modulo; the rejection is almost never taken. */
uint32_t drbg_below(uint32_t bound)
{
	uint32_t r, threshold;
	uint64_t m;

	if (bound < 2)
		return 0;
	threshold = -bound % bound;
	do {
		if (drbg_bytes(&r, sizeof r) < 0)
			abort();	/* callers draw session ids with this; there is no safe answer */
		m = (uint64_t)r * bound;
	} while ((uint32_t)m < threshold);
	return m >> 32;
}
