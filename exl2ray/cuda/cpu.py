"""The group step on the CPU, compiled by Numba: the same contract as the GPU kernels in `exl2ray.cuda.kernels`.

One call handles one row group of many *segments* at once. A segment is a run of columns that forms one linear layer under
one option: its columns share the scale search, nothing else. Work is cut into blocks of columns; sums over columns are
kept per block and added in block order, so results do not depend on the number of threads.
"""

from __future__ import annotations

import os

import numba
import numpy as np
import torch

from exl2ray.cuda.backend import (
    GRID_POINTS,
    OFFSETS,
    REFINED_BITS,
    REFINED_ROWS,
    SHRINKAGE,
    Workspace,
    blocks_of,
    shrink_grid,
)
from exl2ray.errors import UsageError

_MAGIC = np.float32(0.75)  # ulp of [0.5, 1) is 2^-24, the spacing of subnormal halves
_SMALLEST_NORMAL = np.float32(2.0**-14)
_TINY = np.float32(1e-30)
BLOCK = 64  # columns per block


@numba.njit(cache=True, inline="always")
def _half(x):
    """float32 rounded to the nearest half (ties to even), as float32. |x| must be below 65520."""
    if abs(x) < _SMALLEST_NORMAL:
        # Adding and removing 0.75 rounds to a multiple of 2^-24; exact for both signs.
        return np.float32((abs(x) + _MAGIC) - _MAGIC) * (np.float32(1.0) if x >= 0 else np.float32(-1.0))
    # Veltkamp splitting: keeps 11 significant bits, nearest even.
    c = np.float32(x * np.float32(8193.0))
    return np.float32(c - np.float32(c - x))


@numba.njit(cache=True, parallel=True)
def column_tops(x, blocks, block_top):
    """block_top[b] = largest |x| of block b; x (n, C) float32, blocks (B, 3) int32 of (segment, first, last+1)."""
    for b in numba.prange(blocks.shape[0]):
        top = np.float32(0.0)
        for r in range(x.shape[0]):
            for c in range(blocks[b, 1], blocks[b, 2]):
                top = max(top, abs(x[r, c]))
        block_top[b] = top


@numba.njit(cache=True, parallel=True, fastmath={"reassoc", "contract"})
def grid_errors(x, blocks, seg_top, seg_bits, grid, scale_codes, partial):
    """Scale codes of every column and, per block and grid point, the sum of |error|^3.5.

    seg_top (S,) float32 = M of each segment; scale_codes (C,) uint8 out; partial (B, 97) float32 out.
    """
    n = x.shape[0]
    for b in numba.prange(blocks.shape[0]):
        seg = blocks[b, 0]
        c0, c1 = blocks[b, 1], blocks[b, 2]
        width = c1 - c0
        bits = seg_bits[seg]
        zero = np.float32(1 << (bits - 1))
        high = np.float32((1 << bits) - 1) - zero
        half_range = np.float32((1 << bits) - 1) / np.float32(2.0)
        step = np.empty(BLOCK, np.float32)
        for c in range(c0, c1):
            top = np.float32(0.0)
            for r in range(n):
                top = max(top, abs(x[r, c]))
            base = (top + np.float32(1e-12)) / half_range
            code = np.rint(np.float32(16.0) * np.sqrt(base / seg_top[seg]))
            code = min(max(code, np.float32(1.0)), np.float32(16.0))
            scale_codes[c] = np.uint8(code)
            ratio = code / np.float32(16.0)
            step[c - c0] = ratio * ratio * seg_top[seg]
        scaled = np.empty(BLOCK, np.float32)
        for i in range(grid.shape[0]):
            for j in range(width):
                scaled[j] = step[j] * grid[i]
            total = np.float32(0.0)
            for r in range(n):
                for j in range(width):
                    v = x[r, c0 + j]
                    s = scaled[j]
                    q = np.rint(v / s)
                    q = min(max(q, -zero), high)
                    d = abs(q * s - v)
                    total += d * d * d * np.sqrt(d)
            partial[b, i] = total


@numba.njit(cache=True, parallel=True)
def refine_codes(x, u, blocks, seg_bits, seg_m, scale_codes, offsets, least_bits, shrinkage):
    """scale_codes (C,) uint8 in place: of the codes at ``offsets`` (T,) int32 from them, those with the smallest loss.

    Plain form: `exl2ray.quant.gptq.refine_codes`. x (n, C) float32 and u (n, n) float32 as for `quantize`, both kept.
    """
    n = x.shape[0]
    for b in numba.prange(blocks.shape[0]):
        seg = blocks[b, 0]
        c0 = blocks[b, 1]
        width = blocks[b, 2] - c0
        bits = seg_bits[seg]
        if bits < least_bits:
            continue
        zero = np.float32(1 << (bits - 1))
        high = np.float32((1 << bits) - 1) - zero
        best = np.full(BLOCK, np.float32(np.inf))
        chosen = np.empty(BLOCK, np.uint8)
        step = np.empty(BLOCK, np.float32)
        error = np.empty(BLOCK, np.float32)
        work = np.empty((n, BLOCK), np.float32)
        for j in range(width):
            chosen[j] = scale_codes[c0 + j]
        for t in range(offsets.shape[0]):
            loss = np.zeros(BLOCK, np.float32)
            along = np.zeros(BLOCK, np.float32)
            size = np.zeros(BLOCK, np.float32)
            for j in range(width):
                code = np.float32(scale_codes[c0 + j]) + np.float32(offsets[t])
                step[j] = _half(code * code * seg_m[seg])
            for r in range(n):
                for j in range(width):
                    work[r, j] = x[r, c0 + j]
            for r in range(n):
                for j in range(width):
                    s = step[j]
                    v = work[r, j]
                    q = np.float32(0.0)
                    if s > 0:
                        q = min(max(np.rint(v / s), -zero), high)
                    elif v != 0:
                        q = high if v > 0 else -zero
                    e = (v - _half(q * s)) / u[r, r]
                    g = v / u[r, r]
                    error[j] = e
                    loss[j] += e * e
                    along[j] += e * g
                    size[j] += g * g
                for k in range(r + 1, n):
                    f = u[r, k]
                    for j in range(width):
                        work[k, j] -= f * error[j]
            for j in range(width):
                code = np.int32(scale_codes[c0 + j]) + offsets[t]
                cost = loss[j] + shrinkage * along[j] * along[j] / max(size[j], _TINY)
                if code >= 1 and code <= 16 and cost < best[j]:
                    best[j] = cost
                    chosen[j] = np.uint8(code)
        for j in range(width):
            scale_codes[c0 + j] = chosen[j]


@numba.njit(cache=True, parallel=True)
def quantize(x, u, feedback, blocks, seg_bits, seg_m, scale_codes, dq, codes, error):
    """Integers, reconstructed weights and scaled errors of one group.

    x (n, C) float32 is overwritten; u (n, n) float32 upper, the group's block of U; seg_m (S,) float32 holds
    fp16(scale_max / 256). Out: dq (n, C) float32 (values of halves), codes (n, C) uint8, error (n, C) float32 = e of GPTQ.
    """
    n = x.shape[0]
    for b in numba.prange(blocks.shape[0]):
        seg = blocks[b, 0]
        c0, c1 = blocks[b, 1], blocks[b, 2]
        bits = seg_bits[seg]
        zero = np.float32(1 << (bits - 1))
        high = np.float32((1 << bits) - 1) - zero
        step = np.empty(BLOCK, np.float32)
        for c in range(c0, c1):
            code = np.float32(scale_codes[c])
            step[c - c0] = _half(code * code * seg_m[seg])
        for r in range(n):
            for c in range(c0, c1):
                s = step[c - c0]
                v = x[r, c]
                q = np.float32(0.0)
                if s > 0:
                    q = min(max(np.rint(v / s), -zero), high)
                elif v != 0:
                    q = high if v > 0 else -zero
                d = _half(q * s)
                dq[r, c] = d
                codes[r, c] = np.uint8(q + zero)
                error[r, c] = (v - d) / u[r, r] if feedback else np.float32(0.0)
            if feedback:
                for k in range(r + 1, n):
                    f = u[r, k]
                    for c in range(c0, c1):
                        x[k, c] -= f * error[r, c]


@numba.njit(cache=True, parallel=True)
def descend(s, h, blocks, seg_bits, seg_m, scale_codes, dq, codes, change):
    """Coordinate descent over the rows of one group: weight i becomes the nearest to dq_i + s_i / h_ii.

    s (n, C) float32 = rows of H E, overwritten; h (n, n) float32, the group's block of H; dq (n, C) float32 (values of
    halves), updated. Out: codes (n, C) uint8, change (n, C) float32 = dq before - after.
    """
    n = s.shape[0]
    for b in numba.prange(blocks.shape[0]):
        seg = blocks[b, 0]
        c0, c1 = blocks[b, 1], blocks[b, 2]
        bits = seg_bits[seg]
        zero = np.float32(1 << (bits - 1))
        high = np.float32((1 << bits) - 1) - zero
        step = np.empty(BLOCK, np.float32)
        for c in range(c0, c1):
            code = np.float32(scale_codes[c])
            step[c - c0] = _half(code * code * seg_m[seg])
        for r in range(n):
            for c in range(c0, c1):
                t = step[c - c0]
                v = dq[r, c] + s[r, c] / h[r, r]
                q = np.float32(0.0)
                if t > 0:
                    q = min(max(np.rint(v / t), -zero), high)
                elif v != 0:
                    q = high if v > 0 else -zero
                d = _half(q * t)
                codes[r, c] = np.uint8(q + zero)
                change[r, c] = dq[r, c] - d
                dq[r, c] = d
            for k in range(r + 1, n):
                f = h[r, k]
                for c in range(c0, c1):
                    s[k, c] += f * change[r, c]


class CpuGroups:
    """The group step of one batch on NumPy views of its buffers."""

    def __init__(self, ws: Workspace) -> None:
        # Numba's threads come from the OpenMP library that torch uses too, and starting them sets torch's number of
        # threads, on which the sums of the forward passes depend.
        threads = torch.get_num_threads()
        try:
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        except ValueError as e:  # a layer that is not installed
            layer = os.environ.get("NUMBA_THREADING_LAYER", "")
            raise UsageError(f"environment variable NUMBA_THREADING_LAYER is {layer!r}: {e}", "unset it") from e
        torch.set_num_threads(threads)
        self.ws = ws
        self.blocks, first = blocks_of(ws.bounds, BLOCK)
        self.first = first[:-1]
        self.grid = shrink_grid()
        self.offsets = np.array(OFFSETS, dtype=np.int32)

    def step(self, g: int, a: int, n: int, row: int) -> None:
        ws = self.ws
        x = ws.x[a : a + n].numpy()
        bits = np.ascontiguousarray(ws.bits[:, g].numpy())
        block_top = np.empty(len(self.blocks), np.float32)
        column_tops(x, self.blocks, block_top)
        half_range = (2.0**bits - 1).astype(np.float32) / np.float32(2)
        seg_top = (np.maximum.reduceat(block_top, self.first) + np.float32(1e-12)) / half_range
        partial = np.empty((len(self.blocks), GRID_POINTS), np.float32)
        scale_codes = ws.scale_codes[g].numpy()
        grid_errors(x, self.blocks, seg_top, bits, self.grid, scale_codes, partial)
        sums = np.add.reduceat(partial.astype(np.float64), self.first, axis=0)
        best = (seg_top * self.grid[sums.argmin(1)]).astype(np.float16)
        ws.scale_max[g].copy_(torch.from_numpy(best))
        seg_m = (best.astype(np.float32) / np.float32(256)).astype(np.float16).astype(np.float32)

        rounded = torch.empty(x.shape, dtype=torch.float32)
        codes = torch.empty(x.shape, dtype=torch.uint8) if ws.codes is None else ws.codes[row : row + n]
        u = ws.u[a : a + n, a : a + n].contiguous().numpy()
        if ws.scale_search == "feedback" and ws.feedback and n <= REFINED_ROWS:
            refine_codes(
                x, u, self.blocks, bits, seg_m, scale_codes, self.offsets, REFINED_BITS, np.float32(SHRINKAGE)
            )
        quantize(
            x, u, ws.feedback, self.blocks, bits, seg_m, scale_codes,
            rounded.numpy(), codes.numpy(), ws.error[a : a + n].numpy(),
        )  # fmt: skip
        ws.dq[ws.perm[row : row + n]] = rounded.half()

    def descend(self, groups: range, start: int) -> None:
        ws, a = self.ws, 0
        height = sum(ws.rows[groups.start : groups.stop])
        for g in groups:
            b = a + ws.rows[g]
            self._descend(g, a, b - a, start + a)
            if b < height:
                ws.x[b:height].addmm_(ws.u[a:b, b:height].T, ws.error[a:b])
            a = b

    def _descend(self, g: int, a: int, n: int, row: int) -> None:
        ws = self.ws
        bits = np.ascontiguousarray(ws.bits[:, g].numpy())
        seg_m = (ws.scale_max[g].float() / 256).half().float().numpy()
        rows = ws.perm[row : row + n]
        rounded = ws.dq[rows].float()
        codes = torch.empty(rounded.shape, dtype=torch.uint8) if ws.codes is None else ws.codes[row : row + n]
        descend(
            ws.x[a : a + n].numpy(), ws.u[a : a + n, a : a + n].contiguous().numpy(), self.blocks, bits, seg_m,
            ws.scale_codes[g].numpy(), rounded.numpy(), codes.numpy(), ws.error[a : a + n].numpy(),
        )  # fmt: skip
        ws.dq[rows] = rounded.half()
