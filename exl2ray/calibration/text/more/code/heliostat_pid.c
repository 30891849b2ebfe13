/* Heliostat axis control, fixed point, 1 kHz.
 *
 * Q16.16 throughout: angle in degrees, speed in degrees per second, drive in fractions of full PWM.
 * The worm gear has 0.08 degrees of backlash, and wind pushes the mirror across it, so a plain PID
 * hunts all day. Inside the dead band we hold the integrator and let the gear rest.
 */
#include <limits.h>
#include "heliostat.h"

typedef int32_t q16;

#define Q(x)        ((q16)((x) * 65536.0 + ((x) < 0 ? -0.5 : 0.5)))   /* constants only */
#define Q_ONE       65536

#define DT_SHIFT    10          /* we pretend a tick is 1/1024 s; the 2.4 % goes into the gains */
#define DEAD_BAND   Q(0.05)
#define WAKE_BAND   Q(0.11)
#define MAX_SPEED   Q(1.6)
#define MAX_ACCEL   Q(0.9)
#define STALL_DRIVE Q(0.85)
#define STALL_TICKS 1500

struct axis {
    q16 target;
    q16 ref_pos, ref_vel;       /* trapezoid profile, what we ask of the loop right now */
    q16 integ;
    q16 prev_meas;
    q16 vel_filt;
    q16 drive;
    uint16_t stall;
    uint8_t resting;
    uint8_t fault;
};

static struct axis axes[AXIS_COUNT];

static const struct gains {
    q16 kp, ki, kd, kff;
} gains[AXIS_COUNT] = {
    [AXIS_AZIMUTH]   = { Q(2.4), Q(0.60), Q(0.15), Q(0.42) },
    [AXIS_ELEVATION] = { Q(3.1), Q(0.95), Q(0.22), Q(0.42) },
};

static inline q16 qmul(q16 a, q16 b)
{
    return (q16)(((int64_t)a * b) >> 16);
}

static inline q16 clampq(q16 v, q16 lo, q16 hi)
{
    return v < lo ? lo : v > hi ? hi : v;
}

static inline q16 qabs(q16 v)
{
    return v < 0 ? -v : v;
}

/* Azimuth wraps; the shortest way round is limited by the cable twist guard in the planner, not here. */
static q16 shortest(q16 d)
{
    while (d > Q(180.0))
        d -= Q(360.0);
    while (d < Q(-180.0))
        d += Q(360.0);
    return d;
}

static void profile(struct axis *a)
{
    q16 left = a->target - a->ref_pos;
    /* distance needed to stop from ref_vel: v^2 / 2a */
    q16 stop = (q16)((((int64_t)a->ref_vel * a->ref_vel) / (2 * (int64_t)MAX_ACCEL)));
    q16 want = left > 0 ? MAX_SPEED : left < 0 ? -MAX_SPEED : 0;
    q16 step = MAX_ACCEL >> DT_SHIFT;

    if (qabs(left) <= stop && ((left > 0) == (a->ref_vel > 0)))
        want = 0;
    a->ref_vel += clampq(want - a->ref_vel, -step, step);

    /* Snap when both are below one step, otherwise the profile circles the target for ever. */
    if (qabs(left) < Q(0.002) && qabs(a->ref_vel) <= 2 * step) {
        a->ref_pos = a->target;
        a->ref_vel = 0;
        return;
    }
    a->ref_pos += a->ref_vel >> DT_SHIFT;
}

static q16 control(struct axis *a, const struct gains *g, q16 meas)
{
    q16 err = shortest(a->ref_pos - meas);
    q16 vel = (meas - a->prev_meas) << DT_SHIFT;
    q16 u;

    a->prev_meas = meas;
    /* 12-bit encoder: one count per tick would read as 90 degrees per second. Filter hard. */
    a->vel_filt += (vel - a->vel_filt) >> 6;

    if (a->resting) {
        if (qabs(err) < WAKE_BAND && a->ref_vel == 0)
            return 0;
        a->resting = 0;
    } else if (qabs(err) < DEAD_BAND && a->ref_vel == 0 && qabs(a->vel_filt) < Q(0.02)) {
        a->resting = 1;
        return 0;
    }

    u = qmul(g->kp, err) + a->integ + qmul(g->kff, a->ref_vel) - qmul(g->kd, a->vel_filt - a->ref_vel);

    /* Integrate only if that would not push further into saturation. */
    if ((u < Q_ONE || err < 0) && (u > -Q_ONE || err > 0))
        a->integ = clampq(a->integ + (qmul(g->ki, err) >> DT_SHIFT), -Q(0.5), Q(0.5));

    return clampq(u, -Q_ONE, Q_ONE);
}

static void supervise(struct axis *a, unsigned n)
{
    if (qabs(a->drive) > STALL_DRIVE && qabs(a->vel_filt) < Q(0.01)) {
        if (++a->stall >= STALL_TICKS) {
            a->fault = 1;
            a->drive = 0;
            log_event(EV_AXIS_STALLED, n);      /* bird, ice, or somebody's ladder */
        }
    } else if (a->stall > 0) {
        a->stall--;
    }
}

/* Called from the 1 kHz timer interrupt, both axes in about 11 us. */
void heliostat_tick(void)
{
    for (unsigned n = 0; n < AXIS_COUNT; n++) {
        struct axis *a = &axes[n];

        if (a->fault) {
            pwm_set(n, 0);
            continue;
        }
        profile(a);
        a->drive = control(a, &gains[n], encoder_degrees_q16(n));
        supervise(a, n);
        pwm_set(n, (int16_t)(a->drive >> 6));   /* the timer counts to 1024 */
    }
}

void heliostat_aim(unsigned n, q16 degrees)
{
    uint32_t key = irq_save();

    if (n == AXIS_ELEVATION)
        degrees = clampq(degrees, Q(4.0), Q(88.5));
    axes[n].target = axes[n].ref_pos + shortest(degrees - axes[n].ref_pos);
    irq_restore(key);
}

void heliostat_clear_fault(unsigned n)
{
    uint32_t key = irq_save();
    struct axis *a = &axes[n];
    q16 here = encoder_degrees_q16(n);

    /* Start from where the mirror is, not from where it was told to be when it jammed. */
    *a = (struct axis){ .target = here, .ref_pos = here, .prev_meas = here, .resting = 1 };
    irq_restore(key);
}
