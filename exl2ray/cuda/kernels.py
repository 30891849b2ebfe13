"""Numba CUDA kernels of one group step. Plain references: `exl2ray.quant.gptq.search`, `exl2ray.quant.gptq`.

Launches per group of n rows (a multiple of 32), each over every segment of the batch:

    column_tops   largest |x| of each column, and per block
    grid_errors   M of the segment, scale codes, and per block the summed |error|^3.5 at the 97 shrink factors
    choose        per segment: first smallest sum -> scale_max
    trial         with refinement: per column and scale code near the one found, the loss after feedback inside the group
    pick          with refinement: per column the code with the smallest loss
    settle        integers, reconstruction in the loader's half chain, error feedback inside the group; in sweeps after all
                  groups integers rounded anew, with the errors of all other rows known (`exl2ray.cuda.settle`)

Sums run in a fixed order and no atomics are used: the same input gives the same bytes. `x` is the panel buffer; the group
occupies its rows a .. a+n. Blocks of columns never straddle segments (widths are multiples of 32).

In the search columns are scaled to unit step first, so step^3.5 leaves the grid loop.
"""

from __future__ import annotations

import math

import numpy as np
from numba import cuda

from exl2ray.cuda.backend import GRID_POINTS, REFINED_ROWS
from exl2ray.cuda.device_functions import (
    R1,
    R2,
    R3,
    R4,
    R5,
    R6,
    R7,
    ROUND,
    SMALLEST,
    error_term,
    fmax,
    nearest,
    passed_on,
    u64,
)

COLUMNS = 32  # columns per block of the search kernels
LANES = 8  # threads per column there
POINTS = 13  # grid points per thread: 8 x 13 >= 97
PADDED = LANES * POINTS  # 104: length of a padded grid
THREADS = COLUMNS * LANES
TRIAL_COLUMNS = 64  # columns per block of `trial` and `pick`
STRIP = 8  # rows that `trial` goes over at a time


@cuda.jit(cache=True)
def column_tops(x, a, n, blocks, col_top, block_top):
    """col_top (C,) and block_top (B,) float32: largest |x| in rows a .. a+n. Launch: B blocks of 256 threads."""
    part = cuda.shared.array((LANES, COLUMNS), np.float32)
    b = cuda.blockIdx.x
    j = cuda.threadIdx.x % COLUMNS
    lane = cuda.threadIdx.x // COLUMNS
    c = blocks[b, 1] + j
    top = np.float32(0.0)
    for r in range(lane, n, LANES):
        top = fmax(top, abs(x[a + r, c]))
    part[lane, j] = top
    cuda.syncthreads()
    if lane == 0:
        for k in range(1, LANES):
            top = max(top, part[k, j])
        col_top[c] = top
        part[0, j] = top
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        for k in range(1, COLUMNS):
            top = max(top, part[0, k])
        block_top[b] = top


@cuda.jit(cache=True)
def grid_errors(x, a, n, blocks, seg_first, seg_bits, g, grid, col_top, block_top, scale_codes, seg_top, partial):
    """Scale codes (G, C) uint8 row g, seg_top (S,) and partial (B, 104) float32. Launch: B blocks of 256 threads."""
    part = cuda.shared.array((PADDED, COLUMNS), np.float32)
    tops = cuda.shared.array(THREADS, np.float32)
    b = cuda.blockIdx.x
    t = cuda.threadIdx.x
    j = t % COLUMNS
    lane = t // COLUMNS
    seg = blocks[b, 0]
    c = blocks[b, 1] + j
    bits = seg_bits[seg, g]
    zero = np.float32(1 << (bits - 1))
    maxq = np.float32((1 << bits) - 1)

    top = np.float32(0.0)
    for k in range(seg_first[seg] + t, seg_first[seg + 1], THREADS):
        top = max(top, block_top[k])
    tops[t] = top
    cuda.syncthreads()
    half = THREADS // 2
    while half > 0:
        if t < half:
            tops[t] = max(tops[t], tops[t + half])
        cuda.syncthreads()
        half //= 2
    top = (tops[0] + np.float32(1e-12)) / (maxq / np.float32(2.0))

    base = (col_top[c] + np.float32(1e-12)) / (maxq / np.float32(2.0))
    code = (np.float32(16.0) * np.float32(math.sqrt(base / top)) + ROUND) - ROUND
    code = min(max(code, np.float32(1.0)), np.float32(16.0))
    if lane == 0:
        scale_codes[g, c] = np.uint8(code)
        if c == blocks[seg_first[seg], 1]:
            seg_top[seg] = top
    ratio = code / np.float32(16.0)
    step = ratio * ratio * top
    inverse = np.float32(1.0) / step

    low = -zero
    high = maxq - zero
    i = lane * POINTS
    p0, p1, p2, p3, p4, p5, p6 = grid[i], grid[i + 1], grid[i + 2], grid[i + 3], grid[i + 4], grid[i + 5], grid[i + 6]
    p7, p8, p9, p10, p11, p12 = grid[i + 7], grid[i + 8], grid[i + 9], grid[i + 10], grid[i + 11], grid[i + 12]
    one = np.float32(1.0)
    v0, v1, v2, v3, v4, v5, v6 = one / p0, one / p1, one / p2, one / p3, one / p4, one / p5, one / p6
    v7, v8, v9, v10, v11, v12 = one / p7, one / p8, one / p9, one / p10, one / p11, one / p12
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = s10 = s11 = s12 = np.float32(0.0)
    for r in range(n):
        w = x[a + r, c] * inverse
        s0 += error_term(w, p0, v0, low, high)
        s1 += error_term(w, p1, v1, low, high)
        s2 += error_term(w, p2, v2, low, high)
        s3 += error_term(w, p3, v3, low, high)
        s4 += error_term(w, p4, v4, low, high)
        s5 += error_term(w, p5, v5, low, high)
        s6 += error_term(w, p6, v6, low, high)
        s7 += error_term(w, p7, v7, low, high)
        s8 += error_term(w, p8, v8, low, high)
        s9 += error_term(w, p9, v9, low, high)
        s10 += error_term(w, p10, v10, low, high)
        s11 += error_term(w, p11, v11, low, high)
        s12 += error_term(w, p12, v12, low, high)
    # step^3.5, taken relative to the segment's top so that small weights do not underflow
    unit = ratio * ratio
    weight = unit * unit * unit * np.float32(math.sqrt(unit))
    part[i, j] = s0 * weight
    part[i + 1, j] = s1 * weight
    part[i + 2, j] = s2 * weight
    part[i + 3, j] = s3 * weight
    part[i + 4, j] = s4 * weight
    part[i + 5, j] = s5 * weight
    part[i + 6, j] = s6 * weight
    part[i + 7, j] = s7 * weight
    part[i + 8, j] = s8 * weight
    part[i + 9, j] = s9 * weight
    part[i + 10, j] = s10 * weight
    part[i + 11, j] = s11 * weight
    part[i + 12, j] = s12 * weight
    cuda.syncthreads()
    if t < PADDED:
        total = np.float32(0.0)
        for k in range(COLUMNS):
            # rotated start: neighbouring threads read different banks; the order is still fixed per point
            total += part[t, (k + t) & (COLUMNS - 1)]  # as % does it, without a look at signs
        partial[b, t] = total


@cuda.jit(cache=True)
def choose(partial, seg_first, seg_top, grid, g, scale_max, seg_m):
    """scale_max (G, S) float16 row g; seg_m (S,) float32 = fp16(scale_max / 256). Launch: S blocks of 416 threads."""
    part = cuda.shared.array((4, PADDED), np.float32)
    seg = cuda.blockIdx.x
    i = cuda.threadIdx.x % PADDED
    lane = cuda.threadIdx.x // PADDED
    total = np.float32(0.0)
    for b in range(seg_first[seg] + lane, seg_first[seg + 1], 4):
        total += partial[b, i]
    part[lane, i] = total
    cuda.syncthreads()
    if lane == 0:
        part[0, i] = (part[0, i] + part[1, i]) + (part[2, i] + part[3, i])
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        best = 0
        for k in range(1, GRID_POINTS):
            if part[0, k] < part[0, best]:
                best = k
        rounded = np.float16(seg_top[seg] * grid[best])
        scale_max[g, seg] = rounded
        seg_m[seg] = np.float32(np.float16(np.float32(rounded) / np.float32(256.0)))


@cuda.jit(cache=True)
def trial(x, a, n, u, blocks, seg_bits, g, seg_m, scale_codes, offsets, least_bits, shrinkage, cost):
    """cost (T, C) float32 of the codes at ``offsets`` (T,) int32 from those of row g, infinite for codes outside 1..16.

    Keeps x and u. Launch: (entries of ``blocks``, T) blocks of TRIAL_COLUMNS threads; at most REFINED_ROWS rows.
    A column's rows stay in shared memory; each error replaces its weight there.
    """
    factor = cuda.shared.array((STRIP, REFINED_ROWS), np.float32)
    tile = cuda.shared.array((REFINED_ROWS, TRIAL_COLUMNS), np.float32)
    b, t, j = u64(cuda.blockIdx.x), u64(cuda.blockIdx.y), u64(cuda.threadIdx.x)
    a, n, g, none = u64(a), u64(n), u64(g), u64(0)
    seg = u64(blocks[b, none])
    bits = seg_bits[seg, g]
    if bits < least_bits:
        return
    c, end = u64(blocks[b, R1]) + j, u64(blocks[b, R2])
    zero = np.float32(1 << (bits - 1))
    high = np.float32((1 << bits) - 1) - zero
    code = np.float32(0.0)
    if c < end:
        code = np.float32(scale_codes[g, c]) + np.float32(offsets[t])
    used = code >= np.float32(1.0) and code <= np.float32(16.0)
    step = np.float32(np.float16(code * code * seg_m[seg]))
    if used:
        for r in range(n):
            tile[r, j] = x[a + r, c]
    loss = np.float32(0.0)
    along = np.float32(0.0)
    size = np.float32(0.0)
    strip = u64(STRIP)
    for s in range(none, n, strip):
        cuda.syncthreads()
        for k in range(s + j, n, u64(TRIAL_COLUMNS)):
            for i in range(strip):
                factor[i, k] = u[a + s + i, a + k]
        cuda.syncthreads()
        if used:
            for i in range(strip):
                v = tile[s + i, j]
                d = np.float32(np.float16(nearest(v, step, zero, high) * step))
                pivot = factor[i, s + i]
                e = (v - d) / pivot
                w = v / pivot
                loss += e * e
                along += e * w
                size += w * w
                tile[s + i, j] = e
                for k in range(i + R1, strip):
                    tile[s + k, j] -= factor[i, s + k] * e
            e0 = tile[s, j]
            e1 = tile[s + R1, j]
            e2 = tile[s + R2, j]
            e3 = tile[s + R3, j]
            e4 = tile[s + R4, j]
            e5 = tile[s + R5, j]
            e6 = tile[s + R6, j]
            e7 = tile[s + R7, j]
            for k in range(s + strip, n):
                tile[k, j] = passed_on(tile[k, j], factor, none, k, e0, e1, e2, e3, e4, e5, e6, e7)
    if used:
        cost[t, c] = loss + shrinkage * along * along / fmax(size, SMALLEST)
    elif c < end:
        cost[t, c] = np.float32(math.inf)


@cuda.jit(cache=True)
def pick(cost, blocks, seg_bits, g, scale_codes, offsets, least_bits):
    """Scale codes row g: changed by the offset with the first smallest cost. Launch: as `trial`, one block per entry."""
    b = cuda.blockIdx.x
    c = blocks[b, 1] + cuda.threadIdx.x
    if c < blocks[b, 2] and seg_bits[blocks[b, 0], g] >= least_bits:
        best = np.float32(math.inf)
        change = np.int32(0)
        for t in range(cost.shape[0]):
            if cost[t, c] < best:  # false for NaN
                best = cost[t, c]
                change = offsets[t]
        scale_codes[g, c] = np.uint8(np.int32(scale_codes[g, c]) + change)
