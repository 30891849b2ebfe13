"""Quantising on what the quantised modules before produce: one chain of modules per bitrate, each run by a group of workers.

Chains are independent, modules of a chain are not: so several bitrates share the workers out, and the workers of one chain
share each module (`exl2ray.dist.gang`). After a loss the survivors of the group wait a little for a replacement, form a new
group, and go on at the first module without a record. Between two modules a group takes in workers that have become free.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any, Literal

from exl2ray.dist.items import ChainItem, ItemResult, JoinItem
from exl2ray.dist.schedule import Call, Flow, Limits
from exl2ray.dist.session import Session
from exl2ray.errors import ClusterError
from exl2ray.formats.layout import QParams
from exl2ray.quant.rows import SHARES

MAX_BREAKS = 5  # of a group in a row without any worker lost and without a module done


@dataclass(frozen=True)
class Link:
    """One module of a chain."""

    index: int
    key: str
    cost: float
    params: dict[str, QParams]


@dataclass(frozen=True)
class ChainPlan:
    """One bitrate. ``links``: the modules to quantise, in order. ``found`` looks for a module's record."""

    bits: float
    hashes: tuple[str, ...]
    links: Sequence[Link]
    on_done: Callable[[Link, ItemResult], None]
    found: Callable[[Link], ItemResult | None]


@dataclass
class _Gang:
    plan: ChainPlan
    position: int = 0
    members: list[int] = field(default_factory=list)  # by rank
    formed: bool = False
    phase: Literal["idle", "joining", "running", "breaking"] = "idle"
    waiting: set[int] = field(default_factory=set)  # members whose answer is not there yet
    since: float = field(default_factory=time.monotonic)  # of the phase
    first: ItemResult | None = None  # of the first member
    received: int = 0  # bytes, by all members in this call
    losses: int = 0
    breaks: int = 0

    @property
    def link(self) -> Link:
        return self.plan.links[self.position]

    def enter(self, phase: Literal["idle", "joining", "running", "breaking"]) -> None:
        self.phase, self.since = phase, time.monotonic()


class Chains(Flow):
    def __init__(self, plans: Sequence[ChainPlan], session: Session, limits: Limits) -> None:
        super().__init__()
        self.session, self.limits = session, limits
        self._todo = [p for p in plans if p.links]
        self._gangs: list[_Gang] = []
        self._attempts = count(-1, -1)  # negative: never those of calls that stand alone

    @property
    def done(self) -> bool:
        return not self._todo and not self._gangs

    def dispatch(self, idle: Sequence[int]) -> list[tuple[int, Call]]:
        size = max(1, self.session.size)
        while self._todo and len(self._gangs) < size:
            self._gangs.append(_Gang(self._todo.pop(0)))
        taken = {w for g in self._gangs for w in g.members}
        free = [w for w in idle if w not in taken]
        calls: list[tuple[int, Call]] = []
        for rank, gang in enumerate(self._gangs):
            if gang.phase != "idle":
                continue
            gangs = len(self._gangs)
            target = min(SHARES, size // gangs + (rank < size % gangs))
            calls += self._next(gang, max(1, target), free, set(idle))
        return calls

    def _next(self, gang: _Gang, target: int, free: list[int], idle: set[int]) -> list[tuple[int, Call]]:
        """The next module for a group that is whole; else a new group, if enough workers are there."""
        gang.members = [w for w in gang.members if gang.formed or w in idle]
        more = free[: max(0, target - len(gang.members))]
        if gang.formed and (not more or gang.position + 1 >= len(gang.plan.links)):
            return self._run(gang)
        waited = time.monotonic() - gang.since
        whole = len(gang.members) + len(more) >= target
        if not gang.members + more or not (whole or gang.formed or waited > self.limits.patience):
            return []
        del free[: len(more)]
        gang.members = (gang.members + more)[: max(target, 1)]
        return self._join(gang)

    def _join(self, gang: _Gang) -> list[tuple[int, Call]]:
        gang.formed, gang.waiting = False, set(gang.members)
        gang.enter("joining")
        link = gang.link
        cost = sum(x.cost for x in gang.plan.links[: gang.position + 1]) * max(1, link.index)
        shrink = self.shrink.get(link.key, 1)
        attempt = next(self._attempts)
        meetings = self.session.meeting(gang.members)
        items = [JoinItem(gang.plan.bits, gang.plan.hashes, link.index, meeting, shrink) for meeting in meetings]
        return [
            (worker, Call("join", (item,), link.key, cost, attempt=attempt))
            for worker, item in zip(gang.members, items, strict=True)
        ]

    def _run(self, gang: _Gang) -> list[tuple[int, Call]]:
        gang.waiting, gang.first, gang.received = set(gang.members), None, 0
        gang.enter("running")
        link = gang.link
        item = ChainItem(
            link.index, gang.plan.bits, link.params, gang.plan.hashes, self.shrink.get(link.key, 1)
        )
        cost, attempt = link.cost / len(gang.members), next(self._attempts)
        return [(w, Call("chain", (item,), link.key, cost, attempt=attempt)) for w in gang.members]

    # ---- what came of it ---------------------------------------------------------------------------------------

    def finished(self, worker: int, call: Call, result: Any, second: Any) -> None:
        gang = self._of(worker)
        gang.waiting.discard(worker)
        gang.received += result.received
        if gang.phase == "running" and worker == gang.members[0]:
            gang.first = replace(result, worker=" + ".join(self.session.name(w) for w in gang.members))
        if gang.waiting:
            return
        if gang.phase == "breaking":
            self._broken(gang)
        elif gang.phase == "joining":
            gang.formed = True
            gang.enter("idle")
        else:
            gang.breaks = gang.losses = 0
            gang.enter("idle")
            self._done(gang, gang.first and replace(gang.first, received=gang.received))

    def lost(self, worker: int, call: Call, alive: bool) -> None:
        gang = self._of(worker)
        gang.losses += 1
        self._break(gang, worker)
        if not alive:
            gang.members.remove(worker)

    def broken(self, worker: int, call: Call) -> None:
        self._break(self._of(worker), worker)

    def _break(self, gang: _Gang, worker: int) -> None:
        gang.waiting.discard(worker)
        gang.formed = False
        if gang.phase != "breaking":
            gang.enter("breaking")
        if not gang.waiting:
            self._broken(gang)

    def _broken(self, gang: _Gang) -> None:
        """Everybody has answered or is gone: on from the first module without a record."""
        gang.enter("idle")
        gang.breaks += not gang.losses
        if gang.breaks >= MAX_BREAKS:
            raise ClusterError(
                f"a group of {len(gang.members)} workers cannot work together, although all of them are well",
                "check that the machines reach each other (firewall, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)",
            )
        gang.losses = 0
        result = gang.plan.found(gang.link)
        if result is not None:
            self._done(gang, result)

    def _done(self, gang: _Gang, result: ItemResult | None) -> None:
        if result is None:
            raise ClusterError(f"{gang.link.key}: the group has no result")
        link = gang.link
        gang.position += 1
        gang.plan.on_done(link, result)
        if gang.position >= len(gang.plan.links):
            self._gangs.remove(gang)

    def overdue(self) -> list[int]:
        now = time.monotonic()
        return [
            w
            for g in self._gangs
            if g.phase == "breaking" and now - g.since > self.limits.grace
            for w in g.waiting
        ]

    def _of(self, worker: int) -> _Gang:
        for gang in self._gangs:
            if worker in gang.members:
                return gang
        raise ClusterError(f"worker {worker} belongs to no group")
