"""Event simulation of the schedules in exl2ray/dist. `simulate.py` makes a table of it.

Costs are those of one GPU, in seconds. Left out: starting workers, the embedding, the head, writing the output, losses.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache

from schedule_costs import Costs, ModelCosts, ModuleCosts
from sweeps import SHARES, Sweep, largest_share, perplexity_s, sums_s, sweep

WINDOW_EXTRA = 2  # modules under way beyond one per worker (exl2ray/dist/fan.py), as far as the object store has room
PASSING = {"measure": 0.05, "quantize": 0.35}  # cost of a module on the way, as a share of its own (exl2ray/dist/fan.py)
AHEAD = 2  # modules whose weights a worker reads in advance (exl2ray/dist/runner.py)
UPLOAD = 0.16  # of load_s: weights of a prepared module that have been read, 0.006 and 0.027 s of a 70B layer on an H200


@dataclass(frozen=True)
class Result:
    """``front``: what nobody gets past, in seconds. Where states are shipped, their way through the model: forward, loading,
    shipping, driver. After a sweep: sweep. Else the way of one worker through all modules: forward, loading. For a group its
    critical path: load, forward, solve, exchange, first, driver.
    """

    seconds: float
    front: dict[str, float]


class Reader:
    """A worker's reader of weights: one thread, AHEAD modules in advance of the one that was asked for last."""

    def __init__(self, loads: Sequence[float]) -> None:
        self._loads = loads
        self._there: dict[int, float] = {}  # module -> when it has been read
        self._free = 0.0

    def load(self, index: int, now: float) -> float:
        """When the weights that are asked for at ``now`` are there."""
        at = max(now, self._read(index, now))
        wanted = range(index + 1, min(index + 1 + AHEAD, len(self._loads)))
        self._there = {k: t for k, t in self._there.items() if k in wanted}
        for k in wanted:
            self._read(k, at)
        return at

    def _read(self, index: int, now: float) -> float:
        if index not in self._there:
            self._free = max(self._free, now) + self._loads[index]
            self._there[index] = self._free
        return self._there[index]


def serial_s(costs: Costs, model: ModelCosts, kind: str) -> float:
    """A pass ("measure", "reference", "quantized") on one GPU: all items one after another, weights read meanwhile."""
    chain = model.chain()
    if kind == "quantized":
        steps = sum(sum(step(costs, model, m, 1).values()) for m in chain)
        return steps + sum(waits(costs, model, 1)) + sum(m.first_chain_s for m in model.modules.values())
    measuring = kind == "measure"
    reader, now = Reader([m.load_s for m in chain]), 0.0
    for index, m in enumerate(chain):
        now = reader.load(index, now + costs.driver_s) + m.enter_s(measuring) + costs.driver_s + m.rest_s(measuring)
        if index < len(model.modules):
            now += m.first_measure_s if measuring else m.first_quantize_s
    return now if measuring else now + perplexity_s(costs, model, 1)


# ---- fans: measurement, and quantisation on reference states --------------------------------------------------------


@dataclass
class Item:
    """A module of a fan. ``parts``: 0 until others may work on it."""

    costs: ModuleCosts
    measuring: bool
    parts: int = 0
    begun: int = 0
    finished: int = 0
    entering: int = 0

    @property
    def done(self) -> bool:
        return 0 < self.parts == self.finished

    @property
    def first_s(self) -> float:
        return self.costs.first_measure_s if self.measuring else self.costs.first_quantize_s

    def part_s(self) -> float:
        repeated = self.costs.repeat_s if self.parts > 1 else 0.0
        return (self.costs.rest_s(self.measuring) - repeated) / self.parts + repeated


Chosen = tuple[float, Callable[[], None]]  # seconds, and what is true afterwards


@dataclass
class Fan:
    """Nothing is shipped, as on GPUs (``exl2ray.dist.fan.Fan``): a worker takes one module after another; where somebody else
    has been, the end of a stretch that another one has in front of it. It goes there by itself, but for the start of its own
    stretch, to which a sweep has brought it. Of modules that were prepared there only the weights are loaded.
    """

    items: list[Item]
    workers: int
    driver_s: float
    sweep: Sweep = field(default_factory=Sweep)
    now: float = 0.0
    oldest: int = 0  # the first module that is not finished
    idle: list[int] = field(default_factory=list)
    reached: dict[int, int] = field(default_factory=dict)  # worker -> module at whose entry its states are
    starts: dict[int, int] = field(default_factory=dict)  # worker -> start of its stretch, until it goes on from there
    free: list[range] | None = None  # see stretches
    context: dict[int, int] = field(default_factory=dict)  # worker -> module that it has entered
    readers: dict[int, Reader] = field(default_factory=dict)
    met: set[tuple[int, int]] = field(default_factory=set)  # (worker, kind of module)
    last: dict[int, int] = field(default_factory=dict)  # worker -> module that it took last
    sums: list[float] = field(default_factory=list)  # work on the modules before each

    def __post_init__(self) -> None:
        if self.sweep.starts:
            self.now = self.driver_s + self.sweep.seconds
            self.starts = dict(enumerate(self.sweep.starts))
            self.reached = dict(self.starts)
            self.last = {worker: start - 1 for worker, start in self.starts.items()}

    def choices(self) -> tuple[Callable[[int], Chosen | None], ...]:
        return (self.own_part, self.enter_next, self.enter_again)

    def run(self) -> Result:
        order = 0
        events: list[tuple[float, int, int, Callable[[], None]]] = []
        self.idle = list(range(self.workers))
        while True:
            for choose in self.choices():
                for worker in list(self.idle):
                    chosen = choose(worker)
                    if chosen is not None:
                        self.idle.remove(worker)
                        order += 1
                        heapq.heappush(events, (self.now + self.driver_s + chosen[0], order, worker, chosen[1]))
            if not events:
                return Result(self.now, self.front())
            self.now, _, worker, done = heapq.heappop(events)
            done()
            self.idle = sorted([*self.idle, worker])
            while self.oldest < len(self.items) and self.items[self.oldest].done:
                self.oldest += 1

    def front(self) -> dict[str, float]:
        """Whoever works on the last module has gone through all others, or been brought there."""
        if self.sweep.starts:
            return {"sweep": self.sweep.seconds}
        reader, now = Reader([i.costs.load_s for i in self.items]), 0.0
        forward = [i.costs.pass_s(i.measuring) for i in self.items]
        for index, seconds in enumerate(forward):
            now = reader.load(index, now) + seconds
        return {"forward": sum(forward), "loading": now - sum(forward)}

    def own_part(self, worker: int) -> Chosen | None:
        """The next part of the module that this worker has entered."""
        item = self.items[self.context[worker]] if worker in self.context else None
        if item is None or item.begun == item.parts:
            return None
        item.begun += 1

        def done() -> None:
            item.finished += 1

        return item.part_s(), done

    def enter_next(self, worker: int) -> Chosen | None:
        """The module after the worker's last one, a stretch that has no worker, or the end of one that has."""
        free = self.stretches()
        if not free:
            return None
        start = self.starts.pop(worker, None)
        if start is not None and any(start in s for s in free):
            return self.enter(worker, start)
        begun = {last + 1 for other, last in self.last.items() if other != worker}
        unclaimed = [s for s in free if s.start not in begun]
        mine = [s for s in unclaimed if s.start == self.last.get(worker, -1) + 1]
        if mine or unclaimed:
            index = (mine or unclaimed)[0].start
        else:
            gain, index = max(self.take_over(worker, s) for s in free)
            if gain <= 0:
                return None
        return self.enter(worker, index)

    def take_over(self, worker: int, stretch: range) -> tuple[float, int]:
        """How much sooner a stretch is done if this worker takes over its end, and from where (`exl2ray.dist.fan.Fan`)."""
        passing, whole = self.passing, self.size(stretch)
        before = self.size(range(stretch.start - 1, stretch.start)) / 2 if stretch.start else 0.0
        share = (before + whole * (1 - passing) - self.detour(worker, stretch.start)) / (2 - passing)
        index, taken = stretch.stop - 1, self.size(range(stretch.stop - 1, stretch.stop))
        while index > stretch.start and taken + self.size(range(index - 1, index)) <= share:
            index -= 1
            taken += self.size(range(index, index + 1))
        alone = before + whole
        return alone - max(alone - taken, self.detour(worker, index) + taken), index

    def detour(self, worker: int, index: int) -> float:
        """What the driver takes the way to a module for: from behind the worker's last one, or from the first one."""
        here = self.last.get(worker, -1) + 1
        return self.passing * self.size(range(here if here <= index else 0, index))

    @property
    def passing(self) -> float:
        return PASSING["measure" if self.items[0].measuring else "quantize"]

    def stretches(self) -> list[range]:
        """Modules that nobody has, without gaps. Kept until somebody takes one."""
        if self.free is not None:
            return self.free
        self.free = out = []
        for k, item in enumerate(self.items):
            if item.parts or item.entering:
                continue
            if out and out[-1].stop == k:
                out[-1] = range(out[-1].start, k + 1)
            else:
                out.append(range(k, k + 1))
        return out

    def size(self, stretch: range) -> float:
        """Work on modules; the driver divides by weights, to which it is about in proportion."""
        if not self.sums:
            works = (i.costs.enter_s(i.measuring) + i.costs.rest_s(i.measuring) for i in self.items)
            self.sums = [0.0, *itertools.accumulate(works)]
        return self.sums[stretch.stop] - self.sums[stretch.start]

    def enter_again(self, worker: int) -> Chosen | None:
        """A module with parts that nobody has begun: the oldest first."""
        for index in range(self.oldest, len(self.items)):
            item = self.items[index]
            if not item.parts or item.parts - item.begun <= item.entering:
                continue
            if index not in self.context.values() or self.near(worker, index):
                return self.enter(worker, index)
        return None

    def near(self, worker: int, index: int) -> bool:
        """Whether sharing a module is worth the way to it."""
        return self.detour(worker, index) <= self.size(range(index, index + 1)) / 2

    def enter(self, worker: int, index: int) -> Chosen:
        item, self.last[worker] = self.items[index], index
        known = self.sweep.owners.get(index) == worker
        seconds = self.way(worker, index) + (item.costs.load_s * UPLOAD if known else item.costs.enter_s(item.measuring))
        if (worker, id(item.costs)) not in self.met:
            self.met.add((worker, id(item.costs)))
            seconds += item.first_s
        item.entering += 1
        self.free = None
        self.context.pop(worker, None)

        def done() -> None:
            item.entering -= 1
            item.parts = item.parts or self.split(index)
            self.context[worker] = index
            self.reached[worker] = index + 1
            self.entered(index)

        return seconds, done

    def split(self, index: int) -> int:
        """The options of a module that is measured are split for workers that are idle and near."""
        helpers = sum(self.near(w, index) for w in self.idle) if self.items[index].measuring else 0
        return 1 + helpers // sum(not i.parts for i in self.items)

    def entered(self, index: int) -> None:
        pass

    def way(self, worker: int, index: int) -> float:
        """Until the states are at the module and its weights on the GPU: from where the worker is, or from the start."""
        if worker not in self.readers:
            self.readers[worker] = Reader([i.costs.load_s for i in self.items])
        begin = now = self.now + self.driver_s
        here = self.reached.get(worker, 0)
        for k in range(here if here <= index else 0, index):
            now = self.readers[worker].load(k, now) + self.items[k].costs.pass_s(self.items[k].measuring)
        return self.readers[worker].load(index, now) - begin


@dataclass
class ShippingFan(Fan):
    """With shipping, as on CPUs: one worker at a time enters the next module and ships the states after it. Nobody knows
    which module will be his, so that weights are not there in advance.
    """

    state_s: float = 0.0  # shipping states one way
    window: int = 2
    frontier: int = 0  # the next module that the states must go through
    advancing: bool = False
    path: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("forward", "loading", "shipping", "driver"), 0.0))

    def front(self) -> dict[str, float]:
        return self.path

    def enter_next(self, worker: int) -> Chosen | None:
        if self.advancing or self.frontier == len(self.items) or self.frontier - self.oldest >= self.window:
            return None
        item, last = self.items[self.frontier], self.frontier + 1 == len(self.items)
        ships = self.state_s * (not last)  # after the module; those before it are part of the way
        before = self.state_s * (self.frontier > 0)
        self.advancing = True
        for what, seconds in (("forward", item.costs.enter_s(item.measuring)), ("loading", item.costs.load_s),
                              ("shipping", ships + before), ("driver", self.driver_s)):  # fmt: skip
            self.path[what] += seconds
        seconds, done = self.enter(worker, self.frontier)
        return seconds + ships, done

    def detour(self, worker: int, index: int) -> float:
        return 0.0

    def split(self, index: int) -> int:
        """Towards the end the options of a module are split, so that no worker idles."""
        left = sum(not i.parts for i in self.items)
        return 1 if left >= self.workers or not self.items[index].measuring else -(-self.workers // left)

    def entered(self, index: int) -> None:
        if index == self.frontier:
            self.advancing = False
            self.frontier += 1

    def way(self, worker: int, index: int) -> float:
        return self.state_s * (index > 0) + self.items[index].costs.load_s


def fan(costs: Costs, model: ModelCosts, workers: int, measuring: bool, ship: bool = False) -> Result:
    """One pass on reference states; with several bitrates the same, solving as often. One worker ships nothing.

    Up to SHARES workers are those of one machine, which begin with a sweep and share the perplexity pass; more are several
    machines, where every worker finds its own way and one makes that pass.
    """
    items = [Item(m, measuring) for m in model.chain()]
    together = not ship and 1 < workers <= SHARES
    if ship and workers > 1:
        state_gb = model.measure_state_gb if measuring else model.quantize_state_gb
        window = max(2, min(workers + WINDOW_EXTRA, int(costs.store_gb * 0.7 / state_gb)))
        made: Fan = ShippingFan(items, workers, costs.driver_s, state_s=state_gb / costs.transfer_gb_s, window=window)
    else:
        made = Fan(items, workers, costs.driver_s, sweep(costs, model, workers, measuring) if together else Sweep())
    result = made.run()
    after = 0.0 if measuring else perplexity_s(costs, model, workers if together else 1)  # when everything else is done
    return Result(result.seconds + after, result.front)


# ---- groups: quantisation on quantised states -----------------------------------------------------------------------


def step(costs: Costs, model: ModelCosts, m: ModuleCosts, size: int) -> dict[str, float]:
    """One module in a group, without waiting for weights: seconds of its critical path.

    Every member runs its calibration rows through the source module; Hessians are summed on the owners of the inputs, or, if
    they are wide, as block rows on all members, which factorise them; owners quantise; packed tensors are broadcast; all run
    their rows through the quantised module.
    """
    size = min(size, SHARES, model.quantize_rows)
    most = largest_share(model.quantize_rows, size)
    owned = [0.0] * size
    own = {i: s - m.wide_s.get(i, 0.0) - m.wide_serial_s.get(i, 0.0) for i, s in m.solve_s.items()}
    for solve in sorted(own.values(), reverse=True):  # the most expensive first, to whoever has least
        owned[owned.index(min(owned))] += solve
    solving = max(owned) + sum(m.wide_s.values()) / size + sum(m.wide_serial_s.values())
    exchange = 0.0
    if size > 1:
        spread = sum(m.packed_gb.values()) / costs.nccl_gb_s
        exchange = sums_s(costs, m, size, m.wide_s) + spread + costs.message_s * (4 + len(m.solve_s))
    forward = (m.forward_s + m.forward_hessian_s + m.reported_s + m.check_s) * most
    return {"forward": forward * m.group, "solve": solving * m.group, "exchange": exchange, "driver": costs.driver_s}


def waits(costs: Costs, model: ModelCosts, size: int) -> list[float]:
    """Seconds that a group waits for each module's weights, which it reads during the module before."""
    chain = model.chain()
    work = [sum(step(costs, model, m, size).values()) for m in chain]
    return [max(0.0, m.load_s - before) for m, before in zip(chain, [0.0, *work], strict=False)]


def gang(costs: Costs, model: ModelCosts, workers: int) -> Result:
    """One bitrate (``exl2ray.dist.gang.Gang``): a group of at most SHARES workers; others have nothing to do."""
    path = dict.fromkeys(("load", "forward", "solve", "exchange", "first", "driver"), 0.0)
    path["load"] = sum(waits(costs, model, workers))
    path["first"] = sum(m.first_chain_s for m in model.modules.values())
    for m in model.chain():
        for what, seconds in step(costs, model, m, workers).items():
            path[what] += seconds
    return Result(sum(path.values()), path)


@dataclass
class Chain:
    """A bitrate of a ladder and its group."""

    size: int = 0
    position: int = 0
    end: float | None = None  # of the module in work


def ladder(costs: Costs, model: ModelCosts, workers: int, bitrates: int) -> float:
    """Seconds of several bitrates (``exl2ray.dist.chains.Chains``): groups share the workers out, and take in those that have
    become free between two modules.
    """
    now, todo, free = 0.0, bitrates, workers
    begun = sum(m.first_chain_s for m in model.modules.values())  # all groups at the same time, at the start

    @cache
    def modules(size: int) -> list[float]:
        pairs = zip(model.chain(), waits(costs, model, size), strict=True)
        return [sum(step(costs, model, m, size).values()) + wait for m, wait in pairs]

    chains: list[Chain] = []
    while todo or chains:
        while todo and len(chains) < workers:
            chains.append(Chain())
            todo -= 1
        for rank, c in enumerate(chains):
            if c.end is not None:
                continue
            target = min(SHARES, workers // len(chains) + (rank < workers % len(chains)))
            more = max(0, min(free, target - c.size))
            c.size, free = c.size + more, free - more
            if c.size:
                c.end = now + modules(c.size)[c.position]
        first = min((c for c in chains if c.end is not None), key=lambda c: c.end or 0.0)
        now, first.end = first.end or now, None
        first.position += 1
        if first.position == len(model.modules) * model.layers:
            chains.remove(first)
            free += first.size
    return begun + now
