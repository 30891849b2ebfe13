"""Scale search of one group, plain form (converter-algorithm section 7).

Every column of a group has a 4-bit code s in 1..16; all share one ``scale_max``. A column's step is
``e = fp16(s^2 * fp16(scale_max / 256))``, the number the loader will compute. The search picks the codes from the
column maxima and then the group-wide shrink factor p in 0.70..1.20 with the smallest sum of |error|^3.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

GRID_POINTS = 97
_GRID_LOW, _GRID_HIGH = 0.70, 1.2


def grid(device: torch.device | str = "cpu") -> Tensor:
    """(97,) float32: the shrink factors p_i."""
    t = torch.arange(GRID_POINTS, dtype=torch.float32, device=device) / (GRID_POINTS - 1)
    return _GRID_LOW * (1 - t) + _GRID_HIGH * t


def step_sizes(codes: Tensor, scale_max: Tensor) -> Tensor:
    """Steps e as the loader computes them, float16. ``codes`` (..., N) integers 1..16, ``scale_max`` float16 (...)."""
    m = (scale_max.float() / 256).half()
    return ((codes.int() ** 2).half() * m[..., None]).half()


def search(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scales of one group.

    x: (n, N) float32, the current (error-compensated) weights. Returns codes (N,) uint8 in 1..16 and scale_max, a
    float16 scalar tensor.
    """
    maxq, zero = 2**bits - 1, 2 ** (bits - 1)
    base = (x.abs().amax(0) + 1e-12) / (maxq / 2)
    top = base.max()
    codes = torch.clamp(torch.round(16 * torch.sqrt(base / top)), 1, 16)
    step = (codes / 16) ** 2 * top
    errors = torch.empty(GRID_POINTS, dtype=torch.float32, device=x.device)
    for i, p in enumerate(grid(x.device)):
        s = step * p
        d = (torch.clamp(torch.round(x / s), -zero, maxq - zero) * s - x).abs()
        errors[i] = (d**3 * torch.sqrt(d)).sum()
    p = grid(x.device)[errors.argmin()]
    return codes.to(torch.uint8), (top * p).half()
