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

An expert sees the tokens that the quantised model routes to it, in both models. As the weights of a token's experts add up to
one, each of them can be given the whole (h_f - h): together they then correct it once.

Figures: KL at 3.0 bits is 0.85 of the plain algorithm's in two stages, 0.895 in one, and 0.99 in one at full strength; more
damping of the solution does not change that, nor does leaving out its component along the weights. The head is left alone: no
difference. Price: one more forward of the source model, a fourth set of states, and a group of workers solves the two stages
one after the other, not side by side.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.cuda.solver import trailing_precision
from exl2ray.errors import NumericError
from exl2ray.formats.layout import FLOAT16_MAX
from exl2ray.formats.roles import WRITERS
from exl2ray.quality import Settings
from exl2ray.quant.block import Block, Check, Expert, ExpertBlock, Linear, Routing, by_input, device_of, has_experts
from exl2ray.quant.hessian import Factor, HessianAccumulator
from exl2ray.quant.memory import middle_bytes
from exl2ray.quant.rows import Arrivals, batches, room_for_states

_CHUNK = 4096  # columns solved at a time


@dataclass(frozen=True)
class Sums:
    """Of one input: X^T X, and X^T times what is missing (K x K for the first linears of a block, K x N for the second)."""

    hessian: HessianAccumulator
    cross: HessianAccumulator

    def add(self, x: Tensor, missing: Tensor, rows: int, routed: int | None = None) -> None:
        """Adds inputs x (..., K) and what is missing (..., K or N), of ``rows`` calibration rows."""
        self.hessian.add(x, rows, routed)
        self.cross.add(x, rows, routed, missing)


def can_correct(block: Block) -> bool:
    """Whether the block has the two stages: attention, MLP, experts; the head keeps plain targets."""
    return bool(block.module.quantized)


def first_linears(block: Block) -> dict[str, list[Linear]]:
    """The linears of the first stage by input."""
    return by_input([x for x in block.module.linears if x.role not in WRITERS])


def second_linears(block: Block) -> dict[str, list[Linear]]:
    """The linears of the second stage by input."""
    return by_input([x for x in block.module.linears if x.role in WRITERS])


def first_sums(block: Block, x: Tensor, other: Tensor, settings: Settings) -> dict[str, Sums]:
    """Sums of the first stage. x, other: (R, T, hidden) states at the entry, in the quantised and in the source model."""
    sums = _empty(block, first_linears(block))
    device = device_of(block)
    norm = block.pre if has_experts(block) else block.halves[0].pre
    for part in batches(x.shape[0], settings.batch_rows):
        n, f = (norm(states[part].to(device)).flatten(0, -2) for states in (x, other))
        rows = part.stop - part.start
        if not has_experts(block):
            (only,) = sums.values()
            only.add(n, f - n, rows)
            continue
        _add_first(block, n, f - n, rows, settings, sums)
    return sums


def _add_first(
    block: ExpertBlock, n: Tensor, behind: Tensor, rows: int, settings: Settings, sums: dict[str, Sums]
) -> None:
    """Of a mixture of experts. By itself, so that nothing of what was gathered outlives it."""
    for expert, (own, missing), routed in _routed(block, block.route(n), settings, n, behind):
        sums[expert.gate.input_group].add(own, missing, rows, routed)


def second_sums(
    block: Block,
    x: Tensor,  # (R, T, hidden) states at the entry, in the quantised model
    other: Tensor,  # the same in the source model
    source: Mapping[str, Tensor],  # linear key -> (K, N), source weights of the first linears
    settings: Settings,
    check: Check,
    middles: list[Tensor] | None = None,
) -> tuple[dict[str, Sums], Tensor]:
    """Sums of the second stage, and the source model's states after the block. The block's first linears are quantised.

    middles: gets, batch by batch, what enters the second linear in the quantised model (`keeps_middles`).
    """
    sums = _empty(block, second_linears(block))
    device = device_of(block)
    after, arrivals = room_for_states(other.shape, other.dtype, other.device, device), Arrivals(check)
    for part in batches(x.shape[0], settings.batch_rows):
        states = x[part].to(device), other[part].to(device)
        if has_experts(block):
            result = _add_experts(block, *states, source, settings, sums)
        else:
            result = _add_halves(block, *states, source, sums, middles)
        place = f"rows {part.start} to {part.stop - 1}"
        arrivals.put(after, part, result, f"source output of {block.module.profile_key}, {place}")
    arrivals.end()
    return sums, after


def keeps_middles(block: Block, rows: int, tokens: int, settings: Settings) -> bool:
    """Whether what enters the second linear is kept until that is quantised, in place of computing it again: a fifth of a
    module's products. If all ``rows`` of this member have room."""
    itemsize = next(iter(block.weights.values())).element_size()
    return 0 < middle_bytes(block.module, rows, tokens, itemsize) <= settings.keep_bytes


def _add_halves(
    block: Block, x: Tensor, other: Tensor, source: Mapping[str, Tensor], sums: dict[str, Sums], middles: list[Tensor] | None
) -> Tensor:
    """Attention, MLP, or both in parallel: the source model's states after some rows."""
    n, f = block.halves[0].pre(x), block.halves[0].pre(other)
    outs: list[Tensor] = []
    for half in block.halves:
        quantised = half.mid({linear.role: half.linear(linear.key, n) for linear in half.first})
        wanted = half.mid({linear.role: half.linear(linear.key, f, source[linear.key]) for linear in half.first})
        outs.append(half.post(other, half.linear(half.second.key, wanted)))
        missing = (wanted - quantised).matmul(block.weights[half.second.key])
        if half is block.halves[-1] and half.post_norm is None:  # one of two parallel halves corrects the stream
            missing = _plus_behind(missing, x, other, half.residual_scale)
        sums[half.second.input_group].add(quantised, missing, x.shape[0])
        if middles is not None:
            middles.append(quantised)
    if len(outs) == 1:
        return outs[0]
    result = other  # parallel halves return their branches alone
    for out in outs:
        result = result + out.to(other.dtype)
    return result


def _add_experts(
    block: ExpertBlock, x: Tensor, other: Tensor, source: Mapping[str, Tensor], settings: Settings, sums: dict[str, Sums]
) -> Tensor:
    """A mixture of experts: the source model's states after some rows."""
    n, f = (block.pre(states).flatten(0, -2) for states in (x, other))
    routing = block.route(n)
    if settings.all_experts or not block.experts.computed_in_runs(routing.experts.numel(), n.device):
        _add_one_by_one(block, n, f, x, other, routing, source, settings, sums)
    else:
        _add_in_runs(block, n, f, x, other, routing, source, sums)
    with block.bank.instead(source):
        return block.post(other, block.forward_experts(f, block.route(f)))


def _add_one_by_one(
    block: ExpertBlock, n: Tensor, f: Tensor, x: Tensor, other: Tensor, routing: Routing, source: Mapping[str, Tensor],
    settings: Settings, sums: dict[str, Sums],
) -> None:  # fmt: skip
    experts, linear = block.experts, block.bank.linear
    rows = (n, f, x.flatten(0, -2), other.flatten(0, -2))
    for expert, (own, twin, before, before_other), routed in _routed(block, routing, settings, *rows):
        quantised = experts.mix(linear(expert.gate.key, own), linear(expert.up.key, own))
        wanted = experts.mix(*(linear(m.key, twin, source[m.key]) for m in (expert.gate, expert.up)))
        missing = (wanted - quantised).matmul(block.weights[expert.down.key])
        missing = _plus_behind(missing, before, before_other, 1.0)
        sums[expert.down.input_group].add(quantised, missing, x.shape[0], routed)


def _add_in_runs(
    block: ExpertBlock, n: Tensor, f: Tensor, x: Tensor, other: Tensor, routing: Routing, source: Mapping[str, Tensor],
    sums: dict[str, Sums],
) -> None:  # fmt: skip
    """As `_add_one_by_one`, for many narrow experts: a tenth of the launches."""
    experts, (before, before_other) = block.experts.experts, (states.flatten(0, -2) for states in (x, other))
    for run, tokens, quantised, missing in block.experts.differences(n, f, routing, source):
        missing = _plus_behind(missing, before[tokens], before_other[tokens], 1.0)
        for place, e in enumerate(run.experts):
            own = slice(routing.counts[e])
            sums[experts[e].down.input_group].add(quantised[place, own], missing[place, own], x.shape[0], routing.counts[e])
    for expert, count in zip(experts, routing.counts, strict=True):
        if not count:  # rows count where no token comes, too
            down = expert.down
            sums[down.input_group].add(n.new_empty(0, down.in_features), n.new_empty(0, down.out_features), x.shape[0], 0)


def _routed(
    block: ExpertBlock, routing: Routing, settings: Settings, *tensors: Tensor
) -> Iterator[tuple[Expert, tuple[Tensor, ...], int]]:
    """Per expert: the rows of each tensor (tokens, hidden) that it is calibrated on, and how many of them the router sends to
    it. On a GPU all rows are gathered at once, which saves launches; on a CPU one expert at a time."""
    together = tensors[0].is_cuda and not settings.all_experts
    whole = [t[routing.tokens] if together else t for t in tensors]
    start = 0
    for expert, count in zip(block.experts.experts, routing.counts, strict=True):
        part = slice(start, start + count)
        rows: slice | Tensor = slice(None) if settings.all_experts else part if together else routing.tokens[part]
        yield expert, tuple(t[rows] for t in whole), count
        start += count


def _plus_behind(missing: Tensor, x: Tensor, other: Tensor, scale: float) -> Tensor:
    """``missing`` (..., N) plus what the residual stream x is behind that of the source model, in units of the branch."""
    if x.is_cuda:
        from exl2ray.cuda import elementwise

        if elementwise.usable(missing, x, other):
            return elementwise.plus_behind(missing, x, other, scale)
    behind = (other.float() - x.float()) / scale
    return (missing.float() + behind).clamp(-FLOAT16_MAX, FLOAT16_MAX).to(missing.dtype)


def _empty(block: Block, inputs: Mapping[str, Sequence[Linear]]) -> dict[str, Sums]:
    """Empty sums for the linears on each input."""
    device = device_of(block)
    return {
        group: Sums(
            HessianAccumulator(linear.in_features, device),
            HessianAccumulator(linear.in_features, device, linear.out_features if linear.role in WRITERS else None),
        )
        for group, (linear, *_) in inputs.items()
    }


def corrected_weights(
    block: Block, linears: Sequence[Linear], factor: Factor, cross: HessianAccumulator, strength: float
) -> dict[str, Tensor]:
    """Linear key -> corrected target (K, N) in compute dtype, for linears on one input. ``cross`` is used up.

    Raises NumericError for targets that are not finite. Without a factor (round to nearest) the targets are the weights.
    """
    weights = {x.key: block.weights[x.key] for x in linears}
    if factor.r is None or cross.tokens == 0:
        return weights
    step = solve_damped(factor, cross.h.to(factor.r.device).div_(cross.rows))
    shared = linears[0].role not in WRITERS
    out: dict[str, Tensor] = {}
    for key, w in weights.items():
        target = torch.empty_like(w)
        for start in range(0, w.shape[1], _CHUNK):
            columns = slice(start, start + _CHUNK)
            own = w[:, columns].float()
            with trailing_precision():
                change = step @ own if shared else step[:, columns]
            target[:, columns] = torch.add(own, change, alpha=strength)
        out[key] = target
    finite = torch.stack([torch.isfinite(target).all() for target in out.values()]).tolist()  # one wait for the GPU
    if not all(finite):
        raise NumericError(
            f"{list(out)[finite.index(False)]}: corrected weights are not finite",
            "the calibration states are extreme; --target-correction 0 leaves the correction out",
        )
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
