/* Bellows: a harmonium reed as an LV2 instrument.
 *
 * A free reed is a cantilever driven by the pressure drop over its slot. We solve one mass-spring-damper
 * per sounding note, with the air flow through the slot as the nonlinear part, at twice the host's rate.
 * The bellows themselves are a leaky capacitor: every open valve lets pressure out, the pump port adds it.
 */
#include <lv2/atom/util.h>
#include <lv2/core/lv2.h>
#include <lv2/midi/midi.h>
#include <lv2/urid/urid.h>

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BELLOWS_URI "urn:example:bellows"
#define VOICES 24

enum port { P_MIDI, P_PUMP, P_LEAK, P_BUZZ, P_LEFT, P_RIGHT, P_PRESSURE };

struct reed {
	uint8_t key;
	bool open;		/* valve is up */
	float gate;		/* 0..1, valves take a few milliseconds */
	float x, v;		/* tip displacement and velocity, in slot widths */
	float w2;		/* stiffness / mass */
	float damp;
	float pan;
};

struct bellows {
	const LV2_Atom_Sequence *midi;
	const float *pump, *leak, *buzz;
	float *left, *right, *pressure_out;

	LV2_URID midi_event;
	float dt;
	float pressure;
	float dc_x[2], dc_y[2];
	struct reed reed[VOICES];
};

static LV2_Handle instantiate(const LV2_Descriptor *d, double rate, const char *path,
			      const LV2_Feature *const *features)
{
	LV2_URID_Map *map = NULL;
	struct bellows *b;

	(void)d; (void)path;
	for (; *features; features++)
		if (!strcmp((*features)->URI, LV2_URID__map))
			map = (*features)->data;
	if (!map || !(b = calloc(1, sizeof *b)))
		return NULL;
	b->midi_event = map->map(map->handle, LV2_MIDI__MidiEvent);
	b->dt = (float)(0.5 / rate);
	return b;
}

static void connect_port(LV2_Handle h, uint32_t port, void *data)
{
	struct bellows *b = h;

	switch ((enum port)port) {
	case P_MIDI:     b->midi = data; break;
	case P_PUMP:     b->pump = data; break;
	case P_LEAK:     b->leak = data; break;
	case P_BUZZ:     b->buzz = data; break;
	case P_LEFT:     b->left = data; break;
	case P_RIGHT:    b->right = data; break;
	case P_PRESSURE: b->pressure_out = data; break;
	}
}

static void activate(LV2_Handle h)
{
	struct bellows *b = h;

	b->pressure = 0;
	memset(b->reed, 0, sizeof b->reed);
	memset(b->dc_x, 0, sizeof b->dc_x);
	memset(b->dc_y, 0, sizeof b->dc_y);
}

static struct reed *pick(struct bellows *b, uint8_t key)
{
	struct reed *best = &b->reed[0];
	int i;

	for (i = 0; i < VOICES; i++) {
		struct reed *r = &b->reed[i];

		if (r->key == key && r->gate > 0)
			return r;	/* the same tongue of brass: it keeps its motion */
		if (r->gate < best->gate || (best->open && !r->open))
			best = r;
	}
	return best;
}

static void note_on(struct bellows *b, uint8_t key)
{
	struct reed *r = pick(b, key);
	float f = 440.0f * exp2f((key - 69) / 12.0f);

	if (r->key != key || r->gate <= 0) {
		memset(r, 0, sizeof *r);
		r->key = key;
		r->x = 0.01f;		/* a reed at perfect rest would never start */
	}
	r->w2 = 4 * (float)(M_PI * M_PI) * f * f;
	r->damp = 0.012f * 2 * (float)M_PI * f;
	r->pan = fminf(fmaxf((key - 36) / 60.0f, 0), 1);
	r->open = true;
}

static void midi_in(struct bellows *b, const uint8_t *m, uint32_t size)
{
	int i;

	if (size < 3)
		return;
	switch (lv2_midi_message_type(m)) {
	case LV2_MIDI_MSG_NOTE_ON:
		if (m[2]) {
			note_on(b, m[1]);
			break;
		}
		/* fallthrough */
	case LV2_MIDI_MSG_NOTE_OFF:
		for (i = 0; i < VOICES; i++)
			if (b->reed[i].key == m[1])
				b->reed[i].open = false;
		break;
	case LV2_MIDI_MSG_CONTROLLER:
		if (m[1] == LV2_MIDI_CTL_ALL_NOTES_OFF)
			for (i = 0; i < VOICES; i++)
				b->reed[i].open = false;
		break;
	default:
		break;
	}
}

/* One half sample of one reed; returns the flow, which is what we hear. */
static float step(struct reed *r, float p, float dt, float buzz)
{
	float slot, flow, force;

	r->gate += ((r->open ? 1.0f : 0.0f) - r->gate) * dt * 180.0f;
	slot = 0.08f + fabsf(r->x - 0.35f);	/* the tongue rests a little above the slot */
	flow = r->gate * slot * sqrtf(fmaxf(p, 0));
	force = r->w2 * (0.9f * p * r->gate / (0.3f + slot) - r->x) - r->damp * r->v;
	/* hitting the plate: a stiff one-sided spring, the source of the rattle in old instruments */
	if (r->x > 1.2f)
		force -= r->w2 * buzz * 30.0f * (r->x - 1.2f);
	r->v += force * dt;			/* semi-implicit Euler keeps the energy where it is */
	r->x += r->v * dt;
	if (r->gate < 1e-4f && !r->open) {
		r->gate = 0;
		return 0;
	}
	return flow;
}

static float block_dc(float x, float *lx, float *ly)
{
	*ly = x - *lx + 0.9985f * *ly;
	*lx = x;
	return *ly;
}

static void render(struct bellows *b, uint32_t from, uint32_t to)
{
	uint32_t n;
	int half, i;

	for (n = from; n < to; n++) {
		float l = 0, r = 0;

		for (half = 0; half < 2; half++) {
			float used = 0;

			for (i = 0; i < VOICES; i++) {
				struct reed *d = &b->reed[i];
				float f;

				if (d->gate == 0 && !d->open)
					continue;
				f = step(d, b->pressure, b->dt, *b->buzz);
				used += f;
				l += f * (1 - 0.6f * d->pan);
				r += f * (0.4f + 0.6f * d->pan);
			}
			b->pressure += b->dt * (*b->pump * 3.0f - *b->leak * b->pressure - 0.25f * used);
			b->pressure = fminf(fmaxf(b->pressure, 0), 1.5f);
		}
		b->left[n] = 0.1f * block_dc(l, &b->dc_x[0], &b->dc_y[0]);
		b->right[n] = 0.1f * block_dc(r, &b->dc_x[1], &b->dc_y[1]);
	}
}

static void run(LV2_Handle h, uint32_t nsamples)
{
	struct bellows *b = h;
	uint32_t done = 0;

	LV2_ATOM_SEQUENCE_FOREACH(b->midi, ev) {
		uint32_t at = (uint32_t)ev->time.frames;

		render(b, done, at);
		done = at;
		if (ev->body.type == b->midi_event)
			midi_in(b, (const uint8_t *)(ev + 1), ev->body.size);
	}
	render(b, done, nsamples);
	*b->pressure_out = b->pressure;
}

static const LV2_Descriptor descriptor = {
	BELLOWS_URI, instantiate, connect_port, activate, run, NULL, free, NULL
};

LV2_SYMBOL_EXPORT const LV2_Descriptor *lv2_descriptor(uint32_t index)
{
	return index == 0 ? &descriptor : NULL;
}
