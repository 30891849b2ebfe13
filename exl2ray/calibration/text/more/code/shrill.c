/*
 * shrill.c -- sign-sign LMS audio compressor used by the pinball sound board
 *
 * Each slice holds 24 samples of one channel in 12 bytes:
 *
 *      4 bits   scale factor index
 *     20 bits   reserved, first slice of a frame stores a check here
 *     72 bits   24 residuals of 3 bits
 *
 * The predictor has four taps. Its weights are nudged by the sign of the history after every sample,
 * so decoder and encoder stay in step without any side information.  The encoder tries all sixteen scale
 * factors for each slice and keeps the one with the smallest squared error; that is brute force, and it
 * still runs at 300 times real time on the machine that builds the ROM.
 */
#include <assert.h>
#include <stdint.h>
#include <string.h>

#define TAPS		4
#define SLICE_SAMPLES	24
#define SLICE_BYTES	12

struct lms {
	int32_t hist[TAPS];
	int32_t w[TAPS];
};

static const uint16_t scales[16] = {
	1, 7, 21, 45, 84, 138, 211, 304, 421, 562, 731, 928, 1157, 1419, 1715, 2048
};

/* 3-bit codes: sign in the lowest bit, so that silence is code 0 */
static const int8_t steps4[8] = { 3, -3, 10, -10, 18, -18, 28, -28 };

static int32_t dequant[16][8];

static void init_tables(void)
{
	int s, q;

	for (s = 0; s < 16; s++)
		for (q = 0; q < 8; q++) {
			int32_t v = scales[s] * steps4[q];
			/* round half away from zero; a plain >> 2 would bias the negative codes */
			dequant[s][q] = v < 0 ? -((-v + 2) >> 2) : (v + 2) >> 2;
		}
}

static int32_t clamp16(int32_t v)
{
	return v < -32768 ? -32768 : v > 32767 ? 32767 : v;
}

static int32_t predict(const struct lms *l)
{
	int32_t sum = 0;
	int i;

	for (i = 0; i < TAPS; i++)
		sum += l->w[i] * l->hist[i];
	return sum >> 13;
}

static void adapt(struct lms *l, int32_t sample, int32_t residual)
{
	int32_t delta = residual >> 4;
	int i;

	for (i = 0; i < TAPS; i++)
		l->w[i] += l->hist[i] < 0 ? -delta : delta;
	memmove(l->hist, l->hist + 1, sizeof l->hist - sizeof l->hist[0]);
	l->hist[TAPS - 1] = sample;
}

static int nearest(int s, int32_t want)
{
	int q, best = 0;
	int32_t bestd = INT32_MAX;

	for (q = 0; q < 8; q++) {
		int32_t d = want - dequant[s][q];
		if (d < 0)
			d = -d;
		if (d < bestd) {
			bestd = d;
			best = q;
		}
	}
	return best;
}

/* Code one slice at a fixed scale. Gives up, returning UINT64_MAX, as soon as it is worse than limit. */
static uint64_t try_scale(struct lms *l, int s, const int16_t *pcm, int stride, uint8_t *codes, uint64_t limit)
{
	uint64_t err = 0;
	int n;

	for (n = 0; n < SLICE_SAMPLES; n++) {
		int32_t want = pcm[n * stride];
		int32_t p = predict(l);
		int q = nearest(s, want - p);
		int32_t got = clamp16(p + dequant[s][q]);
		int64_t e = want - got;

		err += (uint64_t)(e * e);
		if (err >= limit)
			return UINT64_MAX;
		codes[n] = (uint8_t)q;
		adapt(l, got, dequant[s][q]);
	}
	return err;
}

static void pack(uint8_t *out, int s, uint32_t check, const uint8_t *codes)
{
	int n;

	out[0] = (uint8_t)(s << 4 | (check >> 16 & 15));
	out[1] = (uint8_t)(check >> 8);
	out[2] = (uint8_t)check;
	for (n = 0; n < SLICE_SAMPLES; n += 8) {
		uint32_t w = 0;
		int k;

		for (k = 0; k < 8; k++)
			w = w << 3 | codes[n + k];
		out += 3;
		out[0] = (uint8_t)(w >> 16);
		out[1] = (uint8_t)(w >> 8);
		out[2] = (uint8_t)w;
	}
}

uint64_t shrill_encode_slice(struct lms *state, int *last_scale, const int16_t *pcm, int stride,
			     uint32_t check, uint8_t out[SLICE_BYTES])
{
	uint8_t codes[SLICE_SAMPLES], keep[SLICE_SAMPLES];
	struct lms winner = *state;
	uint64_t best = UINT64_MAX;
	int i, keep_scale = 0;

	if (!dequant[0][0])
		init_tables();

	/* Start at the scale that won last time: a good first guess makes the early exit bite sooner. */
	for (i = 0; i < 16; i++) {
		int s = (*last_scale + i) & 15;
		struct lms trial = *state;
		uint64_t e = try_scale(&trial, s, pcm, stride, codes, best);

		if (e < best) {
			best = e;
			winner = trial;
			keep_scale = s;
			memcpy(keep, codes, sizeof keep);
		}
	}
	assert(best != UINT64_MAX);
	*state = winner;
	*last_scale = keep_scale;
	pack(out, keep_scale, check, keep);
	return best;
}
