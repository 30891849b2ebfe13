"""Items that need nothing from each other: which worker does which, and who takes over from whom.

Measuring, quantising on the states of the source model, backward passes, perplexities. What is free is cut into stretches of
equal cost, one for each idle worker. An idle worker with nothing free takes over the end of the stretch that another one has
in front of it, so much of it that both are done at the same time, the way there counted. So a worker that joins late gets
work at once, and what was lost is free again.

Workers of one machine that begin together run the source model together to the starts of their stretches
(`exl2ray.team.source_forward`); if that fails, each finds its own way. Several machines, or more than SHARES workers of one,
are as many such groups, one after another along the model. A later group has a longer way to its stretches, so it gets less.
Simulated, 70B on reference states: two machines of 8 GPUs are 9.8 times as fast as one GPU, and 3.2 times without groups.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

from exl2ray.driver.policy import Fault, Lost
from exl2ray.driver.workers import Workers, host_of
from exl2ray.quant.rows import SHARES
from exl2ray.team.messages import Begun, ItemResult, Pass

# Cost of going through a module, weights read included, as a share of that of the work on it (docs/log.md, four H200).
PASSING = {"measure": 0.05, "quantize": 0.35}


@dataclass(frozen=True)
class Item:
    """cost: in weights. parts: what its results are told apart by (bitrates); it is finished when all of them are."""

    index: int
    key: str
    cost: float
    parts: tuple[float | None, ...] = (None,)


class MakePass(Protocol):
    def __call__(self, indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> Pass: ...


class Independent:
    """items: ascending. make: the call for some of them. told, look_up: of results, the latter in the work directory.

    passing: what going through an item costs, as a share of the work on it. together: workers may run the source model as a
    group first.
    """

    def __init__(
        self,
        items: Sequence[Item],
        make: MakePass,
        workers: Workers,
        told: Callable[[ItemResult], None],
        look_up: Callable[[Begun], ItemResult | None] = lambda begun: None,
        passing: float = 0.0,
        together: bool = False,
    ) -> None:
        self.items, self.passing = list(items), passing
        self._make, self._workers, self._told, self.found = make, workers, told, look_up
        self._before = [0.0, *accumulate(item.cost for item in self.items)]  # cost of all items before each
        self._positions = {item.index: p for p, item in enumerate(self.items)}
        self._left = {p: set(item.parts) for p, item in enumerate(self.items)}
        self._owned: dict[int, list[int]] = {}  # worker -> positions of its call, from the one in hand on
        self._hand: dict[int, int] = {}  # worker -> position of what it has in hand
        self._reached: dict[int, int] = {}  # worker -> position at which its states are
        self._together = together

    @property
    def done(self) -> bool:
        return not self._left

    def cost(self, begun: Begun) -> float:
        position = self._positions.get(begun.index)
        return self._before[-1] if position is None else self.items[position].cost * (1 + begun.passed)

    # ---- who does what -----------------------------------------------------------------------------------------

    def assign(self, idle: Sequence[int]) -> list[dict[int, Pass]]:
        taken = {p for owned in self._owned.values() for p in owned}
        free = [p for p in sorted(self._left) if p not in taken]
        first, self._together = self._together, False
        if not free:
            self._together = first
            return [call for worker in idle if (call := self._take_over(worker)) is not None]
        groups = groups_of(self._workers, idle[: len(free)]) if first else []
        if any(len(group) > 1 for group in groups):
            return self._begin_in_groups(groups, free)
        ahead = sorted(idle, key=lambda w: self._reached.get(w, 0))
        pieces = cut([self.items[p].cost for p in free], len(ahead))
        return [self._call(w, [free[i] for i in piece]) for w, piece in zip(ahead, pieces, strict=False)]

    def _begin_in_groups(self, groups: Sequence[Sequence[int]], free: Sequence[int]) -> list[dict[int, Pass]]:
        """One stretch for every worker. Nobody of a group begins before all of it have gone the way to its stretches."""
        group_of = [t for t, group in enumerate(groups) for _ in group]

        def way(starts: Sequence[int]) -> float:
            group = group_of[min(len(starts), len(group_of)) - 1]
            first = starts[min(group_of.index(group), len(starts) - 1)]
            return self.passing * self._before[free[first]] / len(groups[group])

        pieces = iter(cut([self.items[p].cost for p in free], len(group_of), way))
        calls = []
        for group in groups:
            owned = [[free[i] for i in piece] for _, piece in zip(group, pieces, strict=False)]
            calls.append(self._begin_together(group, owned) if len(group) > 1 else self._call(group[0], owned[0]))
        return calls

    def _begin_together(self, members: Sequence[int], pieces: Sequence[Sequence[int]]) -> dict[int, Pass]:
        """pieces: positions for each of them, ascending."""
        stretches = tuple(tuple(self.items[p].index for p in piece) for piece in pieces)
        calls: dict[int, Pass] = {}
        for worker, piece, meeting in zip(members, pieces, self._workers.meeting(members), strict=True):
            self._reached[worker] = piece[0]
            calls.update(self._call(worker, piece, stretches))
            calls[worker] = replace(calls[worker], meeting=meeting)
        return calls

    def _call(
        self, worker: int, positions: Sequence[int], stretches: tuple[tuple[int, ...], ...] = ()
    ) -> dict[int, Pass]:
        self._owned[worker] = list(positions)
        oldest = self.items[min(self._left)].index
        return {worker: self._make(tuple(self.items[p].index for p in positions), stretches, oldest)}

    def _take_over(self, worker: int) -> dict[int, Pass] | None:
        """The end of the stretch with which most time is saved; None if the way to any takes longer than it saves."""
        found = [(*self._share(worker, other), other) for other in self._owned]
        gain, taken, other = max(found, default=(0.0, 0, 0))
        if gain <= 0:
            return None
        positions = self._owned[other][-taken:]
        del self._owned[other][-taken:]
        self._workers.end_before(other, self.items[positions[0]].index)
        return self._call(worker, positions)

    def _share(self, worker: int, other: int) -> tuple[float, int]:
        """How much sooner another one's stretch is done if this worker takes over its end, and of how many items.

        The worker has to go there first, for ``passing`` times the cost of what it passes. With S taken over of the R that
        is not begun, A on the way to its start, and D that the other one still has in hand (half an item), both are done at
        the same time if passing (A + R - S) + S = D + R - S.
        """
        hand, owned = self._hand.get(other), self._owned[other]
        rest = owned[1:] if owned and owned[0] == hand else owned
        if not rest:
            return 0.0, 0
        before = 0.0 if hand is None else self.items[hand].cost / 2
        whole = sum(self.items[p].cost for p in rest)
        share = (before + whole * (1 - self.passing) - self._way(worker, rest[0])) / (2 - self.passing)
        count, taken = 1, self.items[rest[-1]].cost
        while count < len(rest) and taken + self.items[rest[-count - 1]].cost <= share:
            count += 1
            taken += self.items[rest[-count]].cost
        if hand is None and count == len(rest):
            return 0.0, 0  # it has only just been given this
        alone = before + whole
        return alone - max(alone - taken, self._way(worker, rest[-count]) + taken), count

    def _way(self, worker: int, position: int) -> float:
        """Cost of getting to an item: from where the worker's states are, or from the first one."""
        here = self._reached.get(worker, 0)
        return self.passing * (self._before[position] - self._before[here if here <= position else 0])

    # ---- what came of it ---------------------------------------------------------------------------------------

    def begun(self, worker: int, begun: Begun) -> None:
        position = self._positions.get(begun.index)
        if position is not None:
            self._hand[worker] = position
            self._reached[worker] = position + 1
            owned = self._owned.get(worker, [])
            self._owned[worker] = [p for p in owned if p >= position]

    def finished(self, worker: int, result: ItemResult) -> None:
        position = self._positions[result.index]
        parts = self._left.get(position, set())
        if result.bits not in parts:
            return  # for the second time
        parts.discard(result.bits)
        if not parts:
            del self._left[position]
        self._told(result)

    def left(self, worker: int, fault: Fault | None) -> None:
        self._owned.pop(worker, None)
        self._hand.pop(worker, None)
        if isinstance(fault, (Lost, Exception)):
            self._reached.pop(worker, None)


def groups_of(workers: Workers, idle: Sequence[int]) -> list[list[int]]:
    """At most SHARES workers of one machine each. The smallest groups come first: they get what lies at the front."""
    machines: dict[str, list[int]] = {}
    for worker in idle:
        machines.setdefault(host_of(workers.name(worker)), []).append(worker)
    groups = [own[i : i + SHARES] for own in machines.values() for i in range(0, len(own), SHARES)]
    return sorted(groups, key=len)


Way = Callable[[Sequence[int]], float]  # starts of all runs up to one -> cost of what comes before that one is begun


def cut(costs: Sequence[float], count: int, way: Way = lambda starts: 0.0) -> list[range]:
    """At most ``count`` runs of consecutive items, so that the most expensive, with its ``way``, is as cheap as can be."""
    starts = list(range(len(costs)))
    if len(costs) > count:
        low, high = max(costs), sum(costs) + way([0])
        starts = _runs_within(costs, count, high, way) or [0]
        for _ in range(40):
            middle = (low + high) / 2
            within = _runs_within(costs, count, middle, way)
            low, high, starts = (middle, high, starts) if within is None else (low, middle, within)
    return [range(a, b) for a, b in pairwise([*starts, len(costs)])]


def _runs_within(costs: Sequence[float], count: int, limit: float, way: Way) -> list[int] | None:
    """Starts of ``count`` runs, none of which costs more than ``limit``; None if that takes more runs."""
    starts, cost = [0], costs[0]
    for i in range(1, len(costs)):
        if cost + costs[i] > limit or len(costs) - i <= count - len(starts):
            starts.append(i)
            cost = way(starts)
        cost += costs[i]
    return starts if len(starts) <= count else None
