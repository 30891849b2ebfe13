"""Memory-bound steps of the forward passes on half tensors, each one pass over its data.

Plain references: `exl2ray.model.rope.RotaryTable.rotate`, `exl2ray.model.mlp.gated` and `exl2ray.quant.measure.row_errors`
written with torch operations. Arithmetic is float32, results are rounded to half once.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from exl2ray.cuda.gpu import stream_of, wrap

THREADS = 256
CHUNKS = 64  # blocks per calibration row in `residual_errors`
_MAX = np.float32(65504.0)


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: contiguous halves on one GPU."""
    return all(t.is_cuda and t.dtype == torch.float16 and t.is_contiguous() for t in tensors)


@cuda.jit
def _rotate(x, cos, sin, length, heads, dim, rotated, neox, out):
    """One block per token; x, out flat (tokens * heads * dim,) halves, cos, sin (length, rotated / 2) float32."""
    token = cuda.blockIdx.x
    position = token % length
    half = rotated // 2
    base = token * heads * dim
    for p in range(cuda.threadIdx.x, heads * half, THREADS):
        head = p // half
        i = p - head * half
        start = base + head * dim
        first = start + (i if neox else 2 * i)
        second = start + (i + half if neox else 2 * i + 1)
        a = np.float32(x[first])
        b = np.float32(x[second])
        c = cos[position, i]
        s = sin[position, i]
        out[first] = np.float16(a * c - b * s)
        out[second] = np.float16(b * c + a * s)
    rest = dim - rotated
    for p in range(cuda.threadIdx.x, heads * rest, THREADS):
        head = p // rest
        at = base + head * dim + rotated + p - head * rest
        out[at] = x[at]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, neox: bool) -> Tensor:
    """x (R, T, heads, D) half, cos and sin (T, d / 2) float32 -> rotated x; `RotaryTable.rotate`."""
    out = torch.empty_like(x)
    rows, length, heads, dim = x.shape
    _rotate[rows * length, THREADS, stream_of(x)](
        wrap(x.view(-1)), wrap(cos.contiguous()), wrap(sin.contiguous()), length, heads, dim, 2 * cos.shape[1], neox,
        wrap(out.view(-1)),
    )  # fmt: skip
    return out


@cuda.jit
def _gated_silu(gate, up, out):
    i = cuda.blockIdx.x * THREADS + cuda.threadIdx.x
    stride = cuda.gridDim.x * THREADS
    while i < gate.size:
        g = np.float32(gate[i])
        # the activation is rounded to half before the product, as the plain form does
        a = np.float32(np.float16(g / (np.float32(1.0) + math.exp(-g))))
        y = a * np.float32(up[i])
        out[i] = np.float16(min(max(y, -_MAX), _MAX))
        i += stride


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up clamped to +-65504, for halves of equal shape; `exl2ray.model.mlp.gated`."""
    out = torch.empty_like(gate)
    blocks = min(16384, (gate.numel() + THREADS - 1) // THREADS)
    _gated_silu[blocks, THREADS, stream_of(gate)](wrap(gate.view(-1)), wrap(up.view(-1)), wrap(out.view(-1)))
    return out


@cuda.jit
def _residual_errors(x, branch, target, partial):
    """partial (R, CHUNKS) float32: sums of (half(x + branch) - target)^2; x, branch, target (R, n) halves."""
    sums = cuda.shared.array(THREADS, np.float32)
    row = cuda.blockIdx.y
    chunk = cuda.blockIdx.x
    n = x.shape[1]
    size = (n + CHUNKS - 1) // CHUNKS
    total = np.float32(0.0)
    for i in range(chunk * size + cuda.threadIdx.x, min(n, (chunk + 1) * size), THREADS):
        y = np.float32(x[row, i]) + np.float32(branch[row, i])
        y = np.float32(np.float16(min(max(y, -_MAX), _MAX)))
        d = y - np.float32(target[row, i])
        total += d * d
    sums[cuda.threadIdx.x] = total
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if cuda.threadIdx.x < half:
            sums[cuda.threadIdx.x] += sums[cuda.threadIdx.x + half]
        cuda.syncthreads()
        half //= 2
    if cuda.threadIdx.x == 0:
        partial[row, chunk] = sums[0]


def residual_errors(x: Tensor, branch: Tensor, target: Tensor) -> Tensor:
    """(R,) float32: ||half(x + branch) - target|| of each row; x, branch, target (R, T, hidden) halves.

    The sum of a NaN is NaN: a broken candidate shows as such.
    """
    rows = x.shape[0]
    partial = torch.empty(rows, CHUNKS, dtype=torch.float32, device=x.device)
    _residual_errors[(CHUNKS, rows), THREADS, stream_of(x)](
        wrap(x.view(rows, -1)), wrap(branch.view(rows, -1)), wrap(target.view(rows, -1)), wrap(partial)
    )
    return partial.double().sum(1).sqrt().float()
