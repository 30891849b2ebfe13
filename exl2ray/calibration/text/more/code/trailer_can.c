/*
 * trailer_can.c
 *
 * Lighting node at the rear of an agricultural trailer. CAN 2.0B, 250 kbit/s, 29-bit identifiers.
 *
 * Safe state: if no lighting command has been seen for 300 ms the side lights go on, everything else
 * off. A trailer that vanishes in the dusk is worse than one whose lights will not turn off.
 *
 * MISRA deviations are marked DEV-n and listed in doc/deviations.md.
 */

#include "can_drv.h"
#include "lamp_drv.h"
#include "nv.h"
#include "trailer_can.h"

/* 29-bit identifier: priority(3) reserved(1) page(1) format(8) specific(8) source(8) */
#define ID_PRIO(id)        (uint8_t)(((id) >> 26) & 0x07u)
#define ID_PF(id)          (uint8_t)(((id) >> 16) & 0xFFu)
#define ID_PS(id)          (uint8_t)(((id) >> 8) & 0xFFu)
#define ID_SA(id)          (uint8_t)((id) & 0xFFu)

#define PF_LIGHTING        0xF1u
#define PF_REQUEST         0xEAu
#define PF_ADDR_CLAIM      0xEEu
#define ADDR_NULL          0xFEu
#define ADDR_GLOBAL        0xFFu

#define CMD_TIMEOUT_MS     300u
#define FLASH_HALF_MS      333u        /* 90 per minute; the regulation allows 60 to 120 */
#define STATUS_PERIOD_MS   1000u

typedef enum {
    ADDR_UNCLAIMED,
    ADDR_CLAIMING,
    ADDR_OWNED,
    ADDR_LOST
} addr_state_t;

typedef struct {
    addr_state_t addr_state;
    uint8_t      my_addr;
    uint32_t     claim_at;
    uint32_t     last_cmd_at;
    uint32_t     flash_at;
    uint32_t     status_at;
    uint8_t      flash_on;
    uint8_t      wanted;          /* LAMP_x bits as commanded */
    uint8_t      broken;          /* LAMP_x bits with open-load diagnosis */
    uint8_t      timed_out;
    uint8_t      name[8];         /* little-endian, arbitration by lowest value */
} node_t;

static node_t node;

/* Two bits per lamp in the command: 00 off, 01 on, 10 error, 11 don't care. */
static void apply_two_bits(uint8_t field, uint8_t lamp)
{
    switch (field & 0x03u) {
    case 0u:
        node.wanted &= (uint8_t)~lamp;
        break;
    case 1u:
        node.wanted |= lamp;
        break;
    default:
        /* 10 and 11 leave the lamp as it is */
        break;
    }
}

static void on_lighting(const can_frame_t *f, uint32_t now)
{
    if (f->dlc < 3u) {
        return;
    }
    apply_two_bits(f->data[0], LAMP_SIDE);
    apply_two_bits(f->data[0] >> 2, LAMP_BRAKE);
    apply_two_bits(f->data[0] >> 4, LAMP_LEFT);
    apply_two_bits(f->data[0] >> 6, LAMP_RIGHT);
    apply_two_bits(f->data[1], LAMP_REVERSE);
    apply_two_bits(f->data[1] >> 2, LAMP_FOG);
    apply_two_bits(f->data[2] >> 6, LAMP_BEACON);
    node.last_cmd_at = now;
    node.timed_out = 0u;
}

static int8_t compare_name(const uint8_t *theirs)
{
    uint8_t i = 8u;

    while (i > 0u) {
        i--;
        if (theirs[i] != node.name[i]) {
            return (theirs[i] < node.name[i]) ? -1 : 1;
        }
    }
    return 0;
}

static void send_claim(uint8_t source)
{
    can_frame_t f;
    uint8_t i;

    f.id = (6uL << 26) | ((uint32_t)PF_ADDR_CLAIM << 16) | ((uint32_t)ADDR_GLOBAL << 8) | source;
    f.dlc = 8u;
    for (i = 0u; i < 8u; i++) {
        f.data[i] = node.name[i];
    }
    (void)can_send(&f);   /* DEV-3: a lost claim is repeated on the next request */
}

static void on_address_claim(const can_frame_t *f, uint32_t now)
{
    int8_t order;

    if ((ID_SA(f->id) != node.my_addr) || (f->dlc != 8u)) {
        return;
    }
    order = compare_name(f->data);
    if (order > 0) {
        send_claim(node.my_addr);           /* ours is lower: we keep it and say so */
    } else if (order < 0) {
        /* Self-configurable range for trailers. Wraps once, then give up until power cycle. */
        node.my_addr++;
        if (node.my_addr > TRAILER_ADDR_LAST) {
            node.addr_state = ADDR_LOST;
            send_claim(ADDR_NULL);
        } else {
            node.addr_state = ADDR_CLAIMING;
            node.claim_at = now;
            send_claim(node.my_addr);
        }
    } else {
        /* Same name: two boards with the same serial number, a production fault. Stay silent. */
        nv_count(NV_DUPLICATE_NAME);
        node.addr_state = ADDR_LOST;
    }
}

static void drive_lamps(uint32_t now)
{
    uint8_t out;

    if ((now - node.last_cmd_at) > CMD_TIMEOUT_MS) {
        if (node.timed_out == 0u) {
            node.timed_out = 1u;
            nv_count(NV_CMD_TIMEOUT);
        }
        node.wanted = LAMP_SIDE;
    }

    out = (uint8_t)(node.wanted & (uint8_t)~(LAMP_LEFT | LAMP_RIGHT));
    if ((node.wanted & (LAMP_LEFT | LAMP_RIGHT)) == 0u) {
        node.flash_on = 1u;                 /* next flash starts lit, without delay */
        node.flash_at = now;
    } else {
        if ((now - node.flash_at) >= FLASH_HALF_MS) {
            node.flash_at += FLASH_HALF_MS;
            node.flash_on ^= 1u;
        }
        if (node.flash_on != 0u) {
            out |= (uint8_t)(node.wanted & (LAMP_LEFT | LAMP_RIGHT));
        }
    }
    lamp_write(out);
    node.broken = lamp_open_load();
}

static void send_status(void)
{
    can_frame_t f;

    f.id = (6uL << 26) | (0xFF21uL << 8) | node.my_addr;
    f.dlc = 4u;
    f.data[0] = node.wanted;
    f.data[1] = node.broken;
    f.data[2] = lamp_supply_100mv();
    f.data[3] = node.timed_out;
    (void)can_send(&f);
}

void trailer_poll(uint32_t now)
{
    can_frame_t f;

    while (can_receive(&f) != 0u) {
        uint8_t const pf = ID_PF(f.id);

        if ((pf == PF_LIGHTING) && (ID_PRIO(f.id) <= 3u)) {
            on_lighting(&f, now);
        } else if (pf == PF_ADDR_CLAIM) {
            on_address_claim(&f, now);
        } else if ((pf == PF_REQUEST) && (f.dlc >= 3u) && (f.data[1] == PF_ADDR_CLAIM)) {
            if ((ID_PS(f.id) == node.my_addr) || (ID_PS(f.id) == ADDR_GLOBAL)) {
                send_claim((node.addr_state == ADDR_LOST) ? ADDR_NULL : node.my_addr);
            }
        } else {
            /* not for us */
        }
    }

    if (node.addr_state == ADDR_UNCLAIMED) {
        node.my_addr = TRAILER_ADDR_FIRST;
        node.addr_state = ADDR_CLAIMING;
        node.claim_at = now;
        send_claim(node.my_addr);
    } else if ((node.addr_state == ADDR_CLAIMING) && ((now - node.claim_at) > 250u)) {
        node.addr_state = ADDR_OWNED;
    } else {
        /* settled */
    }

    drive_lamps(now);
    if ((node.addr_state == ADDR_OWNED) && ((now - node.status_at) >= STATUS_PERIOD_MS)) {
        node.status_at = now;
        send_status();
    }
}
