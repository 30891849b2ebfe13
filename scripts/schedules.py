"""Event simulation of the schedules in exl2ray/dist. `simulate.py` makes a table of it.

Costs are those of one GPU, in seconds. Left out: starting workers, the embedding, the head, writing the output, losses.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SHARES = 8  # largest group (exl2ray/dist/tree.py)
WINDOW_EXTRA = 2  # modules under way beyond one per worker (exl2ray/dist/fan.py), as far as the object store has room
RUN = 4  # modules that are swept in one go


@dataclass(frozen=True)
class ModuleCosts:
    """One module on one GPU. Dictionaries have an entry per input that several linears share, named by them."""

    load_s: float
    """reading its weights onto a GPU; hidden behind the module before where the same worker goes on with the next one"""
    sweep_s: float
    """forward of the measurement rows"""
    hessian_s: float
    """Hessians of the measurement rows, in that forward"""
    measure_s: float
    """solving and scoring all options, after that"""
    repeat_s: float
    """what every worker repeats of measure_s when the options are shared out: factorisations"""
    forward_s: float
    """forward of the quantisation rows"""
    forward_hessian_s: float
    """Hessians of the quantisation rows"""
    reported_s: float
    """forward of the rows whose perplexity is reported, in the other model"""
    check_s: float
    """forward of the quantisation rows through the quantised module"""
    solve_s: dict[str, float]
    """quantising the linears of one input, writing included"""
    hessian_gb: dict[str, float]
    packed_gb: dict[str, float]

    def enter_s(self, measuring: bool) -> float:
        return self.sweep_s + self.hessian_s if measuring else self.forward_s + self.forward_hessian_s

    def rest_s(self, measuring: bool) -> float:
        """Everything else on an entered module, in a fan."""
        return self.measure_s if measuring else sum(self.solve_s.values()) + self.check_s


@dataclass(frozen=True)
class ModelCosts:
    layers: int
    measure_state_gb: float  # hidden states of all rows at one boundary of modules
    quantize_state_gb: float
    quantize_rows: int
    modules: dict[str, ModuleCosts]  # of one layer, in order

    def chain(self) -> list[ModuleCosts]:
        return [m for _ in range(self.layers) for m in self.modules.values()]


@dataclass(frozen=True)
class Costs:
    source: str  # where the numbers come from
    transfer_gb_s: float  # hidden states: from a GPU into the object store, or from there to a GPU
    nccl_gb_s: float  # between the GPUs of a group
    message_s: float  # one exchange of small objects in a group
    driver_s: float  # from the end of an item to the start of the next one on a worker
    store_gb: float  # object store for states
    models: dict[str, ModelCosts]

    @staticmethod
    def load(path: Path) -> Costs:
        value = json.loads(path.read_text(encoding="utf-8"))
        models = value.pop("models")
        read = {
            name: ModelCosts(**{**m, "modules": {k: ModuleCosts(**c) for k, c in m["modules"].items()}})
            for name, m in models.items()
        }
        return Costs(models=read, **value)


@dataclass(frozen=True)
class Result:
    """``front``: what the states had to go through one after another: seconds by forward, loading, shipping, driver. For a
    group its critical path, by load, forward, solve, exchange, driver.
    """

    seconds: float
    front: dict[str, float]


def waits(chain: Sequence[ModuleCosts], work_s: Sequence[float]) -> list[float]:
    """Seconds that a worker waits for each module's weights when it reads them during the module before."""
    return [max(0.0, m.load_s - before) for m, before in zip(chain, [0.0, *work_s], strict=False)]


# ---- fans: measurement, and quantisation on reference states --------------------------------------------------------


@dataclass
class Item:
    """A module of a fan. ``parts``: 0 until others may work on it."""

    costs: ModuleCosts
    measuring: bool
    load_s: float
    parts: int = 0
    begun: int = 0
    finished: int = 0
    entering: int = 0

    @property
    def done(self) -> bool:
        return 0 < self.parts == self.finished

    def part_s(self) -> float:
        repeated = self.costs.repeat_s if self.parts > 1 else 0.0
        return (self.costs.rest_s(self.measuring) - repeated) / self.parts + repeated


Chosen = tuple[float, Callable[[], None]]  # seconds, and what is true afterwards


@dataclass
class Fan:
    """As built (``exl2ray.dist.fan.Fan``): one worker at a time enters the next module, its reference forward being the
    sweep, and ships the states after it; then it works on the module.
    """

    items: list[Item]
    workers: int
    state_s: float  # shipping states one way
    driver_s: float
    window: int
    frontier: int = 0  # the next module that the states must go through
    advancing: bool = False
    oldest: int = 0  # the first module that is not finished
    context: dict[int, Item] = field(default_factory=dict)  # worker -> module that it has entered
    front: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("forward", "loading", "shipping", "driver"), 0.0))

    def choices(self) -> tuple[Callable[[int], Chosen | None], ...]:
        return (self.own_part, self.enter_next, self.enter_again)

    def run(self) -> Result:
        now, order = 0.0, 0
        events: list[tuple[float, int, int, Callable[[], None]]] = []
        idle = list(range(self.workers))
        while True:
            for choose in self.choices():
                for worker in list(idle):
                    chosen = choose(worker)
                    if chosen is not None:
                        idle.remove(worker)
                        order += 1
                        heapq.heappush(events, (now + self.driver_s + chosen[0], order, worker, chosen[1]))
                    elif choose != self.own_part:
                        break  # what one worker is not given, no other is
            if not events:
                return Result(now, self.front)
            now, _, worker, done = heapq.heappop(events)
            done()
            idle = sorted([*idle, worker])
            while self.oldest < len(self.items) and self.items[self.oldest].done:
                self.oldest += 1

    def own_part(self, worker: int) -> Chosen | None:
        """The next part of the module that this worker has entered."""
        item = self.context.get(worker)
        if item is None or item.begun == item.parts:
            return None
        item.begun += 1

        def done() -> None:
            item.finished += 1

        return item.part_s(), done

    def enter_next(self, worker: int) -> Chosen | None:
        if self.advancing or self.frontier == len(self.items) or self.frontier - self.oldest >= self.window:
            return None
        item = self.items[self.frontier]
        ships = 0.0
        if self.workers > 1:
            ships = self.state_s * ((self.frontier > 0) + (self.frontier + 1 < len(self.items)))
        forward = item.costs.enter_s(item.measuring)
        for what, seconds in (("forward", forward), ("loading", item.load_s), ("shipping", ships), ("driver", self.driver_s)):
            self.front[what] += seconds
        self.advancing = True
        parts = self.parts_of(self.frontier)

        def done() -> None:
            self.advancing = False
            self.frontier += 1
            item.parts = parts
            self.context[worker] = item

        return forward + item.load_s + ships, done

    def parts_of(self, index: int) -> int:
        """Towards the end the options of a module are split, so that no worker idles."""
        left = len(self.items) - index
        return 1 if left >= self.workers or not self.items[index].measuring else -(-self.workers // left)

    def enter_again(self, worker: int) -> Chosen | None:
        """A module with parts that nobody has begun: the oldest first."""
        for item in self.items[self.oldest : self.frontier]:
            if item.parts - item.begun > item.entering:
                return self.enter(worker, item)
        return None

    def enter(self, worker: int, item: Item) -> Chosen:
        item.entering += 1

        def done() -> None:
            item.entering -= 1
            self.context[worker] = item

        return self.state_s + item.load_s + item.costs.enter_s(item.measuring), done


class SweptFan(Fan):
    """Not built: a worker sweeps RUN modules in one go (forward only, states stay on its GPU, weights are read ahead) and
    ships the states between them; everybody enters a swept module from there.
    """

    def choices(self) -> tuple[Callable[[int], Chosen | None], ...]:
        return (self.own_part, self.sweep, self.enter_again)

    def sweep(self, worker: int) -> Chosen | None:
        waiting = sum(item.parts > item.begun + item.entering for item in self.items[self.oldest : self.frontier])
        if self.advancing or self.frontier == len(self.items) or waiting >= self.workers:
            return None
        if self.frontier - self.oldest >= self.window:
            return None
        last = min(len(self.items), self.frontier + RUN)
        run = self.items[self.frontier : last]
        forward = [i.costs.sweep_s if i.measuring else i.costs.forward_s for i in run]
        loads = sum(waits([i.costs for i in run], forward))
        ships = self.state_s * ((self.frontier > 0) + sum(k + 1 < len(self.items) for k in range(self.frontier, last)))
        for what, seconds in (("forward", sum(forward)), ("loading", loads), ("shipping", ships), ("driver", self.driver_s)):
            self.front[what] += seconds
        self.advancing = True
        self.context.pop(worker, None)

        def done() -> None:
            self.advancing = False
            for k in range(self.frontier, last):
                self.items[k].parts = self.parts_of(k)
            self.frontier = last

        return sum(forward) + loads + ships, done


def fan(costs: Costs, model: ModelCosts, workers: int, measuring: bool, swept: bool = False) -> Result:
    """``swept``: with sweeps of their own, where there is more than one worker."""
    chain = model.chain()
    work = [m.enter_s(measuring) + m.rest_s(measuring) for m in chain]
    # One worker reads the next module while it works on this one; several do not know which one will be theirs.
    loads = waits(chain, work) if workers == 1 else [m.load_s for m in chain]
    items = [Item(m, measuring, load) for m, load in zip(chain, loads, strict=True)]
    state_gb = model.measure_state_gb if measuring else model.quantize_state_gb
    room = int(costs.store_gb * 0.7 / state_gb)
    swept = swept and workers > 1
    window = max(2, min(workers + (RUN if swept else WINDOW_EXTRA), room))
    kind = SweptFan if swept else Fan
    return kind(items, workers, state_gb / costs.transfer_gb_s, costs.driver_s, window).run()


# ---- groups: quantisation on quantised states -----------------------------------------------------------------------


def gang(costs: Costs, model: ModelCosts, workers: int) -> Result:
    """One bitrate (``exl2ray.dist.gang.Gang``): a group of at most SHARES workers; others have nothing to do.

    Every member runs its calibration rows through the source module; Hessians are summed on the owners of the inputs; owners
    quantise; packed tensors are broadcast; all run their rows through the quantised module.
    """
    size = min(workers, SHARES, model.quantize_rows)
    rows = [s * model.quantize_rows // SHARES for s in range(SHARES + 1)]
    most = max(rows[(r + 1) * SHARES // size] - rows[r * SHARES // size] for r in range(size)) / model.quantize_rows
    path = dict.fromkeys(("load", "forward", "solve", "exchange", "driver"), 0.0)
    before = 0.0  # time that the module before took
    for m in model.chain():
        owned = [0.0] * size
        for solve in sorted(m.solve_s.values(), reverse=True):  # the most expensive first, to whoever has least
            owned[owned.index(min(owned))] += solve
        exchange = 0.0
        if size > 1:
            sums = sum(m.hessian_gb.values()) * (size - 1) / costs.nccl_gb_s  # everybody sends to the owner, in turn
            spread = sum(m.packed_gb.values()) / costs.nccl_gb_s
            exchange = sums + spread + costs.message_s * (4 + len(m.solve_s))
        forward = (m.forward_s + m.forward_hessian_s + m.reported_s + m.check_s) * most
        path["load"] += max(0.0, m.load_s - before)
        before = forward + max(owned) + exchange
        path["forward"] += forward
        path["solve"] += max(owned)
        path["exchange"] += exchange
        path["driver"] += costs.driver_s
    return Result(sum(path.values()), path)


def serial_s(costs: Costs, model: ModelCosts, kind: str) -> float:
    """The sum of all items of a pass ("measure", "reference", "quantized") on one GPU."""
    chain = model.chain()
    work = [m.enter_s(kind == "measure") + m.rest_s(kind == "measure") for m in chain]
    if kind == "quantized":
        work = [w + m.reported_s for w, m in zip(work, chain, strict=True)]
    calls = 1 if kind == "quantized" else 2  # a fan enters a module and works on it
    return sum(work) + sum(waits(chain, work)) + calls * len(chain) * costs.driver_s
