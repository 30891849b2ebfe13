"""The kernel that rounds: integers of the rows of a panel, one row after another, errors passed on to the rows below.

A row needs the errors of all rows before it, so rows are a chain of roundings however many columns there are. `settle`
keeps everything else out of that chain. Before, one thread did all the work on a column, 32 rows a launch with small matrix
products in between: 42 us each in a sweep. Sweeps need no search, so a launch of theirs goes over the groups of 128 rows.
"""

from __future__ import annotations

import os

import numpy as np
from numba import cuda

from exl2ray.cuda.device_functions import R1, R2, R3, R4, R5, R6, R7, nearest, passed_on, settled, step_of, u64
from exl2ray.cuda.kernels import COLUMNS

TALL = 128  # most rows of a launch
STRIP = u64(8)  # rows held in registers at a time
TWO = u64(16)
RING = 24  # rows of three strips
WARPS = 4  # of a block
THREADS = WARPS * COLUMNS
DOWN, ACROSS = u64(WARPS), u64(COLUMNS)  # rows and columns that the threads of a block are at, side by side
ZERO, ONE = u64(0), u64(1)
# So that four blocks share a multiprocessor. The simulator does not know the option.
FEW = {} if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1" else {"max_registers": 128}


@cuda.jit(cache=True, **FEW)
def settle(
    x, a, n, u, sweep, feedback, blocks, seg_bits, groups, scale_max, scale_codes, perm, row, dq, codes, keep, error
):
    """Rounds n <= TALL rows one after another: x[a : a+n], act-order rows row .. row+n, of the groups that groups (K,) says.

    n and the heights of groups are multiples of STRIP.

    In a first pass x (P, C) float32 holds weights and u (P, P) the panel's block of U: weight i becomes the nearest integer,
    its scaled error is e = (x_i - dq_i) / u_ii, and later rows of the group lose u_ik e each; not so without ``feedback``.
    In a ``sweep`` x holds rows of S = H E and u the panel's block of H: weight i becomes the nearest to dq_i + S_i / h_ii,
    and e = new - old is passed on in the same way.

    Writes rows perm[row ..] of dq (K, C) float16, rows row .. of codes (K, C) uint8 if keep and, with feedback, rows a .. of
    error (P, C): e in a first pass, dq before - after in a sweep. Keeps x: the caller passes errors on to the rows after
    these. Launch: one block of THREADS threads per entry of ``blocks``, which has COLUMNS columns.

    Each warp is a lane of the block's columns. Lane 0 rounds the rows, STRIP of them in registers at a time, since
    each needs the errors of those before it. The others are one strip behind: they write its results, pass its errors on to
    the rows beyond the next strip, and fetch the strip after that. So what takes time is rounding alone.
    """
    factor = cuda.shared.array((RING, TALL), np.float32)  # rows of u, in a ring of three strips
    before = cuda.shared.array((RING, COLUMNS), np.float32)  # dq before a sweep, likewise
    tile = cuda.shared.array((TALL, COLUMNS), np.float32)  # weights; once rounded, integers
    errors = cuda.shared.array((16, COLUMNS), np.float32)  # of the last two strips
    steps = cuda.shared.array((3, COLUMNS), np.float32)  # between two integers: of a strip's rows, in a ring of three
    widths = cuda.shared.array(3, np.int32)  # in bits, likewise
    b, t = u64(cuda.blockIdx.x), u64(cuda.threadIdx.x)
    a, n, row = u64(a), u64(n), u64(row)
    j, lane = t % ACROSS, t // ACROSS
    seg = u64(blocks[b, ZERO])
    c = u64(blocks[b, ONE]) + j
    if not feedback:
        for r in range(lane, n, DOWN):
            g = u64(groups[row + r])
            step = step_of(scale_codes[g, c], scale_max[g, seg])
            zero = np.float32(1 << (seg_bits[seg, g] - 1))
            high = zero - np.float32(1.0)
            q = nearest(x[a + r, c], step, zero, high)
            dq[u64(perm[row + r]), c] = np.float16(q * step)
            if keep:
                codes[row + r, c] = np.uint8(q + zero)
        return

    for r in range(lane, n, DOWN):
        tile[r, j] = x[a + r, c]
    for r in range(lane, min(TWO, n), DOWN):  # no division by n, which takes longer than all the rest
        for k in range(j, n, ACROSS):
            factor[r, k] = u[a + r, a + k]
    if lane < u64(2) and lane * STRIP < n:
        g = u64(groups[row + lane * STRIP])
        steps[lane, j] = step_of(scale_codes[g, c], scale_max[g, seg])
        widths[lane] = seg_bits[seg, g]
    if sweep:
        for i in range(lane, min(TWO, n), DOWN):
            before[i, j] = np.float32(dq[u64(perm[row + i]), c])
    e0 = e1 = e2 = e3 = e4 = e5 = e6 = e7 = np.float32(0.0)
    last, now, coming = u64(2), ZERO, ONE  # places in the rings: of the strip before s, of that from s on, of the one after
    there, here = STRIP, ZERO  # rows of the errors of the strip before, and of this one
    cuda.syncthreads()
    for s in range(ZERO, n + STRIP, STRIP):  # lane 0 is at rows s .., the others at the strip before
        if lane == ZERO:
            if s < n:
                step = steps[now, j]
                zero = np.float32(1 << (widths[now] - 1))
                high = zero - np.float32(1.0)
                f, g = STRIP * now, STRIP * last
                x0, x1, x2, x3 = tile[s, j], tile[s + R1, j], tile[s + R2, j], tile[s + R3, j]
                x4, x5, x6, x7 = tile[s + R4, j], tile[s + R5, j], tile[s + R6, j], tile[s + R7, j]
                if s > ZERO:
                    x0 = passed_on(x0, factor, g, s, e0, e1, e2, e3, e4, e5, e6, e7)
                    x1 = passed_on(x1, factor, g, s + R1, e0, e1, e2, e3, e4, e5, e6, e7)
                    x2 = passed_on(x2, factor, g, s + R2, e0, e1, e2, e3, e4, e5, e6, e7)
                    x3 = passed_on(x3, factor, g, s + R3, e0, e1, e2, e3, e4, e5, e6, e7)
                    x4 = passed_on(x4, factor, g, s + R4, e0, e1, e2, e3, e4, e5, e6, e7)
                    x5 = passed_on(x5, factor, g, s + R5, e0, e1, e2, e3, e4, e5, e6, e7)
                    x6 = passed_on(x6, factor, g, s + R6, e0, e1, e2, e3, e4, e5, e6, e7)
                    x7 = passed_on(x7, factor, g, s + R7, e0, e1, e2, e3, e4, e5, e6, e7)
                q, e0 = settled(x0, before[f, j], factor[f, s], step, zero, high, sweep)
                tile[s, j] = q
                x1 -= factor[f, s + R1] * e0
                x2 -= factor[f, s + R2] * e0
                x3 -= factor[f, s + R3] * e0
                x4 -= factor[f, s + R4] * e0
                x5 -= factor[f, s + R5] * e0
                x6 -= factor[f, s + R6] * e0
                x7 -= factor[f, s + R7] * e0
                q, e1 = settled(x1, before[f + R1, j], factor[f + R1, s + R1], step, zero, high, sweep)
                tile[s + R1, j] = q
                x2 -= factor[f + R1, s + R2] * e1
                x3 -= factor[f + R1, s + R3] * e1
                x4 -= factor[f + R1, s + R4] * e1
                x5 -= factor[f + R1, s + R5] * e1
                x6 -= factor[f + R1, s + R6] * e1
                x7 -= factor[f + R1, s + R7] * e1
                q, e2 = settled(x2, before[f + R2, j], factor[f + R2, s + R2], step, zero, high, sweep)
                tile[s + R2, j] = q
                x3 -= factor[f + R2, s + R3] * e2
                x4 -= factor[f + R2, s + R4] * e2
                x5 -= factor[f + R2, s + R5] * e2
                x6 -= factor[f + R2, s + R6] * e2
                x7 -= factor[f + R2, s + R7] * e2
                q, e3 = settled(x3, before[f + R3, j], factor[f + R3, s + R3], step, zero, high, sweep)
                tile[s + R3, j] = q
                x4 -= factor[f + R3, s + R4] * e3
                x5 -= factor[f + R3, s + R5] * e3
                x6 -= factor[f + R3, s + R6] * e3
                x7 -= factor[f + R3, s + R7] * e3
                q, e4 = settled(x4, before[f + R4, j], factor[f + R4, s + R4], step, zero, high, sweep)
                tile[s + R4, j] = q
                x5 -= factor[f + R4, s + R5] * e4
                x6 -= factor[f + R4, s + R6] * e4
                x7 -= factor[f + R4, s + R7] * e4
                q, e5 = settled(x5, before[f + R5, j], factor[f + R5, s + R5], step, zero, high, sweep)
                tile[s + R5, j] = q
                x6 -= factor[f + R5, s + R6] * e5
                x7 -= factor[f + R5, s + R7] * e5
                q, e6 = settled(x6, before[f + R6, j], factor[f + R6, s + R6], step, zero, high, sweep)
                tile[s + R6, j] = q
                x7 -= factor[f + R6, s + R7] * e6
                q, e7 = settled(x7, before[f + R7, j], factor[f + R7, s + R7], step, zero, high, sweep)
                tile[s + R7, j] = q
                p = here
                errors[p, j], errors[p + R1, j], errors[p + R2, j], errors[p + R3, j] = e0, e1, e2, e3
                errors[p + R4, j], errors[p + R5, j], errors[p + R6, j], errors[p + R7, j] = e4, e5, e6, e7
        elif s > ZERO:
            done, f, p = s - STRIP, STRIP * last, there
            e0, e1, e2, e3 = errors[p, j], errors[p + R1, j], errors[p + R2, j], errors[p + R3, j]
            e4, e5, e6, e7 = errors[p + R4, j], errors[p + R5, j], errors[p + R6, j], errors[p + R7, j]
            for k in range(s + STRIP + lane - ONE, n, DOWN - ONE):
                tile[k, j] = passed_on(tile[k, j], factor, f, k, e0, e1, e2, e3, e4, e5, e6, e7)
            step = steps[last, j]
            zero = np.float32(1 << (widths[last] - 1))
            for i in range(lane - ONE, STRIP, DOWN - ONE):
                q, e = tile[done + i, j], errors[p + i, j]
                dq[u64(perm[row + done + i]), c] = np.float16(q * step)
                if keep:
                    codes[row + done + i, c] = np.uint8(q + zero)
                error[a + done + i, c] = -e if sweep else e
            top = s + STRIP  # the strip after this one
            if top < n:
                if lane == ONE:
                    g = u64(groups[row + top])
                    steps[coming, j] = step_of(scale_codes[g, c], scale_max[g, seg])
                    widths[coming] = seg_bits[seg, g]
                for r in range(lane - ONE, STRIP, DOWN - ONE):
                    for k in range(top + j, n, ACROSS):
                        factor[STRIP * coming + r, k] = u[a + top + r, a + k]
                    if sweep:
                        before[STRIP * coming + r, j] = np.float32(dq[u64(perm[row + top + r]), c])
        cuda.syncthreads()
        last, now, coming = now, coming, last
        there, here = here, there
