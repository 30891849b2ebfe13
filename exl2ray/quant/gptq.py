"""GPTQ in EXL2's row layout, plain form: quantise a linear layer group by group with error feedback; the search for scales of
one group, and a refinement of its own.

`quantize_reference` is the algorithm as the reference runs it (Frantar et al. 2022, algorithm 1), one row after another:
slow, readable, the oracle of every faster path. `exl2ray.quant.solve` runs the same arithmetic through the compiled kernels
of `exl2ray.cuda`.

Every column of a group has a 4-bit code s in 1..16; all share one ``scale_max``. A column's step is
``e = fp16(s^2 * fp16(scale_max / 256))``, the number the loader will compute. The search picks the codes from the column
maxima and then the group-wide shrink factor p in 0.70..1.20 with the smallest sum of |error|^3.5.

That search rounds each weight by itself, but GPTQ passes the rounding error of a row on to the rows after it. `refine_codes`
therefore runs the feedback of the group for a few codes around the one found, and keeps the code with the smallest loss.
Small steps clip, and clipping shrinks the output, which costs more in the whole model than in the layer's loss: the share of
the error that lies along the weights counts extra.

Columns and codes are independent, so on a GPU this is one launch per group, and one to pick. Starting from the reference's
codes and its group-wide factor is as good as a search of our own (KL 0.825 and 0.828 of the reference's), so there is none.
Groups of 2 bits are left alone: their loss does not fall, and a trained model of 28 M parameters got worse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.cuda.backend import OFFSETS, REFINED_BITS, REFINED_ROWS, SHRINKAGE
from exl2ray.formats.layout import GroupLayout
from exl2ray.quant.hessian import Factor

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


def refine_codes(x: Tensor, u: Tensor, bits: int, codes: Tensor, scale_max: Tensor) -> Tensor:
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


@dataclass(frozen=True)
class Quantized:
    """One quantised linear, unpacked. G groups, rows in stored order = act-order."""

    layout: GroupLayout
    perm: Tensor  # (K,) int64, perm[k] = input feature in stored row k
    codes: Tensor  # (K, N) uint8, stored order, 0 .. 2^b - 1
    scale_codes: Tensor  # (G, N) uint8, 1..16
    scale_max: Tensor  # (G,) float16
    weight: Tensor  # (K, N) float16, natural row order: exactly what the loader reconstructs


def quantize_reference(
    w: Tensor,  # (K, N) float32, natural row order
    perm: Tensor,  # (K,) int64, act-order
    u: Tensor | None,  # (K, K) float32 upper, H^-1 = U^T U in act-order; None: no feedback
    layout: GroupLayout,
    refine: bool = False,  # scale codes by `refine_codes`
) -> Quantized:
    """Plain GPTQ. Returns integers, scales and the reconstructed weight."""
    work = w[perm].clone()
    k, n = work.shape
    codes = torch.empty(k, n, dtype=torch.uint8, device=w.device)
    dq = torch.empty(k, n, dtype=torch.float16, device=w.device)
    all_codes, all_max = [], []
    for start, rows, bits in zip(layout.starts, layout.rows, layout.bits, strict=True):
        stop = start + rows
        zero = 2 ** (bits - 1)
        group_codes, scale_max = search(work[start:stop], bits)
        if refine and u is not None:
            group_codes = refine_codes(work[start:stop], u[start:stop, start:stop], bits, group_codes, scale_max)
        all_codes.append(group_codes)
        all_max.append(scale_max)
        step = step_sizes(group_codes, scale_max)
        error = torch.zeros(rows, n, dtype=torch.float32, device=w.device)
        for r in range(start, stop):
            # A zero step (the group's scale underflowed) divides to NaN, which the format decodes as 0 whatever is stored.
            ratio = torch.nan_to_num(torch.round(work[r] / step.float()), nan=0.0)
            q = torch.clamp(ratio + zero, 0, 2**bits - 1)
            codes[r] = q.to(torch.uint8)
            dq[r] = ((q - zero).half() * step).half()
            if u is not None:
                e = (work[r] - dq[r].float()) / u[r, r]
                error[r - start] = e
                work[r:stop] -= torch.outer(u[r, r:stop], e)
        if u is not None and stop < k:
            work[stop:] -= u[start:stop, stop:].T @ error
    weight = torch.empty_like(dq)
    weight[perm] = dq
    return Quantized(layout, perm, codes, torch.stack(all_codes), torch.stack(all_max), weight)


def descend(
    w: Tensor,  # (K, N) float32, natural row order
    q: Quantized,
    h: Tensor,  # (K, K) float32, the damped Hessian in act-order
) -> Quantized:
    """One sweep of coordinate descent on tr(E^T H E), E = W - Q: each weight rounded anew, all others fixed, scales kept."""
    codes, dq = q.codes.clone(), q.weight[q.perm].clone()
    gradient = h @ (w[q.perm] - dq.float())  # rows of H E
    for g, (start, rows, bits) in enumerate(zip(q.layout.starts, q.layout.rows, q.layout.bits, strict=True)):
        zero = 2 ** (bits - 1)
        step = step_sizes(q.scale_codes[g], q.scale_max[g])
        for r in range(start, start + rows):
            best = dq[r].float() + gradient[r] / h[r, r]
            ratio = torch.nan_to_num(torch.round(best / step.float()), nan=0.0)
            integers = torch.clamp(ratio + zero, 0, 2**bits - 1)
            new = ((integers - zero).half() * step).half()
            gradient += torch.outer(h[:, r], dq[r].float() - new.float())
            codes[r], dq[r] = integers.to(torch.uint8), new
    weight = torch.empty_like(dq)
    weight[q.perm] = dq
    return Quantized(q.layout, q.perm, codes, q.scale_codes, q.scale_max, weight)


def feedback_factor(factor: Factor) -> Tensor | None:
    """U = R^-1 of a factorised Hessian, for `quantize_reference`."""
    if factor.r is None:
        return None
    eye = torch.eye(factor.r.shape[0], dtype=factor.r.dtype, device=factor.r.device)
    u: Tensor = torch.linalg.solve_triangular(factor.r, eye, upper=True)
    return u
