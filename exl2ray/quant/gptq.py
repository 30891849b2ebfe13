"""GPTQ in EXL2's row layout: quantise a linear layer group by group with error feedback.

`quantize_reference` is the algorithm as the reference runs it (converter-algorithm section 8; Frantar et al. 2022,
algorithm 1), one row after another: slow, readable, the oracle of every faster path. `quantize` and `solve_options` run
the same arithmetic through the compiled kernels of `exl2ray.cuda`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.formats.layout import GroupLayout
from exl2ray.quant import scales
from exl2ray.quant.hessian import Factor


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
    refine: bool = False,  # scale codes by `scales.refine`
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
        group_codes, scale_max = scales.search(work[start:stop], bits)
        if refine and u is not None:
            group_codes = scales.refine(work[start:stop], u[start:stop, start:stop], bits, group_codes, scale_max)
        all_codes.append(group_codes)
        all_max.append(scale_max)
        step = scales.step_sizes(group_codes, scale_max)
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
        step = scales.step_sizes(q.scale_codes[g], q.scale_max[g])
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


def relative_error(h: Tensor, w: Tensor, dq: Tensor) -> float:
    """tr(E^T H E) / tr(W^T H W), E = W - dq; all in natural row order, float64 sums."""
    h, w = h.double(), w.double()
    e = w - dq.double()
    return float((e * (h @ e)).sum() / (w * (h @ w)).sum())
