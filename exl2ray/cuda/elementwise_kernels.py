"""Numba CUDA kernels of `exl2ray.cuda.elementwise`: memory-bound steps of the forward passes on half tensors.

Plain references: `exl2ray.model.rope.RotaryTable.rotate`, `exl2ray.model.half.gated`, `exl2ray.model.half.Norm`,
`exl2ray.quant.rows.row_errors` and `exl2ray.quant.correct`, written with torch operations. Arithmetic is float32, results
are rounded to half once.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from exl2ray.cuda.device_functions import u64

THREADS = 256
CHUNKS = 64  # blocks per calibration row in `residual_errors`
# Places are unsigned, as `exl2ray.cuda.device_functions` says.
T, T2, T3, T4 = u64(THREADS), u64(2 * THREADS), u64(3 * THREADS), u64(4 * THREADS)
_MAX = np.float32(65504.0)


@cuda.jit(cache=True)
def rotate(x, cos, sin, heads, dim, half, step_heads, step, neox, out):
    """One block per token, (position, row); x, out flat (rows * positions * heads * dim,) halves, cos, sin (positions, half)
    float32. THREADS pairs further on is step_heads heads and ``step`` pairs: a division takes longer than all the rest."""
    position, t = u64(cuda.blockIdx.x), u64(cuda.threadIdx.x)
    heads, dim, half, step_heads, step = u64(heads), u64(dim), u64(half), u64(step_heads), u64(step)
    base = (u64(cuda.blockIdx.y) * u64(cuda.gridDim.x) + position) * heads * dim
    apart, between = (u64(1), half) if neox else (u64(2), u64(1))  # pairs from each other, halves of a pair
    head, i = u64(0), t
    while i >= half:
        i -= half
        head += u64(1)
    while head < heads:
        first = base + head * dim + apart * i
        second = first + between
        i2, head2 = i + step, head + step_heads  # a second pair, loaded before the first is used
        if i2 >= half:
            i2 -= half
            head2 += u64(1)
        first2 = base + head2 * dim + apart * i2
        second2 = first2 + between
        a = np.float32(x[first])
        b = np.float32(x[second])
        a2 = np.float32(0.0)
        b2 = np.float32(0.0)
        if head2 < heads:
            a2 = np.float32(x[first2])
            b2 = np.float32(x[second2])
        c = cos[position, i]
        s = sin[position, i]
        out[first] = np.float16(a * c - b * s)
        out[second] = np.float16(b * c + a * s)
        if head2 < heads:
            c = cos[position, i2]
            s = sin[position, i2]
            out[first2] = np.float16(a2 * c - b2 * s)
            out[second2] = np.float16(b2 * c + a2 * s)
        i, head = i2 + step, head2 + step_heads
        if i >= half:
            i -= half
            head += u64(1)
    if dim > u64(2) * half:  # what is not rotated
        at = base
        for _ in range(heads):
            k = u64(2) * half + t
            while k < dim:
                out[at + k] = x[at + k]
                k += T
            at += dim


@cuda.jit(device=True)
def _clamped(y):
    """y within +-65504. Comparisons, because min and max turn a NaN into a number."""
    y = _MAX if y > _MAX else y
    return -_MAX if y < -_MAX else y


@cuda.jit(device=True)
def _silu_product(gate, up):
    g = np.float32(gate)
    # the activation is rounded to half before the product, as the plain form does
    a = np.float32(np.float16(g / (np.float32(1.0) + math.exp(-g))))
    return np.float16(_clamped(a * np.float32(up)))


@cuda.jit(cache=True)
def gated_silu(gate, up, out):
    """Four elements a thread, all loaded before the first is used: halves alone keep too few bytes in flight."""
    i, size = u64(cuda.blockIdx.x) * T4 + u64(cuda.threadIdx.x), u64(gate.size)
    if i + T3 < size:
        g0, g1, g2, g3 = gate[i], gate[i + T], gate[i + T2], gate[i + T3]
        u0, u1, u2, u3 = up[i], up[i + T], up[i + T2], up[i + T3]
        out[i] = _silu_product(g0, u0)
        out[i + T] = _silu_product(g1, u1)
        out[i + T2] = _silu_product(g2, u2)
        out[i + T3] = _silu_product(g3, u3)
    else:
        while i < size:
            out[i] = _silu_product(gate[i], up[i])
            i += T


@cuda.jit(device=True)
def _square(x, branch, target):
    y = _clamped(np.float32(x) + np.float32(branch))
    d = np.float32(np.float16(y)) - np.float32(target)
    return d * d


@cuda.jit(device=True)
def _block_sum(sums, value):
    """Sum over the threads of a block, in a fixed order; sums: shared, THREADS float32."""
    sums[cuda.threadIdx.x] = value
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if cuda.threadIdx.x < half:
            sums[cuda.threadIdx.x] += sums[cuda.threadIdx.x + half]
        cuda.syncthreads()
        half //= 2
    return sums[0]


@cuda.jit(cache=True)
def residual_errors(x, branch, target, partial):
    """partial (R, CHUNKS) float32: sums of (half(x + branch) - target)^2; x, branch, target (R, n) halves."""
    sums = cuda.shared.array(THREADS, np.float32)
    row, chunk, n = u64(cuda.blockIdx.y), u64(cuda.blockIdx.x), u64(x.shape[1])
    size = (n + u64(CHUNKS - 1)) // u64(CHUNKS)
    total = np.float32(0.0)
    i = chunk * size + u64(cuda.threadIdx.x)
    stop = min(n, (chunk + u64(1)) * size)
    while i + T3 < stop:  # all loads before the first use, as in `gated_silu`
        j, k, m = i + T, i + T2, i + T3
        x0, x1, x2, x3 = x[row, i], x[row, j], x[row, k], x[row, m]
        b0, b1, b2, b3 = branch[row, i], branch[row, j], branch[row, k], branch[row, m]
        t0, t1, t2, t3 = target[row, i], target[row, j], target[row, k], target[row, m]
        total += (_square(x0, b0, t0) + _square(x1, b1, t1)) + (_square(x2, b2, t2) + _square(x3, b3, t3))
        i += T4
    while i < stop:
        total += _square(x[row, i], branch[row, i], target[row, i])
        i += T
    total = _block_sum(sums, total)
    if cuda.threadIdx.x == 0:
        partial[row, chunk] = total


@cuda.jit(cache=True)
def distances(x, target, partial):
    """partial (2, R, CHUNKS) float32: sums of (x - target)^2 and of target^2; x, target (R, n) halves."""
    sums = cuda.shared.array(THREADS, np.float32)
    row, chunk, n = u64(cuda.blockIdx.y), u64(cuda.blockIdx.x), u64(x.shape[1])
    size = (n + u64(CHUNKS - 1)) // u64(CHUNKS)
    away = np.float32(0.0)
    own = np.float32(0.0)
    i = chunk * size + u64(cuda.threadIdx.x)
    stop = min(n, (chunk + u64(1)) * size)
    while i < stop:
        j = i + T  # a second pair, loaded before the first is used
        x0, t0 = np.float32(_clamped(np.float32(x[row, i]))), np.float32(target[row, i])
        x1, t1 = np.float32(0.0), np.float32(0.0)
        if j < stop:
            x1, t1 = np.float32(_clamped(np.float32(x[row, j]))), np.float32(target[row, j])
        away += (x0 - t0) * (x0 - t0) + (x1 - t1) * (x1 - t1)
        own += t0 * t0 + t1 * t1
        i += T2
    away = _block_sum(sums, away)
    cuda.syncthreads()
    own = _block_sum(sums, own)
    if cuda.threadIdx.x == 0:
        partial[0, row, chunk] = away
        partial[1, row, chunk] = own


@cuda.jit(cache=True)
def rms_norm(x, weight, eps, out):
    """One block per token; x, out (tokens, n) halves, weight (n,) float32."""
    sums = cuda.shared.array(THREADS, np.float32)
    token, t, n = u64(cuda.blockIdx.x), u64(cuda.threadIdx.x), u64(x.shape[1])
    total = np.float32(0.0)
    i = t
    while i + T3 < n:  # four elements, all loaded before the first is used
        x0, x1, x2, x3 = x[token, i], x[token, i + T], x[token, i + T2], x[token, i + T3]
        a, b = _clamped(np.float32(x0)), _clamped(np.float32(x1))
        total += a * a + b * b
        a, b = _clamped(np.float32(x2)), _clamped(np.float32(x3))
        total += a * a + b * b
        i += T4
    while i < n:
        a, b = _clamped(np.float32(x[token, i])), np.float32(0.0)
        if i + T < n:
            b = _clamped(np.float32(x[token, i + T]))
        total += a * a + b * b
        i += T2
    scale = np.float32(1.0) / np.float32(math.sqrt(_block_sum(sums, total) / np.float32(n) + eps))
    i = t
    while i + T3 < n:
        x0, x1, x2, x3 = x[token, i], x[token, i + T], x[token, i + T2], x[token, i + T3]
        w0, w1, w2, w3 = weight[i], weight[i + T], weight[i + T2], weight[i + T3]
        out[token, i] = np.float16(_clamped(np.float32(x0)) * scale * w0)
        out[token, i + T] = np.float16(_clamped(np.float32(x1)) * scale * w1)
        out[token, i + T2] = np.float16(_clamped(np.float32(x2)) * scale * w2)
        out[token, i + T3] = np.float16(_clamped(np.float32(x3)) * scale * w3)
        i += T4
    while i < n:
        out[token, i] = np.float16(_clamped(np.float32(x[token, i])) * scale * weight[i])
        i += T


@cuda.jit(cache=True)
def plus_behind(missing, x, other, scale, out):
    """Flat halves; two elements a thread, all loaded before the first is used."""
    i, size = u64(cuda.blockIdx.x) * T2 + u64(cuda.threadIdx.x), u64(missing.size)
    j = i + T
    if j < size:
        m0, x0, f0 = missing[i], x[i], other[i]
        m1, x1, f1 = missing[j], x[j], other[j]
        out[i] = np.float16(_clamped(np.float32(m0) + (np.float32(f0) - np.float32(x0)) / scale))
        out[j] = np.float16(_clamped(np.float32(m1) + (np.float32(f1) - np.float32(x1)) / scale))
    elif i < size:
        out[i] = np.float16(_clamped(np.float32(missing[i]) + (np.float32(other[i]) - np.float32(x[i])) / scale))
