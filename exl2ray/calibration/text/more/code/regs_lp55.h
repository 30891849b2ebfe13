/* regs_lp55.h - register map of the LP-55 ambient light and proximity sensor, as wired on board revision C.
 *
 * Every register is 16 bits wide and sent high byte first. Fields are described once, as a pair
 * (position, width), and all masks, setters and getters follow from that pair; nobody has to keep
 * FOO_MASK and FOO_SHIFT in step by hand.
 */
#pragma once

#include <stdint.h>

#define LP55_I2C_ADDR           0x39    /* ADDR pin low; 0x49 when high */

/* ---- registers ------------------------------------------------------------------------------ */

#define LP55_ID                 0x00    /* R    reads 0x5501 (silicon A) or 0x5502 (silicon B) */
#define LP55_CTRL               0x01    /* R/W  power-on value 0x0001 */
#define LP55_ALS_CONF           0x02    /* R/W */
#define LP55_PROX_CONF          0x03    /* R/W */
#define LP55_ALS_LOW            0x04    /* R/W  interrupt below this count */
#define LP55_ALS_HIGH           0x05    /* R/W  interrupt above this count */
#define LP55_ALS_DATA           0x08    /* R    latched by reading LP55_STATUS */
#define LP55_PROX_DATA          0x09    /* R    likewise */
#define LP55_STATUS             0x0a    /* R    reading clears the interrupt line */

/* ---- fields: position of the lowest bit, number of bits --------------------------------------- */

#define LP55_CTRL_SHUTDOWN      0, 1
#define LP55_CTRL_RESET         1, 1    /* clears itself after 300 us */
#define LP55_CTRL_PERSIST       4, 3    /* enum lp55_persist */

#define LP55_ALS_CONF_ENABLE    0, 1
#define LP55_ALS_CONF_GAIN      2, 2    /* enum lp55_gain */
#define LP55_ALS_CONF_TIME      6, 3    /* 25 ms << n, n up to 5 */
#define LP55_ALS_CONF_INT       15, 1

#define LP55_PROX_CONF_ENABLE   0, 1
#define LP55_PROX_CONF_CURRENT  4, 3    /* (n + 1) * 25 mA through the infrared diode */
#define LP55_PROX_CONF_PULSES   8, 5    /* 1 to 31; 0 is documented as "reserved" and means 32 */

#define LP55_STATUS_ALS_READY   0, 1
#define LP55_STATUS_PROX_READY  1, 1
#define LP55_STATUS_SATURATED   5, 1
#define LP55_STATUS_FAULT       12, 4

/* ---- the machinery ---------------------------------------------------------------------------
 *
 * LP55_FIELD_MASK(LP55_ALS_CONF_GAIN) has one argument that turns into two only after expansion,
 * hence the detour through variadic helpers.
 */
#define LP55_MASK_(pos, width)          ((uint16_t)(((1u << (width)) - 1u) << (pos)))
#define LP55_PREP_(pos, width, val)     ((uint16_t)(((unsigned)(val) << (pos)) & LP55_MASK_(pos, width)))
#define LP55_GET_(pos, width, reg)      ((uint16_t)((reg) >> (pos)) & ((1u << (width)) - 1u))

#define LP55_CALL_(macro, ...)          macro(__VA_ARGS__)
#define LP55_FIELD_MASK(field)          LP55_CALL_(LP55_MASK_, field)
#define LP55_FIELD(field, val)          LP55_CALL_(LP55_PREP_, field, val)
#define LP55_FIELD_GET(field, reg)      LP55_CALL_(LP55_GET_, field, reg)

/* reg with one field replaced:  conf = LP55_WITH(conf, LP55_ALS_CONF_GAIN, LP55_GAIN_X4); */
#define LP55_WITH_(reg, pos, width, val) \
    ((uint16_t)(((reg) & ~(unsigned)LP55_MASK_(pos, width)) | LP55_PREP_(pos, width, val)))
#define LP55_WITH(reg, field, val)      LP55_CALL_(LP55_WITH_, reg, field, val)

enum lp55_gain {
    LP55_GAIN_X1,
    LP55_GAIN_X4,
    LP55_GAIN_X16,
    LP55_GAIN_X64,
};

enum lp55_persist {
    LP55_PERSIST_1,         /* interrupt on the first sample out of the window */
    LP55_PERSIST_2,
    LP55_PERSIST_4,
    LP55_PERSIST_8,
};

/* Counts are linear in light and in gain * time: at x1 and 100 ms one count is 36 millilux
 * behind clear glass. The smoked cover of revision C lets through two ninths of it. */
#define LP55_MLUX_PER_COUNT_100MS       36u
#define LP55_COVER_NUM                  9u
#define LP55_COVER_DEN                  2u

static inline uint32_t lp55_millilux(uint16_t counts, uint16_t als_conf)
{
    unsigned gain_shift = 2u * LP55_FIELD_GET(LP55_ALS_CONF_GAIN, als_conf);
    unsigned time_shift = LP55_FIELD_GET(LP55_ALS_CONF_TIME, als_conf);
    /* 65535 * 36 * 9 * 4 / 2 stays below 2^26, so the order of operations is safe in 32 bits. */
    uint32_t v = (uint32_t)counts * LP55_MLUX_PER_COUNT_100MS * LP55_COVER_NUM * 4u / LP55_COVER_DEN;
    return v >> (gain_shift + time_shift);
}

_Static_assert(LP55_FIELD_MASK(LP55_ALS_CONF_TIME) == 0x01c0, "field macro broken");
_Static_assert(LP55_WITH(0xffff, LP55_PROX_CONF_PULSES, 4) == 0xe4ff, "replace macro broken");
