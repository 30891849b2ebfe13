"""Work on reference states: modules are independent of each other, but for the states that enter them.

Measurement, and quantisation with ``--propagate reference``. Modules are entered one after another (``enter``: reference
forward, which yields the states of the next module); once entered, the parts of a module (ranges of its option table, or
bitrates) are worked on while other workers are ahead already. There is no pass that only computes states: each reference
forward is one that measuring needs anyway. Modules that are finished already are passed through by whoever enters the next.

With ``ship`` the states after a module travel to whoever enters the next one. States at the entry of a module stay in the
object store until it is finished. The window bounds them: a module is entered only if it is less than ``window`` modules
ahead of the oldest unfinished one.

Without ``ship`` every worker goes through the modules by itself, which is the quicker way on GPUs (docs/architecture.md). The
modules are cut into stretches, one for each worker, and workers of one machine begin with a sweep: together they run the
source model and hand each other what their stretches begin with (`exl2ray.dist.sweep`).
A worker with nothing in front of it any more takes over the end of the stretch that another one has in front of it. Without a
sweep (several machines, or it failed) workers find the way to their stretches alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exl2ray.dist.items import EnterItem, ItemResult, RowSet, SweepItem
from exl2ray.dist.schedule import Call, Flow, Limits
from exl2ray.dist.session import Session, host_of
from exl2ray.quant.rows import SHARES

# Cost of going through a module, weights read included, as a share of that of the work on it (docs/log.md, four H200).
PASSING: dict[RowSet, float] = {"measure": 0.05, "quantize": 0.35}


@dataclass
class Part:
    """One call on an entered module, or, loose, on none.

    ``found`` looks whether the result is in the work directory after all; ``ready``: whether a loose part can be done;
    ``joint``: whether all workers can do it together.
    """

    method: str
    item: Any
    on_done: Callable[[ItemResult], None]
    found: Callable[[], ItemResult | None] = lambda: None
    ready: Callable[[], bool] = lambda: True
    joint: bool = False
    worker: int | None = None  # who works on it
    finished: bool = False


@dataclass
class Module:
    """A module with something to do. ``parts(n)``: its parts, for at least n workers if it can be split."""

    index: int
    key: str
    cost: float
    make_parts: Callable[[int], list[Part]]
    parts: list[Part] = field(default_factory=list)
    start: int = 0  # where the states in ``entry`` are
    entry: Any = None  # reference of the states; None: the worker finds its own
    entered: bool = False  # some worker got through, so the states after it exist
    holders: set[int] = field(default_factory=set)  # workers that hold its context

    @property
    def finished(self) -> bool:
        return self.entered and all(p.finished for p in self.parts)


@dataclass
class _Joint:
    """A call that several workers make together. ``part``: what it is for, None for the sweep; ``first``: the member that
    answers for all. ``broken``: since when it is known to have failed."""

    waiting: set[int]
    first: int
    part: Part | None = None
    result: ItemResult | None = None
    broken: float | None = None


class Fan(Flow):
    """``modules``: those with work, in order. ``window``, ``ship``: see above. ``loose``: what else there is to do."""

    def __init__(
        self,
        rows: RowSet,
        modules: Sequence[Module],
        session: Session,
        window: int,
        loose: Sequence[Part] = (),
        ship: bool = True,
        limits: Limits | None = None,
    ) -> None:
        super().__init__()
        self.ship, self.limits = ship, limits or Limits()
        self.passing = PASSING[rows]
        self.rows, self.session, self.window = rows, session, max(2, window)
        self.modules, self.loose = list(modules), list(loose)
        self._frontier = 0  # position in ``modules`` of the next one to enter
        self._entering: dict[int, Module] = {}  # worker -> module
        self._context: dict[int, Module] = {}  # worker -> module whose context it holds
        self._advancing: int | None = None  # worker at the frontier
        self._last: dict[int, int] = {}  # without shipping: worker -> position of the module that it entered last
        self._joint: _Joint | None = None
        self._begun = False
        self._group: tuple[int, ...] = ()  # the members of the sweep
        self._starts: dict[int, int] = {}  # worker -> position of its stretch, of which it has the states after a sweep
        self._front: tuple[int, Any] = (0, None)  # states for the frontier: (index, reference)
        self.peak_states = 0  # most states that were held at a time

    # ---- what to do --------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        return all(m.finished for m in self.modules) and all(p.finished for p in self.loose)

    def dispatch(self, idle: Sequence[int]) -> list[tuple[int, Call]]:
        self._forget_the_gone(set(idle))
        calls = self._begin(idle) or self._loose_together(idle)
        if self._joint is not None:
            return calls
        free = list(idle)
        for choose in (self._own_part, self._enter_next, self._enter_again, self._loose_part):  # in this order of use
            for worker in list(free):
                call = choose(worker)
                if call is not None:
                    free.remove(worker)
                    calls.append((worker, call))
        self.peak_states = max(self.peak_states, self.states_held())
        return calls

    def _begin(self, idle: Sequence[int]) -> list[tuple[int, Call]]:
        """Cuts the modules into stretches, the first time; calls of the sweep to their starts, if there is to be one."""
        if self._begun or self.ship or not self.modules:
            return []
        self._begun = True
        members = list(idle)[:SHARES]
        if not self._can_join(members):
            return []
        starts = stretches([m.cost for m in self.modules], len(members))
        self._starts = dict(zip(members, starts, strict=True))
        self._last = {worker: start - 1 for worker, start in self._starts.items()}
        ends = [next((b for b in starts[rank + 1 :] if b > a), len(self.modules)) for rank, a in enumerate(starts)]
        cut = tuple(tuple(m.index for m in self.modules[a:b]) for a, b in zip(starts, ends, strict=True))
        items = [SweepItem(self.rows, cut, meeting) for meeting in self.session.meeting(members)]
        self._group = tuple(members)
        return self._together(members, "sweep", items, "sweep", self.passing * self._cost(range(starts[-1])), None)

    def _loose_together(self, idle: Sequence[int]) -> list[tuple[int, Call]]:
        """A loose part as a call of all workers, once there is nothing else to do. Those of the sweep know each other."""
        part = next((p for p in self.loose if p.joint and not p.finished), None)
        if self.ship or part is None or self._joint is not None or not all(m.finished for m in self.modules):
            return []
        members = self._group if self._group and set(self._group) <= set(idle) else tuple(idle[:SHARES])
        if not self._can_join(members):
            part.joint = False
            return []
        for worker in members:
            self._leave(worker)
        part.worker = members[0]
        items = [replace(part.item, meeting=meeting) for meeting in self.session.meeting(members)]
        return self._together(members, part.method, items, part.method, sum(m.cost for m in self.modules), part)

    def _can_join(self, members: Sequence[int]) -> bool:
        """Whether these workers can make a group: some, on one machine."""
        return len(members) > 1 and len({host_of(self.session.name(w)) for w in members}) == 1

    def _together(
        self, members: Sequence[int], method: str, items: Sequence[Any], key: str, cost: float, part: Part | None
    ) -> list[tuple[int, Call]]:
        first = Call(method, (items[0],), key, cost)
        calls = [first, *(Call(method, (item,), key, cost, attempt=first.attempt) for item in items[1:])]
        self._joint = _Joint(set(members), members[0], part)
        return list(zip(members, calls, strict=True))

    def _answered(self, worker: int, result: ItemResult | None) -> None:
        """One member of a joint call less to wait for. After a failure (None) the others may wait for this one: `overdue`."""
        joint = self._joint
        if joint is None:
            return
        joint.waiting.discard(worker)
        if result is None and joint.broken is None:
            joint.broken = time.monotonic()
        if worker == joint.first:
            joint.result = result
        if joint.waiting:
            return
        self._joint = None
        if joint.part is None:
            return
        joint.part.worker = None
        if joint.broken is None and joint.result is not None:
            self._finish(None, joint.part, joint.result)
        else:
            joint.part.joint = False  # by one worker, then

    def overdue(self) -> list[int]:
        joint = self._joint
        late = joint is not None and joint.broken is not None and time.monotonic() - joint.broken > self.limits.grace
        return list(joint.waiting) if joint is not None and late else []

    def _forget_the_gone(self, idle: set[int]) -> None:
        """A worker that is neither idle nor at work was lost between two calls: what it would have done is for others."""
        busy = {p.worker for m in self.modules for p in m.parts} | {p.worker for p in self.loose} | set(self._entering)
        busy |= self._joint.waiting if self._joint is not None else set()
        for worker in (set(self._last) | set(self._context)) - idle - busy:
            self._forget(worker)
            self._leave(worker)

    def _forget(self, worker: int) -> None:
        self._last.pop(worker, None)
        self._starts.pop(worker, None)

    def states_held(self) -> int:
        """States in the object store."""
        held = {id(m.entry) for m in self.modules if m.entry is not None and not m.finished}
        return len(held | ({id(self._front[1])} if self._front[1] is not None else set()))

    def _own_part(self, worker: int) -> Call | None:
        """The next part of the module that this worker holds."""
        module = self._context.get(worker)
        if module is None:
            return None
        for part in module.parts:
            if part.worker is None and not part.finished:
                part.worker = worker
                return Call(part.method, (part.item,), module.key, module.cost / len(module.parts))
        return None

    def _enter_next(self, worker: int) -> Call | None:
        """The frontier, one worker at a time, if the window allows it."""
        if not self.ship:
            return self._enter_own(worker)
        if self._advancing is not None or self._frontier >= len(self.modules):
            return None
        module = self.modules[self._frontier]
        unfinished = [m.index for m in self.modules[: self._frontier] if not m.finished]
        if unfinished and module.index - unfinished[0] >= self.window:
            return None
        previous = self.modules[self._frontier - 1].holders if self._frontier else set()
        if self._front[1] is None and previous and worker not in previous:
            return None  # only its holder has the states: it comes back to the frontier by itself
        self._advancing = worker
        module.start, module.entry = self._front
        return self._enter(worker, self._frontier, self.session.size > 1 and self._frontier + 1 < len(self.modules))

    def _enter_own(self, worker: int) -> Call | None:
        """Without shipping: the module after the worker's last one, or the start of a stretch that has no worker, or the end
        of one that has, so that both come to their ends at the same time."""
        free = self._stretches()
        if not free:
            return None
        start = self._starts.pop(worker, None)
        if start is not None and any(start in s for s in free):
            return self._enter(worker, start, False)
        begin = {last + 1 for w, last in self._last.items() if w != worker}
        mine = [s for s in free if s.start == self._last.get(worker, -1) + 1 and s.start not in begin]
        unclaimed = [s for s in free if s.start not in begin]
        if mine or unclaimed:
            position = (mine or unclaimed)[0].start
        else:
            found = max((self._take_over(worker, s) for s in free), default=(0.0, 0))
            if found[0] <= 0:
                return None
            position = found[1]
        return self._enter(worker, position, False)

    def _stretches(self) -> list[range]:
        """Positions of modules that nobody has entered or is entering, without gaps."""
        taken = {id(m) for m in self._entering.values()}
        out: list[range] = []
        for p, module in enumerate(self.modules):
            if module.entered or id(module) in taken:
                continue
            if out and out[-1].stop == p:
                out[-1] = range(out[-1].start, p + 1)
            else:
                out.append(range(p, p + 1))
        return out

    def _take_over(self, worker: int, stretch: range) -> tuple[float, int]:
        """How much sooner a stretch would be done if this worker took over its end, in units of cost, and from where.

        The worker has to go there first, for ``passing`` times the cost of what it passes. With S taken over of a stretch of
        cost R, A on the way to its start, and D that its worker still has to do before it, both are done at the same time if
        passing (A + R - S) + S = D + R - S. D is half a module, on average.
        """
        whole, before = self._cost(stretch), self.modules[stretch.start - 1].cost / 2 if stretch.start else 0.0
        share = (before + whole * (1 - self.passing) - self._way(worker, stretch.start)) / (2 - self.passing)
        position, taken = stretch.stop - 1, self.modules[stretch.stop - 1].cost
        while position > stretch.start and taken + self.modules[position - 1].cost <= share:
            position -= 1
            taken += self.modules[position].cost
        alone = before + whole
        return alone - max(alone - taken, self._way(worker, position) + taken), position

    def _way(self, worker: int, position: int) -> float:
        """Cost of getting to a module: from behind the worker's last one, or from the first one."""
        here = self._last.get(worker, -1) + 1
        if self._starts.get(worker) == position:
            return 0.0
        return self.passing * self._cost(range(here if here <= position else 0, position))

    def _cost(self, positions: range) -> float:
        return sum(self.modules[p].cost for p in positions)

    def _enter_again(self, worker: int) -> Call | None:
        """A module whose worker was lost, or with parts that nobody has begun: the oldest first."""
        for position, module in enumerate(self.modules):
            if module.finished or not module.entered:
                continue
            if not self.ship and module.holders and self._way(worker, position) > module.cost / 2:
                continue  # who holds it does the rest
            free = sum(p.worker is None and not p.finished for p in module.parts)
            if free > sum(m is module for m in self._entering.values()):
                return self._enter(worker, position, False)
        return None

    def _loose_part(self, worker: int) -> Call | None:
        for part in self.loose:
            if part.worker is None and not part.finished and (self.ship or not part.joint) and part.ready():
                part.worker = worker
                self._leave(worker)
                return Call(part.method, (part.item,), part.method, sum(m.cost for m in self.modules))
        return None

    def _enter(self, worker: int, position: int, ship: bool) -> Call:
        module = self.modules[position]
        self._leave(worker)
        self._entering[worker] = module
        if not self.ship:
            self._last[worker] = position  # its states only go forward
        oldest = next((m.index for m in self.modules if not m.finished), module.index)
        shrink = self.shrink.get(module.key, 1)
        item = EnterItem(self.rows, module.index, module.start, oldest, ship, shrink)
        args = (item,) if module.entry is None else (item, module.entry)
        return Call("enter", args, module.key, module.cost * (1 + module.index - max(module.start, 1)), returns=2)

    # ---- what came of it ---------------------------------------------------------------------------------------

    def finished(self, worker: int, call: Call, result: Any, second: Any) -> None:
        if self._joint is not None and worker in self._joint.waiting:
            self._answered(worker, result)
            return
        if call.method == "enter":
            self._entered(worker, second)
            return
        module = self._context.get(worker)
        part = next(p for p in (module.parts if module else self.loose) if p.worker == worker and not p.finished)
        self._finish(module, part, result)

    def _entered(self, worker: int, states: Any) -> None:
        module = self._entering.pop(worker)
        self._context[worker] = module
        module.holders.add(worker)
        if not module.entered:
            parts = self._split(worker, module)
            module.entered = True
            module.parts = module.make_parts(parts)
            self._frontier += 1
            if self.ship:
                self._front = (module.index + 1, states)
        if self._advancing == worker:
            self._advancing = None

    def _split(self, worker: int, module: Module) -> int:
        """Parts of a module that is entered: more than one if workers would idle, or, without shipping, for those that do."""
        workers, left = self.session.size, sum(not m.entered for m in self.modules)
        if self.ship:
            return 1 if left >= workers else -(-workers // left)
        position = self.modules.index(module)
        helpers = [w for w in self.session.idle() if w != worker and self._way(w, position) <= module.cost / 2]
        return 1 + len(helpers) // left

    def _finish(self, module: Module | None, part: Part, result: ItemResult) -> None:
        part.finished, part.worker = True, None
        part.on_done(result)
        if module is not None and module.finished:
            module.entry = None  # the states may go

    def lost(self, worker: int, call: Call, alive: bool) -> None:
        if not alive:
            self._forget(worker)
        if self._joint is not None and worker in self._joint.waiting:
            self._answered(worker, None)
            return
        if call.method == "enter":
            self._entering.pop(worker, None)
            if self._advancing == worker:
                self._advancing = None
            self._leave(worker)
            return
        module = self._context.get(worker)
        self._leave(worker)
        for part in module.parts if module is not None else self.loose:
            if part.worker == worker and not part.finished:
                part.worker = None
                result = part.found()  # it may have been finished before the loss
                if result is not None:
                    self._finish(module, part, result)

    def missing(self, worker: int, call: Call) -> None:
        """The states of a module were lost with a machine: whoever enters it next finds its own."""
        module = self._entering.get(worker)
        if module is not None:
            module.entry = None
            if not module.entered:
                self._front = (0, None)
        self.lost(worker, call, True)

    def _leave(self, worker: int) -> None:
        module = self._context.pop(worker, None)
        if module is not None:
            module.holders.discard(worker)


def stretches(costs: Sequence[float], count: int) -> list[int]:
    """Where each of ``count`` runs of consecutive items begins, so that the most expensive one is as cheap as can be.

    Of fewer items than runs, several runs begin at the same one.
    """
    if len(costs) <= count:
        return [k * len(costs) // count for k in range(count)]
    low, high = max(costs), sum(costs)
    starts = list(range(count))
    for _ in range(40):
        middle = (low + high) / 2
        found = _runs_within(costs, count, middle)
        if found is None:
            low = middle
        else:
            high, starts = middle, found
    return starts


def _runs_within(costs: Sequence[float], count: int, limit: float) -> list[int] | None:
    """Starts of ``count`` runs, none of which costs more than ``limit``; None if that takes more runs."""
    starts, cost = [0], costs[0]
    for i in range(1, len(costs)):
        if cost + costs[i] > limit or len(costs) - i <= count - len(starts):
            starts.append(i)
            cost = 0.0
        cost += costs[i]
    return starts if len(starts) <= count else None


def window_for(session: Session, state_bytes: int) -> int:
    """Modules that may be entered ahead of the oldest unfinished one: one per worker, as far as the store has room."""
    wanted = session.size + 2
    store = session.store_bytes()
    if store is None or not state_bytes:
        return wanted
    return max(2, min(wanted, int(store * 0.7) // state_bytes))


__all__ = ["Fan", "Module", "Part", "window_for"]
