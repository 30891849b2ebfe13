/**
 ******************************************************************************
 * @file    pm_keypad.c
 * @brief   4x4 matrix keypad of the parking meter, scanned from the SysTick.
 *
 * Rows PB0..PB3 are driven low one at a time (open drain), columns PA4..PA7 are
 * read with pull-ups. A full scan takes four ticks of 1 ms. A key must read the
 * same for KP_STABLE scans before we believe it; the membrane bounces for up to
 * 9 ms when it is new and 23 ms after a winter on the promenade.
 ******************************************************************************
 */
#include "pm_board.h"
#include "pm_keypad.h"

#define KP_ROWS         4u
#define KP_COLS         4u
#define KP_STABLE       7u      /* 7 scans x 4 ms = 28 ms */
#define KP_REPEAT_FIRST 150u    /* scans: 600 ms */
#define KP_REPEAT_NEXT  30u
#define KP_FIFO_LEN     8u      /* power of two */

/* Legend of the overlay, drawing 30-1187 sheet 2. 'C' clears, 'E' is the green key. */
static const char kp_legend[KP_ROWS][KP_COLS] = {
    { '1', '2', '3', 'T' },
    { '4', '5', '6', 'L' },
    { '7', '8', '9', 'C' },
    { '*', '0', '#', 'E' },
};

static struct {
    uint16_t raw;               /* one bit per key, being assembled */
    uint16_t last;              /* previous complete scan */
    uint16_t state;             /* debounced */
    uint8_t  stable;
    uint8_t  row;
    uint16_t repeat;
    volatile uint8_t head;
    volatile uint8_t tail;
    char     fifo[KP_FIFO_LEN];
    uint16_t ghosts;            /* for the service menu */
    uint16_t dropped;
} kp;

static void kp_select_row(uint8_t row)
{
    /* BSRR: upper half resets, lower half sets. All rows released, then ours pulled low. */
    GPIOB->BSRR = 0x000Fu;
    GPIOB->BSRR = (uint32_t)(1u << row) << 16;
}

static uint8_t kp_popcount(uint16_t v)
{
    uint8_t n = 0;
    while (v != 0u) {
        v &= (uint16_t)(v - 1u);
        n++;
    }
    return n;
}

static void kp_emit(uint8_t key)
{
    uint8_t next = (uint8_t)((kp.head + 1u) & (KP_FIFO_LEN - 1u));

    if (next == kp.tail) {
        kp.dropped++;           /* main loop is busy printing; better lose a key than a coin */
        return;
    }
    kp.fifo[kp.head] = kp_legend[key / KP_COLS][key % KP_COLS];
    kp.head = next;
}

static void kp_evaluate(void)
{
    uint16_t pressed;

    if (kp.raw != kp.last) {
        kp.last = kp.raw;
        kp.stable = 0;
        return;
    }
    if (kp.stable < KP_STABLE) {
        kp.stable++;
        return;
    }

    /* Three corners of a rectangle close the fourth: there are no diodes on this board. */
    if (kp_popcount(kp.raw) > 2u) {
        kp.ghosts++;
        return;
    }

    pressed = (uint16_t)(kp.raw & (uint16_t)~kp.state);
    if (pressed != 0u) {
        for (uint8_t key = 0; key < KP_ROWS * KP_COLS; key++) {
            if (pressed & (1u << key)) {
                kp_emit(key);
            }
        }
        kp.repeat = KP_REPEAT_FIRST;
    } else if (kp.raw != 0u && kp.raw == kp.state && kp_popcount(kp.raw) == 1u) {
        if (--kp.repeat == 0u) {
            uint8_t key = 0;
            while (!(kp.raw & (1u << key))) {
                key++;
            }
            /* Only the time keys repeat. Holding E must not buy two tickets, see incident 0419. */
            char c = kp_legend[key / KP_COLS][key % KP_COLS];
            if (c == 'T' || c == 'L') {
                kp_emit(key);
            }
            kp.repeat = KP_REPEAT_NEXT;
        }
    }
    kp.state = kp.raw;
}

/** Called every millisecond in interrupt context. Worst case 3.1 us at 16 MHz. */
void KP_Tick(void)
{
    /* The row was selected one tick ago, so the long ribbon has had time to settle. */
    uint16_t cols = (uint16_t)(~(GPIOA->IDR >> 4) & 0x0Fu);

    kp.raw = (uint16_t)((kp.raw & ~(0x0Fu << (kp.row * KP_COLS))) | (cols << (kp.row * KP_COLS)));
    kp.row = (uint8_t)((kp.row + 1u) % KP_ROWS);
    if (kp.row == 0u) {
        kp_evaluate();
    }
    kp_select_row(kp.row);
}

/** @retval next key as a character, or 0 when nothing is waiting */
char KP_Get(void)
{
    char c;

    if (kp.head == kp.tail) {
        return 0;
    }
    c = kp.fifo[kp.tail];
    kp.tail = (uint8_t)((kp.tail + 1u) & (KP_FIFO_LEN - 1u));
    return c;
}

/** Wake-up from STOP mode: pull all rows low so that any key makes a falling edge on EXTI4..7. */
void KP_ArmWakeup(void)
{
    GPIOB->BSRR = 0x000F0000u;
    EXTI->PR   = 0x00F0u;
    EXTI->IMR |= 0x00F0u;
}

void KP_DisarmWakeup(void)
{
    EXTI->IMR &= ~0x00F0u;
    kp.row = 0;
    kp.stable = 0;
    kp_select_row(0);
}
