# First code after reset on the Wren board: RV32IMC, two harts, 64 KiB of tightly coupled memory.
#
# The ROM jumps here with a0 = hart number and everything else undefined, including sp and gp.
# Hart 0 brings the memory up and wakes hart 1, which sleeps in wfi until its mailbox is non-zero.
# Interrupts stay off until the C side enables them.

#define CSR_MTVEC   0x305
#define CSR_MSTATUS 0x300
#define CSR_MIE     0x304
#define CSR_MCAUSE  0x342
#define CSR_MEPC    0x341

#define STACK_SIZE  2048
#define MAILBOX     0x2000fff0
#define CLINT_MSIP1 0x02000004
#define WDT_FEED    0x40003008
#define WDT_KEY     0x0d09f00d

        .section .text.boot, "ax", @progbits
        .global _start
        .type   _start, @function
_start:
        csrw    CSR_MIE, zero
        csrci   CSR_MSTATUS, 8

        # gp must be set without relaxation, or the linker rewrites this very instruction to use gp
        .option push
        .option norelax
        la      gp, __global_pointer$
        .option pop

        la      t0, trap_entry
        csrw    CSR_MTVEC, t0           # direct mode, bits 1:0 are zero by alignment

        # sp = end of stacks - hart * STACK_SIZE
        la      sp, __stacks_end
        li      t1, STACK_SIZE
        mul     t1, t1, a0
        sub     sp, sp, t1

        bnez    a0, park

# --- hart 0 only -----------------------------------------------------------------------------------
        la      a1, __data_load
        la      a2, __data_start
        la      a3, __data_end
        bgeu    a2, a3, 2f
1:      lw      t0, 0(a1)
        sw      t0, 0(a2)
        addi    a1, a1, 4
        addi    a2, a2, 4
        bltu    a2, a3, 1b

2:      la      a2, __bss_start
        la      a3, __bss_end
        bgeu    a2, a3, 4f
3:      sw      zero, 0(a2)
        addi    a2, a2, 4
        bltu    a2, a3, 3b

        # The watchdog has been running since power-on; clearing 48 KiB at 8 MHz took a third of it.
4:      li      t0, WDT_FEED
        li      t1, WDT_KEY
        sw      t1, 0(t0)

        # Constructors, in order. s1/s2 survive the calls by the ABI.
        la      s1, __init_array_start
        la      s2, __init_array_end
5:      bgeu    s1, s2, 6f
        lw      t0, 0(s1)
        jalr    t0
        addi    s1, s1, 4
        j       5b

6:      li      t0, MAILBOX
        la      t1, second_main
        fence   rw, w                   # .data and .bss before the flag
        sw      t1, 0(t0)
        li      t0, CLINT_MSIP1
        li      t1, 1
        sw      t1, 0(t0)

        call    main
        # main must not return; if it does, stop feeding the dog and let it bite.
hang:   wfi
        j       hang
        .size   _start, . - _start

# --- hart 1 ----------------------------------------------------------------------------------------
# The mailbox lies in RAM that keeps its contents over a warm reset, so a stale value from the last
# run may be there: wait for the software interrupt to be pending as well.
park:
        li      s0, MAILBOX
        li      s1, CLINT_MSIP1
        li      t0, 8
        csrw    CSR_MIE, t0             # msie; with mstatus.mie clear it wakes wfi without trapping
7:      wfi
        lw      t0, 0(s1)
        beqz    t0, 7b
        lw      t1, 0(s0)
        beqz    t1, 7b
        sw      zero, 0(s1)
        csrw    CSR_MIE, zero
        fence   r, rw
        jr      t1

# --- traps -----------------------------------------------------------------------------------------
# Caller-saved registers only; the handler is plain C. 16 words keep the stack 16-byte aligned.
        .balign 4
        .global trap_entry
        .type   trap_entry, @function
trap_entry:
        addi    sp, sp, -64
        sw      ra,  0(sp)
        sw      t0,  4(sp)
        sw      t1,  8(sp)
        sw      t2, 12(sp)
        sw      a0, 16(sp)
        sw      a1, 20(sp)
        sw      a2, 24(sp)
        sw      a3, 28(sp)
        sw      a4, 32(sp)
        sw      a5, 36(sp)
        sw      a6, 40(sp)
        sw      a7, 44(sp)
        sw      t3, 48(sp)
        sw      t4, 52(sp)
        sw      t5, 56(sp)
        sw      t6, 60(sp)

        csrr    a0, CSR_MCAUSE
        csrr    a1, CSR_MEPC
        mv      a2, sp                  # lets the crash dump print the saved registers
        bltz    a0, 8f                  # top bit: interrupt
        call    exception_c             # returns the pc to resume at (a breakpoint skips itself)
        csrw    CSR_MEPC, a0
        j       9f
8:      slli    a0, a0, 1
        srli    a0, a0, 1
        call    interrupt_c

9:      lw      ra,  0(sp)
        lw      t0,  4(sp)
        lw      t1,  8(sp)
        lw      t2, 12(sp)
        lw      a0, 16(sp)
        lw      a1, 20(sp)
        lw      a2, 24(sp)
        lw      a3, 28(sp)
        lw      a4, 32(sp)
        lw      a5, 36(sp)
        lw      a6, 40(sp)
        lw      a7, 44(sp)
        lw      t3, 48(sp)
        lw      t4, 52(sp)
        lw      t5, 56(sp)
        lw      t6, 60(sp)
        addi    sp, sp, 64
        mret
        .size   trap_entry, . - trap_entry
