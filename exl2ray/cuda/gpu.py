"""Launches the kernels of `exl2ray.cuda.kernels` on torch tensors, on torch's current stream.

All buffers of a batch stay where they are, so the parameters of every launch are prepared once (`exl2ray.cuda.launch`). The
same class runs on NumPy arrays under Numba's CUDA simulator, which is how the kernels are tested without a GPU.
"""

from __future__ import annotations

from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from exl2ray.cuda import kernels, settle
from exl2ray.cuda.backend import OFFSETS, REFINED_BITS, REFINED_ROWS, SHRINKAGE, Workspace, blocks_of, shrink_grid
from exl2ray.cuda.launch import VARY, Launch, stream_of

# An upload waits until the GPU has done what came before it: what every batch of a shape needs is uploaded once.


@lru_cache(maxsize=256)
def _blocks(bounds: tuple[tuple[int, int], ...], size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`blocks_of` on the device."""
    blocks, first = blocks_of(bounds, size)
    return torch.from_numpy(blocks).to(device), torch.from_numpy(first).to(device)


@lru_cache(maxsize=256)
def _group_of(rows: tuple[int, ...], device: torch.device) -> Tensor:
    """(K,) int32: the group of each act-order row."""
    return torch.arange(len(rows), dtype=torch.int32).repeat_interleave(torch.tensor(rows)).to(device)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The shrink factors and the offsets of refined codes on the device."""
    grid, offsets = shrink_grid(kernels.PADDED), np.array(OFFSETS, dtype=np.int32)
    return torch.from_numpy(grid).to(device), torch.from_numpy(offsets).to(device)


class CudaGroups:
    """`exl2ray.cuda.backend.GroupBackend` on a GPU: every launch of a batch is made ready once, for all of its groups."""

    def __init__(self, ws: Workspace) -> None:
        device = ws.x.device
        self.ws = ws
        self._sliced: dict[tuple[int, int, int], tuple[Tensor, Tensor, Tensor]] = {}
        columns = ws.x.shape[1]

        def buffer(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        (search, first), (wide, _) = (_blocks(tuple(ws.bounds), n, device) for n in (kernels.COLUMNS, kernels.TRIAL_COLUMNS))
        segments, grid, offsets = len(first) - 1, *_constants(device)
        col_top, block_top = buffer(columns), buffer(len(search))
        seg_top, seg_m = buffer(segments), buffer(segments)
        partial = buffer(len(search), kernels.PADDED)
        keep = ws.codes is not None
        codes = ws.scale_codes if ws.codes is None else ws.codes

        groups = _group_of(ws.rows, device)

        # VARY: (a, n), (a, n, g), (g,) and (a, n, row), as the kernels have them
        self.tops = Launch(kernels.column_tops, len(search), kernels.THREADS, ws.x, VARY, VARY, search, col_top, block_top)
        self.grid_errors = Launch(
            kernels.grid_errors, len(search), kernels.THREADS, ws.x, VARY, VARY, search, first, ws.bits, VARY, grid,
            col_top, block_top, ws.scale_codes, seg_top, partial,
        )  # fmt: skip
        self.choose = Launch(
            kernels.choose, segments, 4 * kernels.PADDED, partial, first, seg_top, grid, VARY, ws.scale_max, seg_m
        )
        self.first, self.sweep = (
            Launch(
                settle.settle, len(search), settle.THREADS, ws.x, VARY, VARY, ws.u, sweep, ws.feedback, search, ws.bits,
                groups, ws.scale_max, ws.scale_codes, ws.perm, VARY, ws.dq, codes, keep, ws.error,
            )
            for sweep in (False, True)
        )  # fmt: skip
        self.refine = ws.scale_search == "feedback" and ws.feedback
        if self.refine:
            cost, size = buffer(len(OFFSETS), columns), kernels.TRIAL_COLUMNS
            self.trial = Launch(
                kernels.trial, (len(wide), len(OFFSETS)), size, ws.x, VARY, VARY, ws.u, wide, ws.bits, VARY, seg_m,
                ws.scale_codes, offsets, REFINED_BITS, np.float32(SHRINKAGE), cost,
            )  # fmt: skip
            self.pick = Launch(
                kernels.pick, len(wide), size, cost, wide, ws.bits, VARY, ws.scale_codes, offsets, REFINED_BITS
            )

    def step(self, g: int, a: int, n: int, row: int) -> None:
        stream = stream_of(self.ws.x)
        self.tops(stream, a, n)
        self.grid_errors(stream, a, n, g)
        self.choose(stream, g)
        if self.refine and n <= REFINED_ROWS:
            self.trial(stream, a, n, g)
            self.pick(stream, g)
        for r in range(0, n, settle.TALL):
            self._settle(self.first, -1, a + r, a + n, row + r)

    def descend(self, groups: range, start: int) -> None:
        height = sum(self.ws.rows[groups.start : groups.stop])
        for a in range(0, height, settle.TALL):  # whatever groups the rows belong to
            self._settle(self.sweep, 1, a, height, start + a)

    def _settle(self, launch: Launch, sign: int, a: int, bottom: int, row: int) -> None:
        """Rows a .. of the panel, as many as a launch takes; passes their errors on to the others before row ``bottom``."""
        n = min(settle.TALL, bottom - a)
        launch(stream_of(self.ws.x), a, n, row)
        if self.ws.feedback and a + n < bottom:
            below, factor, error = self._views(a, a + n, bottom)
            below.addmm_(factor, error, alpha=sign)

    def _views(self, start: int, top: int, bottom: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rows top .. bottom of x, their factors for the errors of rows start .. top, these errors. Kept: slicing takes
        longer than the launch."""
        key = (start, top, bottom)
        if key not in self._sliced:
            ws = self.ws
            self._sliced[key] = (ws.x[top:bottom], ws.u[start:top, top:bottom].T, ws.error[start:top])
        return self._sliced[key]
