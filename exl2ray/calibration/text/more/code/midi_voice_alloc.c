/*
 * voice.c: voice allocation and the amplitude envelope
 *
 * Everything in here runs in the audio thread. No malloc, no locks, no
 * printf; parameters arrive through the ring in control.c.
 */
#include <assert.h>
#include <math.h>
#include <string.h>

#include "dsp.h"
#include "voice.h"

enum stage { OFF, ATTACK, DECAY, SUSTAIN, RELEASE, STEAL };

#define STEAL_SECONDS   0.003f
#define SILENCE         3.2e-5f         /* -90 dB */

struct voice {
	enum stage stage;
	unsigned char chan, key;
	unsigned held : 1;              /* key up but pedal down */
	unsigned age;                   /* tick of the note-on */
	float level, coef, target;
	float phase, incr;
	float vel;
	struct pending { unsigned char chan, key, vel; unsigned full : 1; } next;
};

static struct voice pool[NVOICES];
static unsigned ticks;
static float srate;
static unsigned char pedal[16];

static float
time2coef(float seconds)
{
	/* to within 1 % of the target after the given time */
	return seconds > 0 ? 1 - expf(-4.605f / (seconds * srate)) : 1;
}

static void
enter(struct voice *v, enum stage s, const struct patch *p)
{
	v->stage = s;
	switch (s) {
	case ATTACK:
		/* aim past the top, so that the curve arrives with some speed left */
		v->target = 1.3f;
		v->coef = time2coef(p->attack * 3.1f);
		break;
	case DECAY:
		v->target = p->sustain;
		v->coef = time2coef(p->decay);
		break;
	case SUSTAIN:
		v->target = p->sustain;
		break;
	case RELEASE:
		v->target = 0;
		v->coef = time2coef(p->release);
		break;
	case STEAL:
		v->target = 0;
		v->coef = time2coef(STEAL_SECONDS);
		break;
	case OFF:
		v->level = 0;
		break;
	}
}

static void
start(struct voice *v, int chan, int key, int vel, const struct patch *p)
{
	v->chan = chan;
	v->key = key;
	v->held = 0;
	v->age = ++ticks;
	v->vel = vel * vel / (127.0f * 127.0f);
	v->incr = 440.0f * exp2f((key - 69 + p->tune) / 12) / srate;
	v->phase = 0;
	enter(v, ATTACK, p);
}

/*
 * Which voice should go? A free one if there is any; else the quietest of
 * those in release; else the oldest, but not the lowest note sounding, as
 * the ear misses the bass first.
 */
static struct voice *
pick(void)
{
	struct voice *v, *rel = NULL, *old = NULL, *bass = NULL;

	for (v = pool; v < pool + NVOICES; v++) {
		if (v->stage == OFF)
			return v;
		if (v->stage == STEAL)
			continue;
		if (v->stage == RELEASE && (!rel || v->level < rel->level))
			rel = v;
		if (!bass || v->key < bass->key)
			bass = v;
	}
	if (rel)
		return rel;
	for (v = pool; v < pool + NVOICES; v++)
		if (v->stage != STEAL && v != bass && (!old || v->age < old->age))
			old = v;
	return old ? old : bass;
}

void
voice_init(float rate)
{
	memset(pool, 0, sizeof pool);
	memset(pedal, 0, sizeof pedal);
	srate = rate;
}

void
voice_noteon(int chan, int key, int vel, const struct patch *p)
{
	struct voice *v;

	if (vel == 0) {
		voice_noteoff(chan, key, p);
		return;
	}
	/* a key struck again while the pedal holds it takes over its own voice */
	for (v = pool; v < pool + NVOICES; v++)
		if (v->stage != OFF && v->chan == chan && v->key == key && v->held)
			goto take;
	if (!(v = pick()))
		return;                 /* all of them are fading; drop it */
take:
	if (v->stage == OFF) {
		start(v, chan, key, vel, p);
	} else {
		v->next.chan = chan;
		v->next.key = key;
		v->next.vel = vel;
		v->next.full = 1;
		enter(v, STEAL, p);
	}
}

void
voice_noteoff(int chan, int key, const struct patch *p)
{
	struct voice *v;

	for (v = pool; v < pool + NVOICES; v++) {
		if (v->next.full && v->next.chan == chan && v->next.key == key)
			v->next.full = 0;
		if (v->chan != chan || v->key != key)
			continue;
		if (v->stage == OFF || v->stage == RELEASE || v->stage == STEAL)
			continue;
		if (pedal[chan])
			v->held = 1;
		else
			enter(v, RELEASE, p);
	}
}

void
voice_pedal(int chan, int down, const struct patch *p)
{
	struct voice *v;

	pedal[chan] = down;
	if (down)
		return;
	for (v = pool; v < pool + NVOICES; v++)
		if (v->held && v->chan == chan) {
			v->held = 0;
			if (v->stage != STEAL)
				enter(v, RELEASE, p);
		}
}

void
voice_render(float *out, int n, const struct patch *p)
{
	struct voice *v;
	int i;

	memset(out, 0, n * sizeof *out);
	for (v = pool; v < pool + NVOICES; v++) {
		for (i = 0; i < n && v->stage != OFF; i++) {
			v->level += (v->target - v->level) * v->coef;
			if (v->stage == ATTACK && v->level >= 1)
				enter(v, DECAY, p);
			else if (v->stage >= RELEASE && v->level < SILENCE) {
				enter(v, OFF, p);
				if (v->next.full) {
					v->next.full = 0;
					start(v, v->next.chan, v->next.key, v->next.vel, p);
				}
				continue;
			}
			out[i] += dsp_polysaw(v->phase, v->incr) * v->level * v->vel;
			v->phase += v->incr;
			if (v->phase >= 1)
				v->phase -= 1;
		}
	}
}
