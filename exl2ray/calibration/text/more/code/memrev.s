# memrev.s - reverse a block of bytes in place (x86-64, System V ABI, GNU as, AT&T syntax)
#
#   void  memrev(void *p, size_t n);
#   size_t strip_cr(char *p, size_t n);     drop every CR that stands before an LF, return the new length
#
#       cc -c memrev.s && cc demo.c memrev.o
#
# The vector loop needs SSSE3 (pshufb), which every 64-bit desktop since 2008 has; there is no dispatch.

        .section .rodata
        .p2align 4
.Lflip: .byte   15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0

        .text
        .globl  memrev
        .type   memrev, @function
        .p2align 4
memrev:
        # rdi = left end, rsi = right end (one past)
        addq    %rdi, %rsi
        movdqa  .Lflip(%rip), %xmm2

        # While 32 bytes or more remain, take 16 from each end, flip both, and store them crosswise.
.Lwide:
        movq    %rsi, %rax
        subq    %rdi, %rax
        cmpq    $32, %rax
        jb      .Leight
        movdqu  (%rdi), %xmm0
        movdqu  -16(%rsi), %xmm1
        pshufb  %xmm2, %xmm0
        pshufb  %xmm2, %xmm1
        movdqu  %xmm1, (%rdi)
        movdqu  %xmm0, -16(%rsi)
        addq    $16, %rdi
        subq    $16, %rsi
        jmp     .Lwide

        # The same once with 8 bytes from each end, in general registers.
.Leight:
        cmpq    $16, %rax
        jb      .Lbytes
        movq    (%rdi), %rcx
        movq    -8(%rsi), %rdx
        bswapq  %rcx
        bswapq  %rdx
        movq    %rdx, (%rdi)
        movq    %rcx, -8(%rsi)
        addq    $8, %rdi
        subq    $8, %rsi

        # At most 15 bytes are left in the middle.
.Lbytes:
        decq    %rsi
        cmpq    %rsi, %rdi
        jae     .Ldone
        movb    (%rdi), %al
        movb    (%rsi), %cl
        movb    %cl, (%rdi)
        movb    %al, (%rsi)
        incq    %rdi
        jmp     .Lbytes
.Ldone:
        ret
        .size   memrev, . - memrev

        .globl  strip_cr
        .type   strip_cr, @function
        .p2align 4
strip_cr:
        # rdi = read, rdx = write, rsi = end, r8 = start
        movq    %rdi, %rdx
        movq    %rdi, %r8
        addq    %rdi, %rsi
        cmpq    %rsi, %rdi
        je      .Lempty
.Lnext:
        movb    (%rdi), %al
        incq    %rdi
        movb    %al, (%rdx)             # store first; a dropped CR is simply overwritten by what follows
        cmpb    $13, %al
        je      .Lcr
.Lkeep:
        incq    %rdx
        cmpq    %rsi, %rdi
        jne     .Lnext
.Lempty:
        movq    %rdx, %rax
        subq    %r8, %rax
        ret
.Lcr:
        cmpq    %rsi, %rdi              # a CR at the very end stays: its LF may be in the next block
        je      .Lkeep
        cmpb    $10, (%rdi)
        jne     .Lkeep
        jmp     .Lnext
        .size   strip_cr, . - strip_cr

        .section .note.GNU-stack, "", @progbits
