"""Scoring the options of a dense module, and of the head: what each costs and how much it changes the module's output.

Per module: one reference pass gives the Hessians and the target output; every distinct option of every linear is quantised
once; then each row of the option table is scored by a forward pass with the candidates in place. The score is the mean over
calibration rows of ||Y - Y_ref||_F / ||Y_ref||_F.

A block has two stages (linears on one input, a core without weights, a linear back), so
projection outputs of distinct options are computed once per batch of rows and combined.

What an option costs a linear in squared output error is known as the solver leaves it behind. GPTQ's scaled errors e = R^T E
(`exl2ray.cuda.solver`) give tr(E^T (H + damping I) E) as a plain sum of squares, row by row in act-order; less
damping * sum E^2 this is tr(E^T H E), the squared error of the linear's output over the calibration tokens. Per linear (per
role, for experts) measurement.json keeps, under the key of ours that the reference ignores:

    "linears": { "<role>": { "losses": { "<option>": squared output error per token, summed over outputs },
                             "shape": [mean loss of a row in up to 32 equal pieces of the act-order, relative to all] } }

The shape is nearly the same whatever the width, so the loss of an option that was not tried can be told from these numbers
(`exl2ray.allocation.frontier`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from exl2ray.cuda.small_batches import ahead
from exl2ray.cuda.solver import CHUNK, Solution
from exl2ray.formats.layout import QParams
from exl2ray.formats.measurement import OptionProfile
from exl2ray.quality import Settings
from exl2ray.quant.block import Block, Half, Linear, by_input, device_of
from exl2ray.quant.hessian import Factor, HessianAccumulator, input_factor
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import OptionTable, option_tables, parse
from exl2ray.quant.rows import accuracy_of, batches, row_errors
from exl2ray.quant.solve import solve_options

PIECES = 32  # of the act-order, at most, in the shape of a loss
DIGITS = 6  # that are written of a loss
USELESS = 1e30  # loss of an option that yields NaN


class LossTable:
    """Collects the losses of one module. Experts of one role are added up, each with its share of the tokens."""

    def __init__(self) -> None:
        self._losses: dict[str, dict[str, Tensor]] = defaultdict(dict)
        self._chunks: dict[str, Tensor] = {}

    def add(
        self,
        role: str,
        options: Sequence[QParams],
        solved: Mapping[int, Solution],  # index of the option -> solution
        factor: Factor,
        per_token: float,  # 1 / (tokens over which H is a mean), times the share of the tokens that come here
    ) -> None:
        """Adds the losses of a linear's options, and the shape of the one that `shape_option` picks."""
        for j, s in solved.items():
            _add(self._losses[role], options[j].desc, squared_error(s, factor) * per_token)
        j = shape_option(options)
        if j in solved:
            _add(self._chunks, role, _profile(solved[j], factor) * per_token)

    def include(self, other: LossTable) -> None:
        """Adds what another table has collected."""
        for role, losses in other._losses.items():
            for name, loss in losses.items():
                _add(self._losses[role], name, loss)
        for role, chunks in other._chunks.items():
            _add(self._chunks, role, chunks)

    def extra(self) -> dict[str, Any]:
        """What goes into the profile."""
        linears: dict[str, dict[str, Any]] = {}
        for role, losses in self._losses.items():
            values = torch.stack(list(losses.values())).tolist() if losses else []
            linears[role] = {"losses": {d: _rounded(v) for d, v in sorted(zip(losses, values, strict=True))}}
            if role in self._chunks:
                linears[role]["shape"] = _pieces(self._chunks[role])
        return {"linears": linears}


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    sums[name] = sums[name] + value if name in sums else value


def squared_error(s: Solution, factor: Factor) -> Tensor:
    """tr(E^T H E), float64 scalar; without feedback from the mean of diag H alone."""
    energy = s.energies.double().sum()
    if factor.r is None:
        return torch.nan_to_num(energy * factor.mean_diagonal, USELESS, USELESS)
    return torch.nan_to_num((s.losses.double().sum() - factor.damping * energy).clamp(min=0.0), USELESS, USELESS)


def _profile(s: Solution, factor: Factor) -> Tensor:
    """(K / 32,) float64: what each 32 rows of the act-order contribute. With all of the damping taken off, losses of mixtures
    come out too high, with none too low; half is best on trained linears (docs/log.md)."""
    if factor.r is None:
        return s.energies.double()
    return (s.losses.double() - factor.damping / 2 * s.energies.double()).clamp(min=0.0)


def shape_option(options: Sequence[QParams]) -> int:
    """Index of the option whose rows tell the shape: of one width, as near to 4 bits as there is; -1 without any."""
    uniform = [j for j, o in enumerate(options) if len(o.bits) == 1]
    return min(uniform, key=lambda j: (abs(options[j].bits[0] - 4), j), default=-1)


def _pieces(chunks: Tensor) -> list[float]:
    """(K / 32,) sums -> means of equal pieces (the last one may be shorter), relative to the mean of all."""
    size = -(-len(chunks) // PIECES)
    total = float(chunks.sum())
    if not total > 0:
        return [1.0] * -(-len(chunks) // size)
    return [_rounded(float(p.mean()) * len(chunks) / total) for p in torch.split(chunks.cpu(), size)]


def piece_rows(in_features: int) -> int:
    """Rows of each piece of a shape but the last."""
    return -(-(in_features // CHUNK) // PIECES) * CHUNK


def _rounded(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


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
    scored = scored_rows(x, y, settings.score_rows)
    factors: dict[str, Factor] = {}
    losses = LossTable()
    for half in block.halves:
        candidates = _candidates(block, half, hessians, factors, settings, notes, losses, x.shape[1])
        lists.append(_score(block, half, *scored, candidates, settings))
    return lists, losses.extra()


def scored_rows(x: Tensor, y: Tensor, count: int | None) -> tuple[Tensor, Tensor]:
    """As many rows as asked for, evenly spaced, so that they are of several kinds; None: all. On a CPU scoring the tables
    takes two thirds of measuring, in proportion to the rows, and a choice per linear needs nothing of it (docs/log.md)."""
    if count is None or count >= len(x):
        return x, y
    chosen = torch.arange(count, device=x.device) * len(x) // count
    return x[chosen], y[chosen]


def measure_head(
    block: Block, x: Tensor, hessians: dict[str, HessianAccumulator], settings: Settings, notes: list[str]
) -> dict[str, Any]:
    """Losses of the head's options, for the profile. x: (R, T, hidden) normed states."""
    head = block.module.linears[0]
    factor = input_factor(block, hessians, head.input_group, settings, notes)
    weights, options, losses = {head.role: pad_columns(block.weights[head.key])}, {head.role: HEAD_OPTIONS}, LossTable()
    solved = solve_options(factor, weights, options, settings.budget_bytes, settings.offload)
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
    inputs = by_input((*half.first, half.second))
    for group, linears in inputs.items():
        if group not in factors:  # parallel halves share an input
            factors[group] = input_factor(block, hessians, group, settings, notes)
        weights = {x.role: pad_columns(block.weights[x.key]) for x in linears}
        options = {x.role: columns[x.role][0] for x in linears}
        coming = [g for g in inputs if g not in factors][: int(settings.ahead)]
        with ahead(device_of(block), bool(coming)) as beside:
            solved = solve_options(factors[group], weights, options, settings.budget_bytes, settings.offload)
            for other in coming:
                with beside.turn():
                    factors[other] = input_factor(block, hessians, other, settings, notes)
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
        sum(q.bits_of(linears[r]) for r, q in zip(table.roles, row, strict=True)) for row in table.rows
    ]
