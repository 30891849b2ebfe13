"""Corrected targets: linears are fitted to what the source model computes from inputs of its own.

GPTQ keeps X W' close to X W for the inputs X that the quantised model feeds a linear. But X differs from the inputs X_f that
the same tokens have in the source model, and so does the residual stream h that the output is added to. What should be met
is X_f W + (h_f - h), and the weights that come closest in the least-squares sense are

    W + (H + damping I)^-1 X^T [(X_f - X) W + (h_f - h)] / rows,    H = X^T X / rows,

with the factor of H that GPTQ needs anyway. A ``strength`` below 1 takes that part of the step; half of it is best for the
whole model, docs/quality.md has the figures. The second term is only for the linear that writes the residual stream, and left
out where a norm follows it. The first term alone is known as asymmetric calibration (GPTAQ, Li et al. 2025).

A block is quantised in two stages, so that the second linear also corrects what quantising the first ones did: X of o_proj
and down_proj comes from quantised q, k, v or gate, up. For the first linears, which share an input, X^T (X_f - X) is summed,
K x K; for the second one X^T of the whole bracket, K x N.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl2ray.cuda.solver import trailing_precision
from exl2ray.errors import NumericError
from exl2ray.quant.hessian import Factor, HessianAccumulator
from exl2ray.quant.measure import FLOAT16_MAX, Settings, batches, by_input

_CHUNK = 4096  # columns solved at a time


@dataclass(frozen=True)
class Sums:
    """Of one input: X^T X, and X^T times what is missing (K x K for the first linears of a block, K x N for the second)."""

    hessian: HessianAccumulator
    cross: HessianAccumulator


def can_correct(block: Any) -> bool:
    """Whether the block has the two stages: attention and MLP; mixtures of experts and the head keep plain targets."""
    return bool(block.halves)


def first_linears(block: Any) -> dict[str, list[Any]]:
    """The linears of the first stage by input."""
    return by_input([x for half in block.halves for x in half.first])


def second_linears(block: Any) -> dict[str, list[Any]]:
    """The linears of the second stage by input."""
    return by_input([half.second for half in block.halves])


def first_sums(block: Any, x: Tensor, other: Tensor, settings: Settings) -> dict[str, Sums]:
    """Sums of the first stage. x, other: (R, T, hidden) states at the entry, in the quantised and in the source model."""
    group, (linear, *_) = next(iter(first_linears(block).items()))
    device = next(iter(block.weights.values())).device
    sums = Sums(*(HessianAccumulator(linear.in_features, device) for _ in range(2)))
    for part in batches(x.shape[0], settings.batch_rows):
        n, f = (block.halves[0].pre(states[part].to(device)).flatten(0, -2) for states in (x, other))
        rows = part.stop - part.start
        sums.hessian.add(n, rows)
        sums.cross.add(n, rows, y=f - n)
    return {group: sums}


def second_sums(
    block: Any,
    x: Tensor,  # (R, T, hidden) states at the entry, in the quantised model
    other: Tensor,  # the same in the source model
    source: Mapping[str, Tensor],  # linear key -> (K, N), source weights of the first linears
    settings: Settings,
    check: Callable[[Tensor, str], int],
) -> tuple[dict[str, Sums], Tensor]:
    """Sums of the second stage, and the source model's states after the block. The block's first linears are quantised."""
    device = next(iter(block.weights.values())).device
    sums = {
        half.second.input_group: Sums(
            HessianAccumulator(half.second.in_features, device),
            HessianAccumulator(half.second.in_features, device, half.second.out_features),
        )
        for half in block.halves
    }
    after = torch.empty_like(other)
    for part in batches(x.shape[0], settings.batch_rows):
        xb, ob = x[part].to(device), other[part].to(device)
        n, f = block.halves[0].pre(xb), block.halves[0].pre(ob)
        outs = []
        for half in block.halves:
            quantised = half.mid({linear.role: half.linear(linear, n) for linear in half.first})
            wanted = half.mid({linear.role: half.linear(linear, f, source[linear.key]) for linear in half.first})
            outs.append(half.post(ob, half.linear(half.second, wanted)))
            missing = (wanted - quantised).matmul(block.weights[half.second.key])
            if half is block.halves[-1] and half.post_norm is None:  # one of two parallel halves corrects the stream
                behind = (ob.float() - xb.float()) / half.residual_scale
                missing = (missing.float() + behind).clamp(-FLOAT16_MAX, FLOAT16_MAX).to(missing.dtype)
            own, rows = sums[half.second.input_group], part.stop - part.start
            own.hessian.add(quantised, rows)
            own.cross.add(quantised, rows, y=missing)
        result = outs[0]
        if len(outs) > 1:  # parallel halves return their branches alone
            result = ob
            for out in outs:
                result = result + out.to(ob.dtype)
        check(result, f"source output of {block.module.profile_key}, rows {part.start} to {part.stop - 1}")
        after[part] = result.to(after.dtype)
    return sums, after


def corrected_weights(
    block: Any, linears: Sequence[Any], factor: Factor, cross: HessianAccumulator, strength: float
) -> dict[str, Tensor]:
    """Linear key -> corrected target (K, N) in compute dtype, for linears on one input. ``cross`` is used up.

    Raises NumericError for targets that are not finite. Without a factor (round to nearest) the targets are the weights.
    """
    weights = {x.key: block.weights[x.key] for x in linears}
    if factor.r is None or cross.tokens == 0:
        return weights
    step = solve_damped(factor, cross.h.div_(cross.rows))
    shared = linears[0].key not in {half.second.key for half in block.halves}
    out = {}
    for key, w in weights.items():
        target = torch.empty_like(w)
        for start in range(0, w.shape[1], _CHUNK):
            columns = slice(start, start + _CHUNK)
            own = w[:, columns].float()
            with trailing_precision():
                change = step @ own if shared else step[:, columns]
            target[:, columns] = torch.add(own, change, alpha=strength)
        if not bool(torch.isfinite(target).all()):
            raise NumericError(
                f"{key}: corrected weights are not finite",
                "the calibration states are extreme; --target-correction 0 leaves the correction out",
            )
        out[key] = target
    return out


def solve_damped(factor: Factor, m: Tensor) -> Tensor:
    """(H + damping I)^-1 m for m (K, M) float32, natural row order, in place; H + damping I = R R^T in act-order."""
    if factor.r is None:
        raise NumericError("a Hessian without a factor cannot be solved for")
    for start in range(0, m.shape[1], _CHUNK):
        columns = slice(start, start + _CHUNK)
        part = torch.linalg.solve_triangular(factor.r, m[:, columns][factor.perm], upper=True)
        part = torch.linalg.solve_triangular(factor.r.T, part, upper=False)
        m[:, columns].index_copy_(0, factor.perm, part)
    return m
