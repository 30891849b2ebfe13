"""A packed linear on its device: products with few rows by a fused kernel, and its weights unpacked for many.

Plain reference of both: `dequantize_numpy` of tests/exl2_numpy.py and a matrix product. On CUDA devices the kernels are those
of `run_kernels.py`, on the CPU those of `run_cpu.py`. One thread and one stream at a time may use the linears of a device:
they share a workspace.
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

VARIANTS = (Variant(1, columns=4), Variant(4, warps=4))  # not measured yet
COLUMNS_PER_SM = 8  # per lane of a warp, as blocks: two blocks of four columns, four of two
UNPACK_THREADS = 128
COUNTERS = 1 << 15  # blocks of columns of one linear, at most
SIMULATED = os.environ.get("NUMBA_ENABLE_CUDASIM") == "1"

_partials: dict[torch.device, Tensor] = {}
_counters: dict[torch.device, Tensor] = {}


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
        self._launches: dict[tuple[int, bool], tuple[Launch, Tensor]] = {}

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
        y = torch.empty(x.shape[0], self.columns, dtype=x.dtype, device=x.device)
        one, four = self.variants
        key = (-(-x.shape[0] // 4) if x.shape[0] > 1 else 0, x.dtype == torch.bfloat16)
        if key not in self._launches:
            self._launches[key] = self._prepared(replace(four if key[0] else one, brain=key[1]), max(1, 4 * key[0]), x)
        launch = self._launches[key][0]
        launch.point(0, _bits(x))
        launch.point(13, _bits(y))
        launch(stream_of(x), x.shape[0])
        return y

    def _prepared(self, v: Variant, rows: int, x: Tensor) -> tuple[Launch, Tensor]:
        device = x.device
        units, blocks = self.table.shape[0], -(-self.columns // v.block_columns)
        per_sm = self.blocks_per_sm or COLUMNS_PER_SM // v.columns
        slices, slice_units = cut(units, blocks, v.warps, v.units(rows), per_sm * _processors(device))
        partial = _partial(device, slices * rows * self.columns)
        if device not in _counters:
            _counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        empty = _bits(x.new_empty(0, x.shape[1]))
        out = _bits(x.new_empty(0, self.columns))
        bias = self.bias if self.bias is not None else self.tops.to(torch.float16)
        made = Launch(
            product_kernel(v), (blocks, slices), v.threads, empty, self.q_weight.view(torch.int64).flatten(), self.q_scale,
            self.tops, self.perm, self.table, bias, self.bias is not None, self.columns, units, slice_units, partial,
            _counters[device], out, VARY, ONE,
        )  # fmt: skip
        return made, partial

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


def _partial(device: torch.device, floats: int) -> Tensor:
    """The workspace of a device. Where a larger one takes its place, launches and graphs made before keep theirs."""
    if device not in _partials or _partials[device].numel() < floats:
        _partials[device] = torch.empty(floats, dtype=torch.float32, device=device)
    return _partials[device]
