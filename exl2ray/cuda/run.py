"""A packed linear on its device: products with few rows by a fused kernel, and its weights unpacked for many.

Plain reference of both: `dequantize_numpy` of tests/exl2_numpy.py and a matrix product. On CUDA devices the kernels are those
of `run_source.py`, on the CPU those of `run_cpu.py`. One thread and one stream at a time may use the linears of a device:
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
from exl2ray.cuda.run_source import UNIT, Variant, product_kernel, unpack_kernel

MAX_ROWS = 16  # rows of activations that the fused kernel takes at once
# One row: the fastest of 18 on an H200 (docs/log.md). More rows: not measured; two columns compile sooner.
VARIANTS = (Variant(1, columns=4), *(Variant(m, units=min(64, 256 // m)) for m in (2, 4, 8, 16)))
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
        variant = next(v for v in self.variants if v.rows >= x.shape[0])
        key = (variant.rows, x.dtype == torch.bfloat16)
        if key not in self._launches:
            self._launches[key] = self._prepared(replace(variant, brain=key[1]), x)
        launch = self._launches[key][0]
        launch.point(0, _bits(x))
        launch.point(13, _bits(y))
        launch(stream_of(x), x.shape[0])
        return y

    def _prepared(self, v: Variant, x: Tensor) -> tuple[Launch, Tensor]:
        device = x.device
        units, blocks = self.table.shape[0], -(-self.columns // v.block_columns)
        per_sm = self.blocks_per_sm or COLUMNS_PER_SM // v.columns
        slices, slice_units = cut(units, blocks, v, per_sm * _processors(device))
        partial = _partial(device, slices * v.rows * self.columns)
        if device not in _counters:
            _counters[device] = torch.zeros(COUNTERS, dtype=torch.int32, device=device)
        empty = _bits(x.new_empty(0, x.shape[1]))
        out = _bits(x.new_empty(0, self.columns))
        bias = self.bias if self.bias is not None else self.tops.to(torch.float16)
        made = Launch(
            product_kernel(v), (blocks, slices), 32 * v.warps, empty, self.q_weight.view(torch.int64), self.q_scale,
            self.tops, self.perm, self.table, bias, self.bias is not None, self.columns, units, slice_units, partial,
            _counters[device], out, VARY,
        )  # fmt: skip
        return made, partial

    def unpack(self, out: Tensor) -> None:
        """The weights into ``out`` (K, N) float16 or bfloat16 (on the CPU float32, too): rows in the order of the input."""
        if not out.is_cuda and not SIMULATED:
            run_cpu.unpack(out, *self._tensors)
            return
        grid = (-(-self.columns // 2 // UNPACK_THREADS), self.perm.shape[0] // UNIT)
        q = self.q_weight.view(torch.int64)
        args: tuple[Any, ...] = (q, self.q_scale, self.tops, self.perm, self.table, self.columns, _bits(out))
        Launch(unpack_kernel(out.dtype == torch.bfloat16), grid, UNPACK_THREADS, *args)(stream_of(out))


def cut(units: int, blocks: int, v: Variant, wanted: int) -> tuple[int, int]:
    """Slices of K and units per slice: ``wanted`` blocks in all, as long as warps have work and activations fit."""
    slices = max(1, min(wanted // blocks, units // v.warps))
    per_slice = min(-(-units // slices), v.units)
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
