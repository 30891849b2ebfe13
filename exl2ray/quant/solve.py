"""From options to solutions: batches the quantisation of linears that share a Hessian (see `exl2ray.cuda.solver`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.cuda.small_batches import CACHE, COUNT, SMALL, Streams, run_recorded
from exl2ray.cuda.solver import Segment, Solution, run_batch, solve_segments
from exl2ray.formats.layout import GroupLayout, QParams
from exl2ray.quality import PLAIN, Numerics
from exl2ray.quant.block import Block, has_experts
from exl2ray.quant.gptq import Quantized
from exl2ray.quant.hessian import Factor
from exl2ray.quant.qparams import MOE_TABLE

# Bytes that a weight of a batch costs: error float32, result float16 and its copy, a share of the panel buffers.
BYTES_PER_WEIGHT = 10


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
    numerics: Numerics = PLAIN,
    offload: bool = False,  # put the weights into pinned host memory
    side_by_side: bool = False,  # batches that fit into the budget together run at the same time
) -> list[Solution]:
    """Solves all problems, those with the same row counts together, in batches that respect ``budget_bytes``.

    The split into batches depends on shapes and the budget alone, never on what happens to be free, so that results do
    not change from run to run.
    """
    run = run_recorded if factor.perm.is_cuda else run_batch
    by_rows: dict[tuple[int, ...], list[int]] = {}
    for i, p in enumerate(problems):
        by_rows.setdefault(p.layout.rows, []).append(i)
    everything = sum(_nbytes(p, weights) for p in problems)
    lanes = COUNT if side_by_side and (budget_bytes is None or everything <= budget_bytes) else 1
    out: dict[int, Solution] = {}
    with Streams(factor.perm.device, lanes) as streams:
        for rows, members in by_rows.items():
            for batch in _batches(members, problems, weights, budget_bytes):
                segments = [Segment(problems[i].weight, problems[i].layout.bits) for i in batch]
                with streams.turn():
                    solved = solve_segments(factor.r, factor.perm, weights, segments, rows, keep_codes, numerics, run)
                    for i, s in zip(batch, solved, strict=True):
                        out[i] = _copied(s, offload)  # the next batch, or the next call, may reuse the buffers
    return [out[i] for i in range(len(problems))]


def _nbytes(p: Problem, weights: Sequence[Tensor]) -> int:
    """Working memory of a problem."""
    return weights[p.weight].numel() * BYTES_PER_WEIGHT


def _copied(s: Solution, offload: bool) -> Solution:
    """A solution of its own memory; ``offload``: its weight in pinned host memory."""

    def copy(t: Tensor) -> Tensor:
        return t.clone(memory_format=torch.contiguous_format)

    def moved(t: Tensor) -> Tensor:
        host = torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda)
        return host.copy_(t)

    return Solution(
        moved(s.weight) if offload else copy(s.weight),
        None if s.codes is None else copy(s.codes),
        None if s.scale_codes is None else copy(s.scale_codes),
        copy(s.scale_max),
        copy(s.losses),
        copy(s.energies),
    )


def _batches(
    members: Sequence[int], problems: Sequence[Problem], weights: Sequence[Tensor], budget_bytes: int | None
) -> list[list[int]]:
    if budget_bytes is None:
        return [list(members)]
    batches: list[list[int]] = []
    used = 0
    for i in members:
        size = _nbytes(problems[i], weights)
        if not batches or used + size > budget_bytes:
            batches.append([])
            used = 0
        batches[-1].append(i)
        used += size
    return batches


def solve_options(
    factor: Factor,
    weights: Mapping[str, Tensor],  # role -> (K, N)
    options: Mapping[str, Sequence[QParams]],  # role -> distinct options
    budget_bytes: int | None = None,
    offload: bool = False,  # put the results into pinned host memory
) -> dict[str, dict[int, Solution]]:
    """Every option of every linear that shares one Hessian, solved: role -> index of the option -> solution."""
    roles = list(weights)
    problems, owner = [], []
    for i, role in enumerate(roles):
        for j, option in enumerate(options[role]):
            problems.append(Problem(i, option.layout(weights[role].shape[0])))
            owner.append((role, j))
    out: dict[str, dict[int, Solution]] = {r: {} for r in roles}
    solved = solve_problems(factor, [weights[r] for r in roles], problems, budget_bytes=budget_bytes, offload=offload)
    for (role, j), solution in zip(owner, solved, strict=True):
        out[role][j] = solution
    return out


def quantize_linears(
    factor: Factor,
    weights: Mapping[str, Tensor],  # key -> (K, N)
    params: Mapping[str, GroupLayout],  # key -> layout
    budget_bytes: int | None = None,
    numerics: Numerics = PLAIN,
    side_by_side: bool = False,
) -> dict[str, Quantized]:
    """Final quantisation of linears that share a Hessian: integers, scales and reconstructed weights.

    side_by_side: linears whose groups differ are solved at the same time, if the budget allows; not where inputs are already.
    """
    keys = list(weights)
    problems = [Problem(i, params[key]) for i, key in enumerate(keys)]
    solved = solve_problems(
        factor, [weights[k] for k in keys], problems, True, budget_bytes, numerics, side_by_side=side_by_side
    )
    out = {}
    for key, problem, s in zip(keys, problems, solved, strict=True):
        if s.codes is None or s.scale_codes is None:
            raise AssertionError("solve_segments keeps codes when asked to")
        out[key] = Quantized(problem.layout, factor.perm, s.codes, s.scale_codes, s.scale_max, s.weight)
    return out


def forget_recordings() -> None:
    """Gives back the GPU memory of recorded batches, before something else uses the GPU in this process."""
    CACHE.clear()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def synchronize(device: torch.device) -> None:
    """Waits for queued GPU work (for honest timings); nothing on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def lanes_of(block: Block) -> int:
    """Inputs that are solved at the same time: several for experts whose solver batches leave most of a GPU idle."""
    if not has_experts(block):
        return 1
    gate = block.experts.experts[0].gate
    columns = MOE_TABLE.columns()
    weights = gate.padded_weights * sum(len(columns[role][0]) for role in ("w1", "w3"))
    return COUNT if weights <= SMALL else 1
