# utf8_count.s - number of code points in a UTF-8 string. x86-64, System V ABI, GNU as.
#
#     size_t utf8_count(const char *text /* rdi */, size_t bytes /* rsi */);
#
# A code point has exactly one byte that is not a continuation byte (binary 10xxxxxx), so
#
#     code points = bytes - continuation bytes.
#
# Continuation bytes are counted eight at a time in a general register. In each byte of the word,
# bit 7 must be set and bit 6 clear:
#
#     c = (w >> 7) & ~(w >> 6) & 0x0101010101010101
#
# Shifting the whole word moves bits across byte borders, but the mask keeps only bit 0 of each
# byte, and that bit comes from the same byte in both shifts. The input is not validated.

        .intel_syntax noprefix
        .text
        .globl  utf8_count
        .type   utf8_count, @function
        .p2align 4
utf8_count:
        mov     rax, rsi                # start from the number of bytes ...
        movabs  r8, 0x0101010101010101
        mov     rcx, rsi
        shr     rcx, 3                  # whole words
        jz      .Ltail

        .p2align 4
.Lword:
        mov     rdx, [rdi]              # unaligned loads cost nothing extra on anything recent
        mov     r9, rdx
        shr     rdx, 7
        shr     r9, 6
        not     r9
        and     rdx, r9
        and     rdx, r8
        # At most one bit per byte is left. Multiplying by 0x0101... adds the eight bytes up in the
        # top byte; the sum is at most 8, so nothing overflows. popcnt would be shorter, but needs
        # a CPU check on the baseline architecture.
        imul    rdx, r8
        shr     rdx, 56
        sub     rax, rdx                # ... and take away what is not a first byte
        add     rdi, 8
        dec     rcx
        jnz     .Lword

.Ltail:
        and     esi, 7                  # 0..7 bytes left; writing esi clears the upper half
        jz      .Ldone
.Lbyte:
        movzx   edx, byte ptr [rdi]
        and     edx, 0xC0
        cmp     edx, 0x80
        sete    dl                      # 1 for a continuation byte
        movzx   edx, dl
        sub     rax, rdx
        inc     rdi
        dec     esi
        jnz     .Lbyte
.Ldone:
        ret
        .size   utf8_count, .-utf8_count

# size_t utf8_offset(const char *text, size_t bytes, size_t n /* rdx */);
#
# Byte offset of code point number n (from 0), or `bytes` when there are fewer. A plain loop: it is
# called for cursor movement, where n is small.
        .globl  utf8_offset
        .type   utf8_offset, @function
        .p2align 4
utf8_offset:
        xor     eax, eax
        test    rsi, rsi
        jz      .Lend
.Lscan:
        mov     cl, [rdi + rax]
        and     cl, 0xC0
        cmp     cl, 0x80
        je      .Lskip                  # inside a sequence, not a start
        sub     rdx, 1                  # borrow: this start is the one we were looking for
        jc      .Lend
.Lskip:
        inc     rax
        cmp     rax, rsi
        jb      .Lscan
.Lend:
        ret
        .size   utf8_offset, .-utf8_offset

        .section .note.GNU-stack, "", @progbits
