"""The group step behind one interface: Numba CUDA for CUDA tensors (and under the simulator), Numba njit otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numba
import numpy as np
import torch
from torch import Tensor

from exl2ray.cuda import cpu

GRID_POINTS = 97
# Refinement of scale codes (`exl2ray.quant.scales.refine`): least width whose codes are refined (with two bits the loss of a
# layer misleads), most rows of a group (what a kernel holds), weight of the error along the weights, changes of a code that
# are tried, in order.
REFINED_BITS, REFINED_ROWS, SHRINKAGE = 3, 128, 1.0
OFFSETS = (0, -1, 1, -2, 2, -3, 3)


@dataclass
class Workspace:
    """Buffers of one batch of segments. C columns, K rows, G groups, S segments, P rows of the largest panel."""

    x: Tensor  # (P, C) float32, current weights of the panel
    error: Tensor  # (P, C) float32, scaled errors e of the panel
    u: Tensor  # (P, P) float32, the panel's block of U
    perm: Tensor  # (K,) int64
    dq: Tensor  # (K, C) float16, natural row order
    codes: Tensor | None  # (K, C) uint8, act-order
    scale_codes: Tensor  # (G, C) uint8
    scale_max: Tensor  # (G, S) float16
    bounds: tuple[tuple[int, int], ...]  # column range of each segment
    bits: Tensor  # (S, G) int32
    feedback: bool
    refine: bool = False  # scale codes by the loss after feedback inside the group; needs feedback


class GroupBackend(Protocol):
    def step(self, g: int, a: int, n: int, row: int) -> None:
        """Quantises group g of every segment: rows a .. a+n of the panel, rows row .. row+n in act-order.

        Reads ``x`` and ``u``; writes dq, codes, scale_codes[g], scale_max[g] and, with feedback, rows a.. of ``error``.
        """
        ...

    def descend(self, g: int, a: int, n: int, row: int) -> None:
        """Rounds the weights of group g anew, one row after another, with the scales that it has.

        Rows as for ``step``. ``x`` holds S = H E, ``u`` the panel's block of H: weight i becomes the nearest to
        dq_i + S_i / H_ii. Updates dq, codes and the group's rows of ``x``; writes rows a.. of ``error``: dq before - after.
        """
        ...


def group_backend(ws: Workspace) -> GroupBackend:
    if ws.x.is_cuda:
        from exl2ray.cuda.gpu import CudaGroups

        return CudaGroups(ws)
    return CpuGroups(ws)


def blocks_of(bounds: Sequence[tuple[int, int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of at most ``size`` columns that do not straddle segments.

    Returns (B, 3) int32 rows of (segment, first column, last column + 1) and (S + 1,) int32, first block of each segment.
    """
    blocks = [(s, c, min(c + size, c1)) for s, (c0, c1) in enumerate(bounds) for c in range(c0, c1, size)]
    table = np.array(blocks, dtype=np.int32)
    first = np.searchsorted(table[:, 0], np.arange(len(bounds) + 1)).astype(np.int32)
    return table, first


def shrink_grid(padded: int = GRID_POINTS) -> np.ndarray:
    """(padded,) float32 shrink factors, the numbers of `exl2ray.quant.scales.grid`; the padding repeats the last."""
    t = np.minimum(np.arange(padded), GRID_POINTS - 1).astype(np.float32) / np.float32(GRID_POINTS - 1)
    points: np.ndarray = (np.float32(0.70) * (1 - t) + np.float32(1.2) * t).astype(np.float32)
    return points


class CpuGroups:
    def __init__(self, ws: Workspace) -> None:
        # Numba's threads come from the OpenMP library that torch uses too, and starting them sets torch's number of
        # threads, on which the sums of the forward passes depend.
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
        torch.set_num_threads(threads)
        self.ws = ws
        self.blocks, first = blocks_of(ws.bounds, cpu.BLOCK)
        self.first = first[:-1]
        self.grid = shrink_grid()
        self.offsets = np.array(OFFSETS, dtype=np.int32)

    def step(self, g: int, a: int, n: int, row: int) -> None:
        ws = self.ws
        x = ws.x[a : a + n].numpy()
        bits = np.ascontiguousarray(ws.bits[:, g].numpy())
        block_top = np.empty(len(self.blocks), np.float32)
        cpu.column_tops(x, self.blocks, block_top)
        half_range = (2.0**bits - 1).astype(np.float32) / np.float32(2)
        seg_top = (np.maximum.reduceat(block_top, self.first) + np.float32(1e-12)) / half_range
        partial = np.empty((len(self.blocks), GRID_POINTS), np.float32)
        scale_codes = ws.scale_codes[g].numpy()
        cpu.grid_errors(x, self.blocks, seg_top, bits, self.grid, scale_codes, partial)
        sums = np.add.reduceat(partial.astype(np.float64), self.first, axis=0)
        best = (seg_top * self.grid[sums.argmin(1)]).astype(np.float16)
        ws.scale_max[g].copy_(torch.from_numpy(best))
        seg_m = (best.astype(np.float32) / np.float32(256)).astype(np.float16).astype(np.float32)

        rounded = torch.empty(x.shape, dtype=torch.float32)
        codes = torch.empty(x.shape, dtype=torch.uint8) if ws.codes is None else ws.codes[row : row + n]
        u = ws.u[a : a + n, a : a + n].contiguous().numpy()
        if ws.refine and ws.feedback and n <= REFINED_ROWS:
            cpu.refine_codes(
                x, u, self.blocks, bits, seg_m, scale_codes, self.offsets, REFINED_BITS, np.float32(SHRINKAGE)
            )
        cpu.quantize(
            x, u, ws.feedback, self.blocks, bits, seg_m, scale_codes,
            rounded.numpy(), codes.numpy(), ws.error[a : a + n].numpy(),
        )  # fmt: skip
        ws.dq[ws.perm[row : row + n]] = rounded.half()

    def descend(self, g: int, a: int, n: int, row: int) -> None:
        ws = self.ws
        bits = np.ascontiguousarray(ws.bits[:, g].numpy())
        seg_m = (ws.scale_max[g].float() / 256).half().float().numpy()
        rows = ws.perm[row : row + n]
        rounded = ws.dq[rows].float()
        codes = torch.empty(rounded.shape, dtype=torch.uint8) if ws.codes is None else ws.codes[row : row + n]
        cpu.descend(
            ws.x[a : a + n].numpy(), ws.u[a : a + n, a : a + n].contiguous().numpy(), self.blocks, bits, seg_m,
            ws.scale_codes[g].numpy(), rounded.numpy(), codes.numpy(), ws.error[a : a + n].numpy(),
        )  # fmt: skip
        ws.dq[rows] = rounded.half()
