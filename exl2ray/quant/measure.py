"""Measuring one module: how much each quantisation option costs and how much it changes the module's output.

Per module (converter-algorithm section 10): one reference forward collects the Hessians and the target output; every
distinct option of every linear is quantised once; then each row of the option table is scored by a forward pass with the
candidates in place. The score is the mean over calibration rows of ||Y - Y_ref||_F / ||Y_ref||_F.

A block has two stages (linears on one input, a core without weights, a linear back), so
projection outputs of distinct options are computed once per batch of rows and combined.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.formats.layout import pad32
from exl2ray.formats.measurement import ModuleProfile, OptionProfile
from exl2ray.quant.block import Block, Check, Half, Linear, Module, by_input, device_of, has_experts
from exl2ray.quant.hessian import Factor, HessianAccumulator, factorise, keeps_order
from exl2ray.quant.losses import LossTable
from exl2ray.quant.measure_moe import measure_experts
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import OptionTable, option_tables
from exl2ray.quant.rows import batches
from exl2ray.quant.scoring import accuracy_of, row_errors
from exl2ray.quant.settings import Settings
from exl2ray.quant.solve import solve_with_losses

USELESS_ACCURACY = 0.1  # the reference stops below this, and so do we: the module's output is noise


def measure_block(
    block: Block, x: Tensor, settings: Settings, check: Check, report: Callable[[str], None] = print
) -> tuple[ModuleProfile, Tensor]:
    """Profile of a measurable block and its reference output.

    x: (R, T, hidden) reference states entering the module, on any device. Returns the profile and the states after the
    module, where x lives. ``check(states, where)`` raises NumericError for NaN and clamps infinities; ``report`` gets notes
    (damping raised, fallbacks). Raises NumericError if no option keeps at least a tenth of the output.
    """
    y, hessians = reference_pass(block, x, settings, check)
    return profile_of(block.module, *score_options(block, x, y, hessians, settings), report), y


def score_options(
    block: Block,
    x: Tensor,
    y: Tensor,
    hessians: dict[str, HessianAccumulator],
    settings: Settings,
) -> tuple[list[list[OptionProfile]], dict[str, Any]]:
    """Second half of `measure_block`, after `reference_pass`: the scored rows of each option table, and the extra profile.

    Takes Hessians out of ``hessians`` as it uses them, to make room.
    """
    notes: list[str] = []
    if has_experts(block):
        lists, extra = measure_experts(block, x, y, hessians, settings, notes)
    else:
        lists = []
        factors: dict[str, Factor] = {}
        losses = LossTable()
        for half in block.halves:
            candidates = _candidates(block, half, hessians, factors, settings, notes, losses, x.shape[1])
            lists.append(_score(block, half, x, y, candidates, settings))
        extra = losses.extra()
    return lists, {**extra, "notes": notes} if notes else extra


def profile_of(
    module: Module, lists: Sequence[Sequence[OptionProfile]], extra: dict[str, Any], report: Callable[[str], None] = print
) -> ModuleProfile:
    """The profile of a module from its complete scored tables. Raises NumericError if no option is of any use."""
    where = module.profile_key
    for note in extra.get("notes", ()):
        report(f"{where}: {note}")
    for options in lists:
        best = max(o.accuracy for o in options)
        if best < USELESS_ACCURACY:
            raise NumericError(
                f"{where}: the best of {len(options)} options has accuracy {best:.4f}",
                "quantising destroys this module's output: check the weights and the calibration data",
            )
    key, mode = where.rsplit(".", 1)
    if module.kind == "parallel":
        return ModuleProfile(key, mode, attn=tuple(lists[0]), mlp=tuple(lists[1]), extra=extra)
    return ModuleProfile(key, mode, tuple(lists[0]), extra=extra)


def reference_pass(
    block: Block, x: Tensor, settings: Settings, check: Check, slices: Iterable[slice] | None = None
) -> tuple[Tensor, dict[str, HessianAccumulator]]:
    """Unquantised forward of all rows: output states, and a Hessian per distinct input ("qkv", "down", "w2.3", ...).

    slices: the batches of rows; None: as large ones as ``settings`` has.
    """
    sizes = {linear.input_group: linear.in_features for linear in block.module.linears}
    device = device_of(block)
    hessians = {group: HessianAccumulator(k, device) for group, k in sizes.items()}
    y = torch.empty_like(x)
    for part in batches(x.shape[0], settings.batch_rows) if slices is None else slices:
        xb = x[part].to(device)

        def capture(group: str, inputs: Tensor, rows: int = xb.shape[0]) -> None:
            hessians[group].add(inputs, rows)

        if has_experts(block) and settings.all_experts:
            out = block.forward(xb)
            for group, inputs, routed in block.inputs_of_all_experts(xb):
                hessians[group].add(inputs, xb.shape[0], routed)
        else:
            out = block.forward(xb, capture)
        check(out, f"output of {block.module.profile_key}, rows {part.start} to {part.stop - 1}")
        y[part] = out.to(y.dtype)
    return y, hessians


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
        if group not in factors:
            where = f"{block.module.profile_key} ({group})"
            # a table is scored once: its Hessians make room for what comes next
            factors[group] = factorise(hessians.pop(group), settings, where, notes, keeps_order(block.module, group))
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


def relative_error(result: Tensor, target: Tensor) -> float:
    """Sum over the rows of a batch of ||result - target|| / ||target||; both (R, T, hidden)."""
    if result.is_cuda:
        from exl2ray.cuda import elementwise

        if elementwise.usable(result, target):
            difference, norm = elementwise.distances(result, target)
            return float((difference / norm).double().sum())
    return float(row_errors(result, target, target.float().flatten(1).norm(dim=1)))


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
