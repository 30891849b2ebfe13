#include "nmea_feed.h"

#include <string.h>

// Byte-at-a-time decoder for the position sentences a GPS receiver sends over a serial line.
// It lives in the bootloader of a sailing-regatta tracker: 2 KiB of RAM in all, no libc printf or
// strtod, no heap. Feed it from the UART interrupt; it returns true when `fix` has been renewed.
//
//   $GPRMC,142305.00,A,5427.1934,N,01008.9021,E,5.4,213.0,070624,,,A*51
//
// Fields are converted while they arrive, so the sentence itself is never stored. Everything goes
// into a scratch fix and is copied over only after the checksum was right.

enum state {
    HUNT,          // waiting for '$'
    TALKER,        // two letters nobody cares about: GP, GN, GA ...
    TYPE,          // three letters that say what follows
    FIELD,
    SUM_HIGH,
    SUM_LOW,
};

enum { RMC_TIME = 1, RMC_STATUS, RMC_LAT, RMC_NS, RMC_LON, RMC_EW, RMC_KNOTS, RMC_COURSE, RMC_DATE };

static int hex_value(uint8_t c)
{
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    return -1;
}

static void begin_field(struct nmea *m)
{
    m->whole = 0;
    m->frac = 0;
    m->frac_digits = 0;
    m->in_frac = false;
    m->letter = 0;
    m->length = 0;
}

// At most five decimals are kept. A hundred-thousandth of a minute is two centimetres, and the
// receiver's sixth digit is noise anyway.
static void take_char(struct nmea *m, uint8_t c)
{
    m->length++;
    if (c == '.') {
        m->in_frac = true;
    } else if (c >= '0' && c <= '9') {
        uint8_t d = c - '0';
        if (!m->in_frac) {
            m->whole = m->whole * 10 + d;
        } else if (m->frac_digits < 5) {
            m->frac = m->frac * 10 + d;
            m->frac_digits++;
        }
    } else {
        m->letter = c;
    }
}

static uint32_t frac_e5(const struct nmea *m)
{
    uint32_t v = m->frac;
    for (uint8_t i = m->frac_digits; i < 5; i++) v *= 10;
    return v;
}

// ddmm.mmmmm or dddmm.mmmmm, in units of 1e-7 degree. One minute is 1e7/60 of those; multiplying
// first would overflow 32 bits (59.99999 min = 5999999, times 1e7), hence the 5/3: 1e7/60/1e5 = 5/3.
static int32_t angle_e7(const struct nmea *m)
{
    uint32_t degrees = m->whole / 100;
    uint32_t minutes_e5 = m->whole % 100 * 100000u + frac_e5(m);
    return (int32_t)(degrees * 10000000u + (minutes_e5 * 5u + 1u) / 3u);
}

static void end_field(struct nmea *m)
{
    struct nmea_fix *w = &m->work;

    switch (m->field) {
    case RMC_TIME:
        w->hour = m->whole / 10000;
        w->minute = m->whole / 100 % 100;
        w->second = m->whole % 100;
        w->millis = frac_e5(m) / 100;
        break;
    case RMC_STATUS:
        w->valid = m->letter == 'A';
        break;
    case RMC_LAT:
        w->lat_e7 = angle_e7(m);
        break;
    case RMC_NS:
        if (m->letter == 'S') w->lat_e7 = -w->lat_e7;
        break;
    case RMC_LON:
        w->lon_e7 = angle_e7(m);
        break;
    case RMC_EW:
        if (m->letter == 'W') w->lon_e7 = -w->lon_e7;
        break;
    case RMC_KNOTS:
        // 1 kn = 1852 m / 3600 s = 514.444 mm/s
        w->speed_mm_s = (m->whole * 514444u + frac_e5(m) * 5u + frac_e5(m) / 7u) / 1000u;
        break;
    case RMC_COURSE:
        // Empty when standing still; the old course is more useful to the display than north.
        if (m->length) w->course_cdeg = m->whole * 100 + frac_e5(m) / 1000;
        break;
    case RMC_DATE:
        w->day = m->whole / 10000;
        w->month = m->whole / 100 % 100;
        w->year = 2000 + m->whole % 100;
        break;
    }
}

void nmea_reset(struct nmea *m)
{
    memset(m, 0, sizeof *m);
    m->state = HUNT;
}

bool nmea_byte(struct nmea *m, uint8_t c)
{
    // A dollar sign always starts a new sentence, whatever was going on. It cannot occur inside one.
    if (c == '$') {
        if (m->state != HUNT) m->broken++;
        m->state = TALKER;
        m->count = 0;
        m->sum = 0;
        return false;
    }
    if (m->state == HUNT) return false;

    if (c == '*' && m->state == FIELD) {
        end_field(m);
        m->state = SUM_HIGH;
        return false;
    }
    if (m->state < SUM_HIGH) m->sum ^= c;

    switch (m->state) {
    case TALKER:
        if (++m->count == 2) {
            m->state = TYPE;
            m->count = 0;
        }
        break;

    case TYPE:
        if (m->count < 3) {
            if (c != "RMC"[m->count]) m->state = HUNT;   // some other sentence, not an error
            m->count++;
        } else if (c == ',') {
            m->work = m->fix;
            m->field = 1;
            begin_field(m);
            m->state = FIELD;
        } else {
            m->state = HUNT;
        }
        break;

    case FIELD:
        if (c == ',') {
            end_field(m);
            m->field++;
            begin_field(m);
        } else if (c < ' ' || m->length >= 12) {
            m->broken++;
            m->state = HUNT;
        } else {
            take_char(m, c);
        }
        break;

    case SUM_HIGH:
    case SUM_LOW: {
        int v = hex_value(c);
        uint8_t want = m->state == SUM_HIGH ? m->sum >> 4 : m->sum & 15;
        if (v != want) {
            m->broken++;
            m->state = HUNT;
        } else if (m->state == SUM_HIGH) {
            m->state = SUM_LOW;
        } else {
            m->state = HUNT;
            if (m->field < RMC_DATE) {
                m->broken++;
                return false;
            }
            m->fix = m->work;
            m->good++;
            return true;
        }
        break;
    }
    }
    return false;
}
