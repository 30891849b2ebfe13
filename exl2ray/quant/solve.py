"""From options to solutions: batches the quantisation of linears that share a Hessian (see `exl2ray.cuda.solver`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.cuda.solver import Segment, Solution, solve_segments
from exl2ray.formats.layout import GroupLayout, QParams
from exl2ray.quant.gptq import Quantized
from exl2ray.quant.hessian import Factor

# Bytes that one column of a batch costs per row of K: error float32, result float16 (and integers when kept).
_BYTES_PER_WEIGHT = 6


@dataclass(frozen=True)
class Problem:
    """One linear under one layout. ``weight`` indexes the list of weights."""

    weight: int
    layout: GroupLayout


def solve_problems(
    factor: Factor,
    weights: Sequence[Tensor],  # each (K, N_i) with N_i a multiple of 32, natural row order
    problems: Sequence[Problem],
    keep_codes: bool = False,
    budget_bytes: int | None = None,  # working memory of one batch; None: no limit
) -> list[Solution]:
    """Solves all problems, those with the same row counts together, in batches that respect ``budget_bytes``.

    The split into batches depends on shapes and the budget alone, never on what happens to be free, so that results do
    not change from run to run.
    """
    by_rows: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(problems):
        by_rows.setdefault(p.layout.rows, []).append(i)
    out: list[Solution | None] = [None] * len(problems)
    for rows, members in by_rows.items():
        for batch in _batches(members, problems, weights, budget_bytes):
            segments = [Segment(problems[i].weight, problems[i].layout.bits) for i in batch]
            solved = solve_segments(factor.r, factor.perm, weights, segments, rows, keep_codes)
            for i, s in zip(batch, solved, strict=True):
                out[i] = s
    return [s for s in out if s is not None]


def _batches(
    members: Sequence[int], problems: Sequence[Problem], weights: Sequence[Tensor], budget_bytes: int | None
) -> list[list[int]]:
    if budget_bytes is None:
        return [list(members)]
    batches: list[list[int]] = []
    used = 0
    for i in members:
        k, n = weights[problems[i].weight].shape
        size = k * n * _BYTES_PER_WEIGHT
        if not batches or used + size > budget_bytes:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += size
    return batches


def solve_options(
    factor: Factor,
    weights: Mapping[str, Tensor],  # role -> (K, N)
    options: Mapping[str, Sequence[QParams]],  # role -> distinct options to try
    budget_bytes: int | None = None,
) -> dict[str, list[Tensor]]:
    """Reconstructed weights (K, N) float16, natural row order, of every option of every linear sharing one Hessian."""
    roles = list(weights)
    problems, owner = [], []
    for i, role in enumerate(roles):
        for option in options[role]:
            problems.append(Problem(i, option.layout(weights[role].shape[0])))
            owner.append(role)
    solved = solve_problems(factor, [weights[r] for r in roles], problems, budget_bytes=budget_bytes)
    out: dict[str, list[Tensor]] = {r: [] for r in roles}
    for role, solution in zip(owner, solved, strict=True):
        out[role].append(solution.weight)
    return out


def quantize_linears(
    factor: Factor,
    weights: Mapping[str, Tensor],  # key -> (K, N)
    params: Mapping[str, GroupLayout],  # key -> layout
    budget_bytes: int | None = None,
) -> dict[str, Quantized]:
    """Final quantisation of linears that share a Hessian: integers, scales and reconstructed weights."""
    keys = list(weights)
    problems = [Problem(i, params[key]) for i, key in enumerate(keys)]
    solved = solve_problems(factor, [weights[k] for k in keys], problems, True, budget_bytes)
    out = {}
    for key, problem, s in zip(keys, problems, solved, strict=True):
        if s.codes is None or s.scale_codes is None:
            raise AssertionError("solve_segments keeps codes when asked to")
        out[key] = Quantized(
            problem.layout, factor.perm, s.codes.contiguous(), s.scale_codes.contiguous(), s.scale_max.contiguous(),
            s.weight.contiguous(),
        )  # fmt: skip
    return out


def synchronize(device: torch.device) -> None:
    """Waits for queued GPU work (for honest timings); nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
