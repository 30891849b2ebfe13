"""Packing and dequantisation kernels: one thread per column and unit of 32 rows.

Plain references: `pack_rows` and `dequantize` of `exl2ray.quant.pack` on CPU tensors.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from exl2ray.cuda.gpu import stream_of, wrap

THREADS = 128


@cuda.jit
def _pack(codes, bits, words, out):
    """codes (K, N) uint8 -> out (Q, N) int32; bits, words (K / 32,) int32. Grid: (columns, units)."""
    c = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x
    if c >= codes.shape[1]:
        return
    unit = cuda.blockIdx.y
    b = np.uint32(bits[unit])
    w = words[unit]
    row = unit * 32
    acc = np.uint32(0)
    fill = np.uint32(0)
    for i in range(32):
        v = np.uint32(codes[row + i, c])
        acc = np.uint32(acc | np.uint32(v << fill))
        fill = np.uint32(fill + b)
        if fill >= np.uint32(32):
            out[w, c] = np.int32(acc)
            w += 1
            fill = np.uint32(fill - np.uint32(32))
            acc = np.uint32(v >> np.uint32(b - fill))


@cuda.jit
def _dequantize(words_in, steps, perm, bits, words, groups, out):
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


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return (columns + THREADS - 1) // THREADS, rows // 32


def pack_rows_cuda(codes: Tensor, bits: Tensor, words: Tensor, packed_rows: int) -> Tensor:
    """GPU form of `exl2ray.quant.pack.pack_rows`; ``bits`` and ``words`` come from `unit_tables`."""
    out = torch.empty(packed_rows, codes.shape[1], dtype=torch.int32, device=codes.device)
    codes = codes.contiguous()
    _pack[_grid(*codes.shape), THREADS, stream_of(codes)](wrap(codes), wrap(bits), wrap(words), wrap(out))
    return out


def dequantize_cuda(
    q_weight: Tensor, steps: Tensor, perm: Tensor, bits: Tensor, words: Tensor, groups: Tensor
) -> Tensor:
    """GPU form of `exl2ray.quant.pack.dequantize`; ``steps`` (G, N) float16 are the loader's step sizes."""
    out = torch.empty(perm.numel(), q_weight.shape[1], dtype=torch.float16, device=q_weight.device)
    _dequantize[_grid(*out.shape), THREADS, stream_of(out)](
        wrap(q_weight.contiguous()), wrap(steps.contiguous()), wrap(perm), wrap(bits), wrap(words), wrap(groups), wrap(out)
    )
    return out
