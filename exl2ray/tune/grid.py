"""The integers of one packed linear as latent numbers that gradients can move.

A weight is step * q with q an integer of [-2^(b-1), 2^(b-1) - 1]; step, the width b and the group belong to its row and
column and stay. Its latent l is a float32 number in units of the step; the weight used is step * round(l), and the gradient
passes the rounding as if it were not there (straight-through estimator: Bengio, Leonard, Courville 2013). Then dL/dl = step *
dL/dw; since Adam's steps do not depend on the scale of a gradient, the factor is left out.

Latents begin where the weight of the source lies, but no further than `REACH` from the integer that was solved: the solved
rounding is where tuning starts, and what it rounded furthest is moved first.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.quant.pack import pack_rows, unpack_rows, unpack_scale_codes

REACH = 0.45  # of a step


@dataclass(frozen=True, eq=False)
class Grid:
    """Where the integers of one linear may lie. Rows in natural order, columns without padding; all on one device."""

    columns: int  # N
    steps: Tensor  # (G, N) float16
    group: Tensor  # (K,) int64, of each row
    low: Tensor  # (K, 1) float32, the least integer of each row
    high: Tensor  # (K, 1) float32
    invperm: Tensor  # (K,) int64, stored row of each natural one

    @staticmethod
    def of(packed: PackedLinear, columns: int, device: torch.device) -> Grid:
        """``columns``: of the linear, without padding."""
        layout = packed.layout
        invperm = packed.q_invperm.to(device).long()
        rows = torch.tensor(layout.rows, device=device)
        group = torch.repeat_interleave(torch.arange(len(layout.bits), device=device), rows)[invperm]
        half = torch.tensor([float(1 << (b - 1)) for b in layout.bits], device=device)[group][:, None]
        largest = (packed.q_scale_max.to(device).float() / 256).half()
        codes = unpack_scale_codes(packed.q_scale.to(device))
        steps = (codes.int() ** 2).half() * largest[:, None]
        return Grid(columns, steps[:, :columns].contiguous(), group, -half, half - 1, invperm)

    def integers(self, packed: PackedLinear) -> Tensor:
        """(K, N) float32 integers of a packed linear."""
        codes = unpack_rows(packed.q_weight.to(self.group.device), packed.layout)
        return codes[self.invperm, : self.columns].float() + self.low

    def latents(self, integers: Tensor, source: Tensor | None) -> Tensor:
        """(K, N) float32 to begin with. source: the weight (K, N) that was quantised; None: the integers themselves."""
        if source is None:
            return integers.clone()
        steps = self.steps.float()[self.group]
        wanted = torch.where(steps > 0, source.to(steps.device).float() / steps, integers)
        return torch.maximum(torch.minimum(wanted, integers + REACH), integers - REACH)

    def rounded(self, latents: Tensor) -> Tensor:
        """(K, N) float32 integers. Latents are kept within reach of the least and the largest one, in place."""
        return torch.round(torch.clamp_(latents, self.low - REACH, self.high + REACH))

    def weight(self, integers: Tensor) -> Tensor:
        """(K, N) float16 as a loader has it (`exl2ray.quant.pack.dequantize`)."""
        return integers.half() * self.steps[self.group]

    def codes(self, integers: Tensor) -> Tensor:
        """(K, N) uint8, unsigned as they are stored; natural order."""
        return (integers - self.low).to(torch.uint8)

    def signed(self, codes: Tensor) -> Tensor:
        """Inverse of `codes`."""
        return codes.to(self.low.device).float() + self.low

    def packed(self, before: PackedLinear, codes: Tensor) -> PackedLinear:
        """``before`` with other integers, codes (K, N) uint8; padding columns keep theirs."""
        layout = before.layout
        stored = unpack_rows(before.q_weight.to(self.group.device), layout)
        stored[self.invperm, : self.columns] = codes.to(stored.device)
        return replace(before, q_weight=pack_rows(stored, layout).cpu())
