"""A packed linear on its device: products with few rows by a fused kernel, and its weights unpacked for many.

Plain reference of both: `dequantize_numpy` of tests/exl2_numpy.py and a matrix product. On CUDA devices the kernels are those
of `run_kernels.py`, on the CPU those of `run_cpu.py`. One thread and one stream at a time may use a linear.

CUDA graphs: all that outlives a call is made with `Packed`, before any is recorded; what a call needs besides, it takes from
torch's allocator and gives back. A workspace that linears share and a larger one replaces was tried first: a graph goes
on to write where the old one was, and `torch.compile(mode="reduce-overhead")` refuses calls that keep memory.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from exl2ray.cuda import run_cpu
from exl2ray.cuda.launch import VARY, Launch, stream_of
from exl2ray.cuda.run_kernels import ONE, UNIT, Variant, product_kernel, unpack_kernel

VARIANTS = (Variant(1, columns=4), Variant(4, warps=4))  # one row: fastest of those timed on an H200; more rows: not compared
COLUMNS_PER_SM = 8  # per lane of a warp, as blocks: two blocks of four columns, four of two
UNPACK_THREADS = 128
BLOCK_COLUMNS = 64  # at least
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"


class Packed:
    """Tensors of one linear, all on one device.

    q_weight (Q, N) int32 and q_scale (G, N / 8) int32 as in the file; tops (G,) float32 = fp16(q_scale_max / 256); perm (K,)
    int32, the input feature of each stored row; table (K / 32, 3) int32: width, first word row and group of each unit; bias
    (N,) float16 or None.
    """

    def __init__(self, q_weight: Tensor, q_scale: Tensor, tops: Tensor, perm: Tensor, table: Tensor, bias: Tensor | None):
        self.q_weight, self.q_scale, self.tops, self.perm, self.table, self.bias = q_weight, q_scale, tops, perm, table, bias
        self.variants = VARIANTS
        self.blocks_per_sm = 0  # 0: by COLUMNS_PER_SM
        self._bias = bias if bias is not None else tops.to(torch.float16)  # of the type that kernels are compiled for
        self._counters = torch.zeros(-(-self.columns // BLOCK_COLUMNS), dtype=torch.int32, device=tops.device)
        self._launches: dict[tuple[int, torch.dtype], tuple[Launch, int]] = {}

    @property
    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q_weight, self.q_scale, self.tops, self.perm, self.table

    @property
    def columns(self) -> int:
        return self.q_weight.shape[1]

    def product(self, x: Tensor) -> Tensor:
        """x (rows <= MAX_ROWS, K) float16 or bfloat16 (on the CPU float32, too) -> (rows, N) of its dtype, bias added."""
        if not x.is_cuda and not SIMULATED:
            return run_cpu.product(x, *self._tensors, self.bias)
        x = x.contiguous()
        rows = x.shape[0]
        y = torch.empty(rows, self.columns, dtype=x.dtype, device=x.device)
        one, four = self.variants
        key = (-(-rows // 4) if rows > 1 else 0, x.dtype)
        if key not in self._launches:
            variant = replace(four if key[0] else one, brain=x.dtype == torch.bfloat16)
            self._launches[key] = self._prepared(variant, max(1, 4 * key[0]), x)
        launch, slices = self._launches[key]
        launch.point(0, _bits(x))
        if slices > 1:
            partial = torch.empty(slices * rows * self.columns, dtype=torch.float32, device=x.device)
            launch.point(11, partial)
        launch.point(13, _bits(y))
        launch(stream_of(x), rows)
        return y

    def _prepared(self, v: Variant, rows: int, x: Tensor) -> tuple[Launch, int]:
        """The launch for up to so many rows, of the dtype of x, and its slices of K."""
        units, blocks = self.table.shape[0], -(-self.columns // v.block_columns)
        per_sm = self.blocks_per_sm or COLUMNS_PER_SM // v.columns
        slices, slice_units = cut(units, blocks, v.warps, v.units(rows), per_sm * _processors(x.device))
        empty, out = _bits(x.new_empty(0, x.shape[1])), _bits(x.new_empty(0, self.columns))
        made = Launch(
            product_kernel(v), (blocks, slices), v.threads, empty, self.q_weight.view(torch.int64).flatten(), self.q_scale,
            self.tops, self.perm, self.table, self._bias, self.bias is not None, self.columns, units, slice_units,
            x.new_empty(0, dtype=torch.float32), self._counters, out, VARY, ONE,
        )  # fmt: skip
        return made, slices

    def unpack(self, out: Tensor) -> None:
        """The weights into ``out`` (K, N) float16 or bfloat16 (on the CPU float32, too): rows in the order of the input."""
        if not out.is_cuda and not SIMULATED:
            run_cpu.unpack(out, *self._tensors)
            return
        grid = (-(-self.columns // 2 // UNPACK_THREADS), self.perm.shape[0] // UNIT)
        q = self.q_weight.view(torch.int64).flatten()
        args: tuple[Any, ...] = (q, self.q_scale, self.tops, self.perm, self.table, self.columns, _bits(out), ONE)
        Launch(unpack_kernel(out.dtype == torch.bfloat16), grid, UNPACK_THREADS, *args)(stream_of(out))


def cut(units: int, blocks: int, warps: int, most: int, wanted: int) -> tuple[int, int]:
    """Slices of K and units per slice, at most ``most``: ``wanted`` blocks in all, as long as their warps have work."""
    slices = max(1, min(wanted // blocks, units // warps))
    per_slice = min(-(-units // slices), most)
    return -(-units // per_slice), per_slice


def _bits(t: Tensor) -> Tensor:
    return t.view(torch.int16) if t.dtype == torch.bfloat16 else t


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
