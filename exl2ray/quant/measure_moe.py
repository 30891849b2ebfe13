"""Measuring a mixture-of-experts block: one choice per role for all experts of the layer.

Better than the reference: the Hessian of w1 and w3 of an expert comes from the tokens routed to it, as that of w2 does.
An expert that saw fewer tokens than its Hessian has dimensions borrows (`exl2ray.quant.hessian.expert_factor`). Small experts
are solved side by side (`exl2ray.cuda.small_batches`), large ones one after another: where memory is short, the candidates of
one wait in host memory while the next is solved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exl2ray.cuda.small_batches import Streams, ahead
from exl2ray.formats.measurement import OptionProfile
from exl2ray.quality import Settings
from exl2ray.quant.block import ExpertBlock, Routing, device_of
from exl2ray.quant.hessian import Factor, HessianAccumulator, input_factor, prepare_borrowing
from exl2ray.quant.measure import LossTable, scored_rows
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import MOE_TABLE
from exl2ray.quant.rows import accuracy_of, batches, row_errors
from exl2ray.quant.solve import lanes_of, solve_options

STARVED_SHARE = 0.1  # of a fair share of the tokens; an expert below is warned of


def measure_experts(
    block: ExpertBlock,
    x: Tensor,
    y: Tensor,
    hessians: dict[str, HessianAccumulator],
    settings: Settings,
    notes: list[str],
) -> tuple[list[list[OptionProfile]], dict[str, Any]]:
    """Scores the 17 options of an expert layer; also the coverage of the experts for the profile."""
    candidates: list[dict[str, dict[int, Tensor]]] = []
    report = coverage(block, hessians)
    losses, shares = LossTable(), token_shares(block, hessians, x.shape[0] * x.shape[1])
    tables = [LossTable() for _ in block.experts.experts]
    device = device_of(block)
    prepare_borrowing(block, hessians)
    lanes = 1 if settings.offload else lanes_of(block)

    def factors_of(index: int) -> dict[str, Factor]:
        # a table is scored once: what nobody borrows from makes room
        return {g: input_factor(block, hessians, g, settings, notes) for g in (f"w13.{index}", f"w2.{index}")}

    made: dict[int, dict[str, Factor]] = {}  # ahead of their turn
    with Streams(device, lanes) as streams:
        for index, table in enumerate(tables):
            coming = settings.ahead and lanes == 1 and index + 1 < len(tables)
            with ahead(device, coming) as beside:
                with streams.turn():
                    factors = made.pop(index, None) or factors_of(index)
                    used = dict(factors) if coming else factors
                    candidates.append(_solve_expert(block, index, used, table, shares, settings))
                if coming:
                    with beside.turn():
                        made[index + 1] = factors_of(index + 1)
            del factors, used  # not before: the next ones would be written where these are still being read
    for table in tables:
        losses.include(table)
    notes.insert(0, describe_coverage(report))
    scored = scored_rows(x, y, settings.score_rows)
    return [_score_experts(block, *scored, candidates, settings)], {"experts": report, **losses.extra()}


def _solve_expert(
    block: ExpertBlock,
    index: int,
    factors: dict[str, Factor],  # input group -> of the expert's; used up
    table: LossTable,
    shares: Mapping[str, float],
    settings: Settings,
) -> dict[str, dict[int, Tensor]]:
    """Role -> reconstructed weights (K, N32) float16 of the expert's distinct options; their losses go into the table."""
    expert, columns = block.experts.experts[index], MOE_TABLE.columns()
    out: dict[str, dict[int, Tensor]] = {}
    for group, members in ((f"w13.{index}", (expert.gate, expert.up)), (f"w2.{index}", (expert.down,))):
        factor = factors.pop(group)
        weights = {m.role: pad_columns(block.weights[m.key]) for m in members}
        options = {m.role: columns[m.role][0] for m in members}
        solved = solve_options(factor, weights, options, settings.budget_bytes, settings.offload)
        for role, found in solved.items():
            table.add(role, options[role], found, factor, shares[group])
            out[role] = {j: s.weight for j, s in found.items()}
    return out


def token_shares(block: ExpertBlock, hessians: dict[str, HessianAccumulator], tokens: int) -> dict[str, float]:
    """Input group -> what turns tr(E^T H E) of an expert, H as `expert_factor` has it, into its part of the error per token.

    An expert counts with the tokens routed to it, at least a tenth of a fair share: calibration text is not all there is.
    """
    experts = range(len(block.experts.experts))
    fair = sum(hessians[f"w2.{e}"].routed for e in experts) / len(experts)
    out = {}
    for e in experts:
        for group in (f"w13.{e}", f"w2.{e}"):
            own = hessians[group]
            borrows = group.startswith("w13.") and own.tokens < own.h.shape[0]
            seen = own.h.shape[0] if borrows else own.tokens  # tokens in the Hessian of the factor
            counted = max(float(own.routed), STARVED_SHARE * fair)
            out[group] = counted / tokens * (max(1, own.rows) / seen if seen else 1.0)
    return out


def coverage(block: ExpertBlock, hessians: dict[str, HessianAccumulator]) -> list[dict[str, float]]:
    """Per expert: calibration tokens routed to it, and their share of all routed tokens."""
    return shares_of([hessians[f"w2.{e}"].routed for e in range(len(block.experts.experts))])


def shares_of(counts: Sequence[int]) -> list[dict[str, float]]:
    """The coverage report of a layer: tokens of each expert, and their share of all."""
    total = max(1, sum(counts))
    return [{"tokens": c, "share": c / total} for c in counts]


def describe_coverage(experts: Sequence[Mapping[str, float]]) -> str:
    """One line: the range of tokens per expert, and how that compares with a fair share."""
    tokens = [int(e["tokens"]) for e in experts]
    low, high = min(tokens), max(tokens)
    fair = sum(tokens) / len(tokens)
    return (
        f"{len(tokens)} experts: {low} tokens (expert {tokens.index(low)}) to {high} (expert {tokens.index(high)}), "
        f"fair share {fair:.0f}"
    )


def starved_experts(experts: Sequence[Mapping[str, float]]) -> str:
    """Text of the warning if experts got less than a tenth of a fair share of the tokens, else empty."""
    limit = STARVED_SHARE / max(1, len(experts))
    few = [(i, int(e["tokens"])) for i, e in enumerate(experts) if e["share"] < limit]
    if not few:
        return ""
    shown = ", ".join(f"{i} ({tokens} tokens)" for i, tokens in few[:5]) + (", ..." if len(few) > 5 else "")
    return (
        f"{len(few)} of {len(experts)} experts got less than {STARVED_SHARE:.0%} of a fair share of calibration tokens: "
        f"{shown}; more rows or other text may reach them, --moe-all-experts calibrates them on all tokens"
    )


def _score_experts(
    block: ExpertBlock,
    x: Tensor,
    y: Tensor,
    candidates: list[dict[str, dict[int, Tensor]]],
    settings: Settings,
) -> list[OptionProfile]:
    """Accuracy of the rows of the table. Each expert's outputs are added to the sums of all rows before the next one's."""
    device = device_of(block)
    rows = range(len(MOE_TABLE.rows))
    errors = torch.zeros(len(MOE_TABLE.rows), dtype=torch.float64, device=device)
    for part in batches(x.shape[0], settings.batch_rows):
        xb, target = x[part].to(device), y[part].to(device)
        norm = target.float().flatten(1).norm(dim=1)
        h = block.pre(xb).flatten(0, -2)
        routing = block.route(h)
        sums = {i: torch.zeros(h.shape, dtype=torch.float32, device=device) for i in rows}
        start = 0
        for index, count in enumerate(routing.counts):
            size = settings.expert_tokens or max(count, 1)
            for first in range(start, start + count, size):
                slots = routing.order[first : min(first + size, start + count)]
                _add_expert(block, index, h, routing, slots, candidates[index], sums)
            start += count
        for i in rows:
            errors[i] += row_errors(block.post(xb, sums.pop(i).to(h.dtype)), target, norm)
    mean = (errors / x.shape[0]).tolist()
    out = []
    for i in rows:
        params = dict(zip(MOE_TABLE.roles, MOE_TABLE.rows[i], strict=True))
        bits = sum(params[x.role].bits_of(x) for x in block.module.linears)
        out.append(OptionProfile(accuracy_of(mean[i]), bits, params))
    return out


def _add_expert(
    block: ExpertBlock,
    index: int,
    h: Tensor,  # (tokens, hidden) normed
    routing: Routing,
    slots: Tensor,  # (n,) entries of the routing that belong to the expert
    solved: dict[str, dict[int, Tensor]],
    sums: dict[int, Tensor],  # table row -> (tokens, hidden) float32
) -> None:
    """Adds one expert's weighted outputs for every table row; what rows share is computed once.

    A token comes to an expert once, so the additions do not collide and their order is that of the experts.
    """
    expert, per_token = block.experts.experts[index], routing.experts.shape[1]
    tokens = slots // per_token
    weights = routing.weights.flatten()[slots, None]
    inputs = h[tokens]
    columns = MOE_TABLE.columns()
    chosen = {role: columns[role][1] for role in MOE_TABLE.roles}
    outs = {
        m.role: {j: block.bank.linear(m.key, inputs, w) for j, w in solved[m.role].items()} for m in (expert.gate, expert.up)
    }
    combinations: dict[tuple[int, int], dict[int, list[int]]] = {}
    for i in sums:
        downs = combinations.setdefault((chosen["w1"][i], chosen["w3"][i]), {})
        downs.setdefault(chosen["w2"][i], []).append(i)
    for (gate, up), downs in combinations.items():
        mid = block.experts.mix(outs["w1"][gate], outs["w3"][up])
        for down, users in downs.items():
            out = block.bank.linear(expert.down.key, mid, solved["w2"][down]).float() * weights
            for i in users:
                sums[i].index_add_(0, tokens, out)
