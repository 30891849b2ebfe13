"""What the workers of one machine do together before modules of the source model, simulated."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass, field

from schedule_costs import Costs, ModelCosts, ModuleCosts

SHARES = 8  # largest group (exl2ray/quant/rows.py)
SOURCE_BITS, PACKED_BITS = 16, 4  # of weights, in the source and in `ModuleCosts.packed_gb`
HOST_SUMS_GB = 7.5  # of Hessians, with more of which partial sums wait in host memory (exl2ray/quant/memory.py, 150 GB)


@dataclass(frozen=True)
class Sweep:
    """``owners``: prepared module -> rank of the worker that it is prepared for; ``owned``: those of one worker."""

    seconds: float = 0.0
    owners: dict[int, int] = field(default_factory=dict)
    owned: Set[int] = frozenset()


def largest_share(rows: int, size: int) -> float:
    """Of ``rows`` calibration rows, the part of the member of a group that has most of them."""
    ends = [s * rows // SHARES for s in range(SHARES + 1)]
    return max(ends[(r + 1) * SHARES // size] - ends[r * SHARES // size] for r in range(size)) / rows


def sums_s(costs: Costs, m: ModuleCosts, size: int, wide: Collection[str] = ()) -> float:
    """Adding up Hessians: siblings meet level by level (`exl2ray.quant.rows`), and the owner receives one per level.

    wide: inputs whose Hessians are summed and factorised by all (`exl2ray.quant.factorising`). Members receive
    the others' parts of their block rows, half a matrix in float32 all together, and each half a one in float64 on the way.
    """
    whole = sum(gb for i, gb in m.hessian_gb.items() if i not in wide) * (size - 1).bit_length()
    parts = sum(m.hessian_gb[i] for i in wide) * (size - 1) / size * 1.5
    return (whole + parts) / costs.nccl_gb_s


def sweep(costs: Costs, model: ModelCosts, stretches: Sequence[Sequence[int]], measuring: bool) -> Sweep:
    """All modules up to the start of the last stretch, or the last prepared one (`exl2ray.team.source_forward`).

    Every member runs its rows, and reads its part of each weight while the modules before are run; the rest comes from the
    others. It gets all rows of the states that its stretch begins with; of a prepared module the Hessians too, and the
    states after it. The embedding is left out.
    """
    chain, size, starts = model.chain(), len(stretches), [s[0] for s in stretches]
    owners = {} if measuring else prepared(model, chain, stretches)
    share, others = largest_share(model.quantize_rows, size), (size - 1) / size
    collect = others * (model.measure_state_gb if measuring else model.quantize_state_gb) / costs.nccl_gb_s
    read = now = 0.0
    for index, m in enumerate(chain[: max([*starts, *(k + 1 for k in owners)])]):
        read += m.load_s / min(size, costs.group_reads)
        weights = others * sum(m.packed_gb.values()) * SOURCE_BITS / PACKED_BITS
        now = max(now, read) + costs.sweep_module_s + weights / costs.nccl_gb_s + collect * (index in starts)
        if index in owners:
            now += share * m.enter_s(measuring) + sums_s(costs, m, size) + collect
        else:
            now += share * m.pass_s(measuring)
    return Sweep(now, owners)


def prepared(model: ModelCosts, chain: Sequence[ModuleCosts], stretches: Sequence[Sequence[int]]) -> dict[int, int]:
    """Module -> rank: the first modules of each stretch, as far as states and Hessians have room on a GPU."""
    owners: dict[int, int] = {}
    for worker, stretch in enumerate(stretches):
        room = model.room_gb
        for index in stretch:
            sums = sum(chain[index].hessian_gb.values())
            room -= model.quantize_state_gb + sums
            if room < 0 or sums > HOST_SUMS_GB:
                break
            owners[index] = worker
    return owners


def perplexity_s(costs: Costs, model: ModelCosts, size: int) -> float:
    """The pass of a finished model by a group, rows and reading shared out (`exl2ray.team.perplexity`)."""
    alone = model.layers * model.perplexity_s
    if size == 1:
        return alone
    sent = sum(sum(m.packed_gb.values()) / costs.nccl_gb_s + costs.message_s for m in model.modules.values())
    return alone * largest_share(model.quantize_rows, size) + model.layers * sent
