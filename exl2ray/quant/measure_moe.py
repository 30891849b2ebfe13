"""Measuring a mixture-of-experts block: one choice per role for all experts of the layer (converter-algorithm section 15).

Better than the reference: the Hessian of w1 and w3 of an expert comes from the tokens routed to it, as that of w2 does.
An expert that saw fewer tokens than its Hessian has dimensions borrows: see `expert_factor`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from exl2ray.formats.layout import pad32
from exl2ray.formats.measurement import OptionProfile
from exl2ray.quant.hessian import Factor, HessianAccumulator
from exl2ray.quant.measure import Settings, Table, accuracy_of, batches, factorise, part_range, row_errors
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import mlp_options
from exl2ray.quant.solve import solve_wanted

MOE_TABLE = Table(("w1", "w3", "w2"), mlp_options())


def measure_experts(
    block: Any,
    x: Tensor,
    y: Tensor,
    hessians: dict[str, HessianAccumulator],
    settings: Settings,
    notes: list[str],
    part: tuple[int, int] = (0, 1),
) -> tuple[list[list[OptionProfile]], dict[str, Any]]:
    """Scores the 17 options of an expert layer, or one part of them; also the coverage of the experts for the profile."""
    columns = MOE_TABLE.columns()
    rows = part_range(part, len(MOE_TABLE.rows))
    wanted = {role: {index[i] for i in rows} for role, (_, index) in columns.items()}
    candidates: list[dict[str, dict[int, Tensor]]] = []
    for index, expert in enumerate(block.experts.experts):
        solved: dict[str, dict[int, Tensor]] = {}
        for group, members in ((f"w13.{index}", (expert.gate, expert.up)), (f"w2.{index}", (expert.down,))):
            factor = expert_factor(block, hessians, group, settings, notes)
            weights = {m.role: pad_columns(block.weights[m.key]) for m in members}
            options = {m.role: columns[m.role][0] for m in members}
            solved.update(solve_wanted(factor, weights, options, settings.budget_bytes, wanted, settings.offload))
        candidates.append(solved)
    return [_score_experts(block, x, y, candidates, settings, rows)], {"experts": coverage(block, hessians)}


def expert_factor(
    block: Any, hessians: dict[str, HessianAccumulator], group: str, settings: Settings, notes: list[str]
) -> Factor:
    """Factor of one expert's Hessian. For w1/w3 an expert with fewer tokens than dimensions adds the Hessian of all experts.

    The sum over experts of the routed tokens' Hessians is that of all tokens, each counted once per choice. It is mixed in
    with the weight that makes up the missing tokens, so a starved expert degrades smoothly towards the all-token Hessian.
    """
    where = f"{block.module.profile_key} ({group})"
    own = hessians[group]
    dimensions = own.h.shape[0]
    if group.startswith("w13.") and own.tokens < dimensions:
        others = [a for name, a in hessians.items() if name.startswith("w13.")]
        tokens = sum(a.tokens for a in others)
        if tokens:
            mixed = HessianAccumulator(dimensions, own.h.device)
            share = (dimensions - own.tokens) / tokens
            mixed.h = own.h + share * torch.stack([a.h for a in others]).sum(0)
            mixed.rows, mixed.tokens = max(own.rows, 1), dimensions
            notes.append(f"{group}: {own.tokens} tokens for {dimensions} dimensions, completed from all experts")
            return factorise(mixed, settings, where, notes)
    if own.tokens == 0:
        notes.append(f"{group}: no calibration token reached this expert, rounded without feedback")
    return factorise(own, settings, where, notes)


def coverage(block: Any, hessians: dict[str, HessianAccumulator]) -> list[dict[str, float]]:
    """Per expert: calibration tokens routed to it, and their share of all routed tokens."""
    counts = [hessians[f"w2.{e}"].tokens for e in range(len(block.experts.experts))]
    total = max(1, sum(counts))
    return [{"tokens": c, "share": c / total} for c in counts]


def _score_experts(
    block: Any,
    x: Tensor,
    y: Tensor,
    candidates: list[dict[str, dict[int, Tensor]]],
    settings: Settings,
    rows: range,
) -> list[OptionProfile]:
    columns = MOE_TABLE.columns()
    index = {role: columns[role][1] for role in MOE_TABLE.roles}
    keys = [{m.role: m.key for m in (e.gate, e.up, e.down)} for e in block.experts.experts]
    device = next(iter(block.weights.values())).device
    errors = torch.zeros(len(MOE_TABLE.rows), dtype=torch.float64, device=device)
    for part in batches(x.shape[0], settings.batch_rows):
        xb, target = x[part].to(device), y[part].to(device)
        norm = target.float().flatten(1).norm(dim=1)
        h = block.pre(xb).flatten(0, -2)
        routing = block.route(h)
        for i in rows:
            weights = {
                names[role]: solved[role][index[role][i]]
                for names, solved in zip(keys, candidates, strict=True)
                for role in MOE_TABLE.roles
            }
            result = block.post(xb, block.forward_experts(h, routing, weights))
            errors[i] += row_errors(result, target, norm)
    mean = (errors / x.shape[0]).tolist()
    out = []
    for i in rows:
        params = dict(zip(MOE_TABLE.roles, MOE_TABLE.rows[i], strict=True))
        bits = sum(
            params[x.role].total_bits(x.in_features, pad32(x.out_features), x.has_bias) for x in block.module.linears
        )
        out.append(OptionProfile(accuracy_of(mean[i]), bits, params))
    return out
