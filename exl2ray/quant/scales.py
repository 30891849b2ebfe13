"""Scale search of one group, plain form (converter-algorithm section 7), and a refinement of its own.

Every column of a group has a 4-bit code s in 1..16; all share one ``scale_max``. A column's step is
``e = fp16(s^2 * fp16(scale_max / 256))``, the number the loader will compute. The search picks the codes from the
column maxima and then the group-wide shrink factor p in 0.70..1.20 with the smallest sum of |error|^3.5.

That search rounds each weight by itself, but GPTQ passes the rounding error of a row on to the rows after it. `refine`
therefore runs the feedback of the group for a few codes around the one found, and keeps the code with the smallest loss.
Small steps clip, and clipping shrinks the output, which costs more in the whole model than in the layer's loss: the share of
the error that lies along the weights counts extra.

Columns and codes are independent, so on a GPU this is one launch per group, and one to pick. Starting from the reference's
codes and its group-wide factor is as good as a search of our own (KL 0.825 and 0.828 of the reference's), so there is none.
Groups of 2 bits are left alone: their loss does not fall, and a trained model of 28 M parameters got worse.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from exl2ray.cuda.backend import OFFSETS, REFINED_BITS, REFINED_ROWS, SHRINKAGE

GRID_POINTS = 97
_GRID_LOW, _GRID_HIGH = 0.70, 1.2
_TINY = 1e-30


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


def refine(x: Tensor, u: Tensor, bits: int, codes: Tensor, scale_max: Tensor) -> Tensor:
    """Scale codes (N,) uint8 with the smallest loss after error feedback inside the group.

    x: (n, N) float32, as for `search`, whose result codes and scale_max are. u: (n, n) float32 upper, the group's block of
    U, H^-1 = U^T U. Codes at ``OFFSETS`` are tried; of equal costs the first one wins. With the current weights x_i at step
    i, their rounded values q_i, e_i = (x_i - q_i) / u_ii and g_i = x_i / u_ii, a code costs sum e_i^2 (the loss that GPTQ
    minimises) + SHRINKAGE (sum e_i g_i)^2 / sum g_i^2. Groups below REFINED_BITS or above REFINED_ROWS keep their codes.
    """
    if bits < REFINED_BITS or len(x) > REFINED_ROWS:
        return codes
    zero = 2 ** (bits - 1)
    best = torch.full(codes.shape, math.inf, device=x.device)
    chosen = codes.int()
    for offset in OFFSETS:
        tried = codes.int() + offset
        step = step_sizes(tried.clamp(1, 16), scale_max).float()
        work = x.clone()
        loss, along, size = (torch.zeros_like(step) for _ in range(3))
        for r in range(x.shape[0]):
            ratio = torch.nan_to_num(torch.round(work[r] / step), nan=0.0)
            q = (torch.clamp(ratio, -zero, zero - 1) * step).half().float()
            e, g = (work[r] - q) / u[r, r], work[r] / u[r, r]
            loss, along, size = loss + e * e, along + e * g, size + g * g
            work[r + 1 :] -= torch.outer(u[r, r + 1 :], e)
        cost = loss + SHRINKAGE * along**2 / torch.clamp(size, min=_TINY)
        better = (cost < best) & (tried >= 1) & (tried <= 16)  # false for NaN
        best, chosen = torch.where(better, cost, best), torch.where(better, tried, chosen)
    return chosen.to(torch.uint8)
