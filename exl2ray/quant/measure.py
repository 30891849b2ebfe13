"""Scoring the options of a dense module, and of the head: what each costs and how much it changes the module's output.

Per module (converter-algorithm section 10): one reference pass gives the Hessians and the target output; every
distinct option of every linear is quantised once; then each row of the option table is scored by a forward pass with the
candidates in place. The score is the mean over calibration rows of ||Y - Y_ref||_F / ||Y_ref||_F.

A block has two stages (linears on one input, a core without weights, a linear back), so
projection outputs of distinct options are computed once per batch of rows and combined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exl2ray.formats.layout import pad32
from exl2ray.formats.measurement import OptionProfile
from exl2ray.quant.block import Block, Half, Linear, by_input, device_of
from exl2ray.quant.hessian import Factor, HessianAccumulator, input_factor
from exl2ray.quant.losses import LossTable
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import OptionTable, option_tables, parse
from exl2ray.quant.rows import accuracy_of, batches, row_errors
from exl2ray.quant.settings import Settings
from exl2ray.quant.solve import solve_with_losses

# Of the head, which no reference measures, for allocations that choose its bits. Few, because a head is as large as several
# layers; what lies between them can be told (`exl2ray.allocation.frontier`).
HEAD_OPTIONS = tuple(parse(text) for text in ("1:3b_64g", "1:4b_64g", "1:6b_64g"))


def measure_halves(
    block: Block, x: Tensor, y: Tensor, hessians: dict[str, HessianAccumulator], settings: Settings, notes: list[str]
) -> tuple[list[list[OptionProfile]], dict[str, Any]]:
    """The scored rows of the option table of each half of a dense block, and the losses of its linears for the profile.

    x, y: (R, T, hidden) states before and after it. Hessians are used up, to make room.
    """
    lists = []
    factors: dict[str, Factor] = {}
    losses = LossTable()
    for half in block.halves:
        candidates = _candidates(block, half, hessians, factors, settings, notes, losses, x.shape[1])
        lists.append(_score(block, half, x, y, candidates, settings))
    return lists, losses.extra()


def measure_head(
    block: Block, x: Tensor, hessians: dict[str, HessianAccumulator], settings: Settings, notes: list[str]
) -> dict[str, Any]:
    """Losses of the head's options, for the profile. x: (R, T, hidden) normed states."""
    head = block.module.linears[0]
    factor = input_factor(block, hessians, head.input_group, settings, notes)
    weights, options, losses = {head.role: pad_columns(block.weights[head.key])}, {head.role: HEAD_OPTIONS}, LossTable()
    solved = solve_with_losses(factor, weights, options, settings.budget_bytes, settings.offload)
    losses.add(head.role, HEAD_OPTIONS, solved[head.role], factor, 1 / x.shape[1])
    return losses.extra()


def _candidates(
    block: Block,
    half: Half,
    hessians: dict[str, HessianAccumulator],
    factors: dict[str, Factor],
    settings: Settings,
    notes: list[str],
    losses: LossTable,
    tokens: int,  # of a calibration row
) -> dict[str, dict[int, Tensor]]:
    """Role -> reconstructed weights (K, N32) float16 of its distinct options."""
    (table,) = option_tables([linear.role for linear in (*half.first, half.second)])
    columns = table.columns()
    out: dict[str, dict[int, Tensor]] = {}
    for group, linears in by_input((*half.first, half.second)).items():
        if group not in factors:  # parallel halves share an input
            factors[group] = input_factor(block, hessians, group, settings, notes)
        weights = {x.role: pad_columns(block.weights[x.key]) for x in linears}
        options = {x.role: columns[x.role][0] for x in linears}
        solved = solve_with_losses(factors[group], weights, options, settings.budget_bytes, settings.offload)
        for role, found in solved.items():
            losses.add(role, options[role], found, factors[group], 1 / tokens)
            out[role] = {j: s.weight for j, s in found.items()}
    return out


def _score(
    block: Block,
    half: Half,
    x: Tensor,
    y: Tensor,
    candidates: dict[str, dict[int, Tensor]],
    settings: Settings,
) -> list[OptionProfile]:
    """Accuracy of the rows of the option table."""
    (table,) = option_tables([linear.role for linear in (*half.first, half.second)])
    columns = table.columns()
    first = [linear.role for linear in half.first]
    index = {role: columns[role][1] for role in table.roles}
    device = device_of(block)
    errors = torch.zeros(len(table.rows), dtype=torch.float64, device=device)
    for rows in batches(x.shape[0], settings.batch_rows):
        xb = x[rows].to(device)
        n = half.pre(xb)
        target = y[rows].to(device) if half.add_residual else half.post(xb, half.branch(n))
        norm = target.float().flatten(1).norm(dim=1)
        outs = {
            r: {j: half.prepare(r, half.linear(s.key, n, w)) for j, w in candidates[r].items()}
            for r, s in zip(first, half.first, strict=True)
        }
        for combination, users in _combinations(index, first, half.second.role):
            m = half.mix({r: outs[r][j] for r, j in zip(first, combination, strict=True)})
            for option, table_rows in users.items():
                out = half.linear(half.second.key, m, candidates[half.second.role][option])
                error = branch_errors(half, xb, out, target, norm)
                for i in table_rows:
                    errors[i] += error
    mean = (errors / x.shape[0]).tolist()
    bits = _option_bits(table, {linear.role: linear for linear in (*half.first, half.second)})
    return [
        OptionProfile(accuracy_of(e), b, dict(zip(table.roles, row, strict=True)))
        for e, b, row in zip(mean, bits, table.rows, strict=True)
    ]


def _combinations(
    index: dict[str, list[int]], first: Sequence[str], second: str
) -> list[tuple[tuple[int, ...], dict[int, list[int]]]]:
    """Distinct choices for the first linears; for each, the options of the second and the table rows that use them."""
    out: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for i in range(len(index[second])):
        key = tuple(index[r][i] for r in first)
        out.setdefault(key, {}).setdefault(index[second][i], []).append(i)
    return list(out.items())


def branch_errors(half: Half, x: Tensor, out: Tensor, target: Tensor, norm: Tensor) -> Tensor:
    """`row_errors` of ``half.post(x, out)``, in one pass where a kernel exists for it."""
    if x.is_cuda and half.plain_residual:
        from exl2ray.cuda import elementwise

        if elementwise.usable(x, out, target):
            total: Tensor = (elementwise.residual_errors(x, out, target) / norm).double().sum()
            return total
    return row_errors(half.post(x, out), target, norm)


def _option_bits(table: OptionTable, linears: Mapping[str, Linear]) -> list[int]:
    return [
        sum(
            q.total_bits(linears[r].in_features, pad32(linears[r].out_features), linears[r].has_bias)
            for r, q in zip(table.roles, row, strict=True)
        )
        for row in table.rows
    ]
