"""Launches the kernels of `exl2ray.cuda.kernels` on torch tensors, on torch's current stream.

Wrapping a tensor for Numba costs more than a launch, so every buffer of a batch is wrapped once. The same class runs on
NumPy arrays under Numba's CUDA simulator, which is how the kernels are tested without a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import cuda
from torch import Tensor

from exl2ray.cuda import kernels
from exl2ray.cuda.backend import OFFSETS, REFINED_BITS, REFINED_ROWS, SHRINKAGE, Workspace, blocks_of, shrink_grid


def wrap(t: Tensor) -> Any:
    """A Numba view of a tensor: the device array, or the NumPy array under the simulator."""
    return cuda.as_cuda_array(t) if t.is_cuda else t.numpy()


def stream_of(t: Tensor) -> Any:
    """torch's current stream for Numba launches; 0 under the simulator, which has no external streams."""
    return cuda.external_stream(torch.cuda.current_stream(t.device).cuda_stream) if t.is_cuda else 0


class CudaGroups:
    def __init__(self, ws: Workspace) -> None:
        device = ws.x.device
        self.ws = ws
        search, first = blocks_of(ws.bounds, kernels.COLUMNS)
        quant, _ = blocks_of(ws.bounds, kernels.QUANT_COLUMNS)

        def upload(array: np.ndarray) -> Any:
            return wrap(torch.from_numpy(array).to(device))

        def buffer(*shape: int) -> Any:
            return wrap(torch.empty(shape, dtype=torch.float32, device=device))

        self.search, self.quant, self.first = upload(search), upload(quant), upload(first)
        self.search_blocks, self.quant_blocks, self.segments = len(search), len(quant), len(first) - 1
        self.bits = wrap(ws.bits)
        self.grid = upload(shrink_grid(kernels.PADDED))
        self.col_top, self.block_top = buffer(ws.x.shape[1]), buffer(len(search))
        self.seg_top, self.seg_m = buffer(self.segments), buffer(self.segments)
        self.partial = buffer(len(search), kernels.PADDED)
        self.x, self.error, self.u = wrap(ws.x), wrap(ws.error), wrap(ws.u)
        self.perm, self.dq = wrap(ws.perm), wrap(ws.dq)
        self.scale_codes, self.scale_max = wrap(ws.scale_codes), wrap(ws.scale_max)
        self.codes = wrap(ws.codes if ws.codes is not None else ws.scale_codes)
        self.keep = ws.codes is not None
        self.refine = ws.refine and ws.feedback
        if self.refine:
            self.offsets = upload(np.array(OFFSETS, dtype=np.int32))
            self.cost = buffer(len(OFFSETS), ws.x.shape[1])

    def step(self, g: int, a: int, n: int, row: int) -> None:
        ws, stream = self.ws, stream_of(self.ws.x)
        kernels.column_tops[self.search_blocks, kernels.THREADS, stream](
            self.x, a, n, self.search, self.col_top, self.block_top
        )
        kernels.grid_errors[self.search_blocks, kernels.THREADS, stream](
            self.x, a, n, self.search, self.first, self.bits, g, self.grid,
            self.col_top, self.block_top, self.scale_codes, self.seg_top, self.partial,
        )  # fmt: skip
        kernels.choose[self.segments, 4 * kernels.PADDED, stream](
            self.partial, self.first, self.seg_top, self.grid, g, self.scale_max, self.seg_m
        )
        if self.refine and n <= REFINED_ROWS:
            kernels.trial[(self.quant_blocks, len(OFFSETS)), kernels.QUANT_COLUMNS, stream](
                self.x, a, n, self.u, self.quant, self.bits, g, self.seg_m, self.scale_codes,
                self.offsets, REFINED_BITS, np.float32(SHRINKAGE), self.cost,
            )  # fmt: skip
            kernels.pick[self.quant_blocks, kernels.QUANT_COLUMNS, stream](
                self.cost, self.quant, self.bits, g, self.scale_codes, self.offsets, REFINED_BITS
            )
        for r in range(0, n, kernels.ROWS):
            kernels.quantize[self.quant_blocks, kernels.QUANT_COLUMNS, stream](
                self.x, a + r, self.u, ws.feedback, self.quant, self.bits, g, self.seg_m,
                self.scale_codes, self.perm, row + r, self.dq, self.codes, self.keep, self.error,
            )  # fmt: skip
            top, bottom = a + r + kernels.ROWS, a + n
            if ws.feedback and top < bottom:
                # Thin and bound by memory: full float32 costs nothing here.
                ws.x[top:bottom].addmm_(ws.u[a + r : top, top:bottom].T, ws.error[a + r : top], alpha=-1)

    def descend(self, g: int, a: int, n: int, row: int) -> None:
        ws, stream = self.ws, stream_of(self.ws.x)
        for r in range(0, n, kernels.ROWS):
            kernels.descend[self.quant_blocks, kernels.QUANT_COLUMNS, stream](
                self.x, a + r, self.u, self.quant, self.bits, g, self.scale_max, self.scale_codes,
                self.perm, row + r, self.dq, self.codes, self.keep, self.error,
            )  # fmt: skip
            top, bottom = a + r + kernels.ROWS, a + n
            if top < bottom:
                ws.x[top:bottom].addmm_(ws.u[a + r : top, top:bottom].T, ws.error[a + r : top])
