"""Norm weights and biases, which the format stores in float16, as numbers that gradients can move.

A value is float16(stored + scale * delta), its scale the size of what it multiplies with (for a norm with offset 1, of
weight + 1), so that one rate suits weights of every size. The gradient passes the rounding to float16.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.formats.layout import FLOAT16_MAX

LEAST = 0.1  # of the root mean square: the scale of values near 0


@dataclass(eq=False)
class Gain:
    """One tensor. ``name``: in the file. ``delta`` is trained; where all rows of a stacked tensor are one, it is one row."""

    name: str
    role: str  # as in `exl2ray.model.spec.PlainTensor`, or the key of the linear whose bias it is
    stored: Tensor  # float16, (n,) or (heads, n)
    offset: float  # added by the norm
    scale: Tensor  # float32, of the shape of delta
    delta: Tensor  # float32

    @staticmethod
    def of(name: str, role: str, stored: Tensor, offset: float, device: torch.device) -> Gain:
        stored = stored.to(device).half()
        one_row = stored.dim() == 2 and bool((stored == stored[:1]).all())
        effective = ((stored[:1] if one_row else stored).float() + offset).abs()
        mean = float(effective.square().mean().sqrt())
        scale = effective.clamp(min=LEAST * mean if mean > 0 else LEAST)
        return Gain(name, role, stored, offset, scale, torch.zeros_like(scale))

    def value(self, delta: Tensor | None = None) -> Tensor:
        """What the file would hold, float16 in its shape; ``delta``: in place of the present one."""
        moved = self.stored.float() + self.scale * (self.delta if delta is None else delta)
        return moved.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()

    def gradient(self, of_value: Tensor) -> Tensor:
        """With respect to delta, from that with respect to the value."""
        found = of_value.float()
        if found.shape != self.delta.shape:
            found = found.reshape(self.stored.shape).sum(0, keepdim=True)
        return found * self.scale
