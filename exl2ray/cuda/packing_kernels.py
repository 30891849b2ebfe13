"""Numba CUDA kernels of `exl2ray.cuda.packing`: one thread per column and unit of 32 rows.

Plain references: `pack_rows` and `dequantize` of `exl2ray.quant.pack` on CPU tensors.
"""

from __future__ import annotations

import numpy as np
from numba import cuda


@cuda.jit(cache=True)
def pack(quads, bits, words, out):
    """quads (K, N / 4) int32, the codes of four columns per element -> out (Q, N) int32; bits, words (K / 32,) int32.

    Four columns per thread make the reads 4 bytes wide. Grid: (quads, units).
    """
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c >= quads.shape[1]:
        return
    unit = cuda.blockIdx.y
    b = np.uint32(bits[unit])
    w = words[unit]
    row = unit * 32
    byte = np.uint32(255)
    a0 = np.uint32(0)
    a1 = np.uint32(0)
    a2 = np.uint32(0)
    a3 = np.uint32(0)
    fill = np.uint32(0)
    for i in range(32):
        v = np.uint32(quads[row + i, c])
        v0 = np.uint32(v & byte)
        v1 = np.uint32(np.uint32(v >> np.uint32(8)) & byte)
        v2 = np.uint32(np.uint32(v >> np.uint32(16)) & byte)
        v3 = np.uint32(v >> np.uint32(24))
        a0 = np.uint32(a0 | np.uint32(v0 << fill))
        a1 = np.uint32(a1 | np.uint32(v1 << fill))
        a2 = np.uint32(a2 | np.uint32(v2 << fill))
        a3 = np.uint32(a3 | np.uint32(v3 << fill))
        fill = np.uint32(fill + b)
        if fill >= np.uint32(32):
            out[w, 4 * c] = np.int32(a0)
            out[w, 4 * c + 1] = np.int32(a1)
            out[w, 4 * c + 2] = np.int32(a2)
            out[w, 4 * c + 3] = np.int32(a3)
            w += 1
            fill = np.uint32(fill - np.uint32(32))
            rest = np.uint32(b - fill)
            a0 = np.uint32(v0 >> rest)
            a1 = np.uint32(v1 >> rest)
            a2 = np.uint32(v2 >> rest)
            a3 = np.uint32(v3 >> rest)


@cuda.jit(cache=True)
def dequantize(words_in, steps, perm, bits, words, groups, out):
    """words_in (Q, N) int32, steps (G, N) float16, perm (K,) int64 -> out (K, N) float16, natural rows."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c >= words_in.shape[1]:
        return
    unit = cuda.blockIdx.y
    b = np.uint32(bits[unit])
    w = words[unit]
    row = unit * 32
    step = np.float32(steps[groups[unit], c])
    mask = np.uint32(np.uint32(1 << b) - np.uint32(1))
    zero = np.float32(1 << (b - np.uint32(1)))
    word = np.uint32(words_in[w, c])
    used = np.uint32(0)
    for i in range(32):
        v = np.uint32(word >> used)
        used = np.uint32(used + b)
        if used >= np.uint32(32):
            used = np.uint32(used - np.uint32(32))
            w += 1
            if i < 31:
                word = np.uint32(words_in[w, c])
                if used > np.uint32(0):
                    v = np.uint32(v | np.uint32(word << np.uint32(b - used)))
        out[perm[row + i], c] = np.float16((np.float32(v & mask) - zero) * step)
