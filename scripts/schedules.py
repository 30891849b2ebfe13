"""Event simulation: the real scheduling code of exl2ray/driver on a virtual clock. `simulate.py` makes a table of it.

`Independent`, `Sequential` and `Supervisor` decide who does what; scripts stand for the passes of exl2ray/team and say what
they take. Costs are those of one GPU, in seconds. Left out: starting workers, the embedding, the head, writing the output,
losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from schedule_costs import Costs, ModelCosts, ModuleCosts
from sweeps import SHARES, Sweep, largest_share, perplexity_s, sums_s, sweep
from virtual_workers import VirtualWorkers

from exl2ray.driver.independent import PASSING, Independent, Item
from exl2ray.driver.policy import Limits
from exl2ray.driver.sequential import Sequential
from exl2ray.driver.supervise import Supervisor
from exl2ray.team.messages import Begun, ChainPass, Choices, ItemResult, MeasurePass, Pass, Ready

AHEAD = 2  # modules whose weights a worker reads in advance (exl2ray/team/runner.py)
UPLOAD = 0.16  # of load_s: weights of a prepared module that have been read, 0.006 and 0.027 s of a 70B layer on an H200
NOWHERE = 1 << 60
ENDLESS = Limits(first=1e12, floor=1e12)  # a simulated worker never hangs


@dataclass(frozen=True)
class Result:
    """``front``: what nobody gets past, in seconds. After a joint run of the source model: sweep. Else the way of one worker
    through all modules: forward, loading. For a group its critical path: load, forward, solve, exchange, first, driver.
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
    """A pass ("measure", "reference", "quantized") on one GPU: all modules one after another, weights read meanwhile."""
    chain = model.chain()
    if kind == "quantized":
        steps = sum(sum(step(costs, model, m, 1).values()) for m in chain)
        first = sum(m.first_chain_s for m in model.modules.values())
        return costs.driver_s + steps + sum(waits(costs, model, 1)) + first
    measuring = kind == "measure"
    reader, now = Reader([m.load_s for m in chain]), costs.driver_s
    for index, m in enumerate(chain):
        now = reader.load(index, now) + m.enter_s(measuring) + m.rest_s(measuring)
        if index < len(model.modules):
            now += m.first_measure_s if measuring else m.first_quantize_s
    return now if measuring else now + costs.driver_s + perplexity_s(costs, model, 1)


# ---- modules of the source model: measurement, and quantisation on reference states ---------------------------------


@dataclass
class SourceModules:
    """One pass on ``workers`` GPUs, SHARES of which are in one machine."""

    costs: Costs
    model: ModelCosts
    measuring: bool
    workers: int
    sweeps: dict[int, Sweep] = field(default_factory=dict)  # worker -> what its group ran together
    reached: dict[int, int] = field(default_factory=dict)  # worker -> module at whose entry its states are
    readers: dict[int, Reader] = field(default_factory=dict)
    met: set[tuple[int, int]] = field(default_factory=set)  # (worker, kind of module)

    def run(self) -> Result:
        self.chain = self.model.chain()
        self.virtual = VirtualWorkers(self.workers, self.script, poll=False, machine=SHARES)
        cost = [m.enter_s(self.measuring) + m.rest_s(self.measuring) for m in self.chain]
        items = [Item(i, str(i), c) for i, c in enumerate(cost)]
        passing = PASSING["measure" if self.measuring else "quantize"]
        work = Independent(items, self.make, self.virtual, lambda r: None, passing=passing, together=True)
        Supervisor(self.virtual, ENDLESS).run(work)
        seconds = self.virtual.clock
        if not self.measuring:  # the finished model's perplexity
            seconds += self.costs.driver_s + perplexity_s(self.costs, self.model, min(self.workers, SHARES))
        return Result(seconds, self.front())

    def make(self, indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> Pass:
        return MeasurePass(modules=indices, hashes={}, stretches=stretches, keep_from=keep_from)

    def script(self, worker: int, part: Pass) -> Iterator[tuple[float, Any]]:
        """What a worker does in a pass (`exl2ray.team.source_passes`): seconds, and what it says then."""
        assert isinstance(part, MeasurePass)
        wait = self.costs.driver_s
        if part.stretches:
            made = sweep(self.costs, self.model, part.stretches, self.measuring)
            self.sweeps[worker] = replace(made, owned={i for i, rank in made.owners.items() if rank == part.meeting.rank})
            yield wait, Begun("sweep", -1, "sweep", together=True)
            yield made.seconds, Ready("sweep", made.seconds)
            self.reached[worker], wait = part.modules[0], 0.0
        for index in part.modules:
            if index >= self.virtual.ends.get(worker, NOWHERE):
                return
            yield wait, Begun("measure", index, str(index))
            seconds, wait = self.module_s(worker, index), 0.0
            yield seconds, ItemResult(index, str(index), seconds, "", {})

    def module_s(self, worker: int, index: int) -> float:
        m = self.chain[index]
        prepared = worker in self.sweeps and index in self.sweeps[worker].owned
        seconds = self.way(worker, index) + (m.load_s * UPLOAD if prepared else m.enter_s(self.measuring))
        self.reached[worker] = index + 1
        if (worker, id(m)) not in self.met:
            self.met.add((worker, id(m)))
            seconds += m.first_measure_s if self.measuring else m.first_quantize_s
        return seconds + m.rest_s(self.measuring)

    def way(self, worker: int, index: int) -> float:
        """Until the states are at the module and its weights on the GPU: from where the worker is, or from the start."""
        reader = self.readers.setdefault(worker, Reader([m.load_s for m in self.chain]))
        now = self.virtual.clock
        here = self.reached.get(worker, 0)
        for k in range(here if here <= index else 0, index):
            now = reader.load(k, now) + self.chain[k].pass_s(self.measuring)
        return reader.load(index, now) - self.virtual.clock

    def front(self) -> dict[str, float]:
        """Whoever works on the last module has gone through all others, or been brought there."""
        if self.sweeps:
            return {"sweep": max(s.seconds for s in self.sweeps.values())}
        reader, now = Reader([m.load_s for m in self.chain]), 0.0
        forward = [m.pass_s(self.measuring) for m in self.chain]
        for index, seconds in enumerate(forward):
            now = reader.load(index, now) + seconds
        return {"forward": sum(forward), "loading": now - sum(forward)}


def source_modules(costs: Costs, model: ModelCosts, workers: int, measuring: bool) -> Result:
    """One pass on reference states; with several bitrates the same, solving as often."""
    return SourceModules(costs, model, measuring, workers).run()


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
    return {"forward": forward * m.group, "solve": solving * m.group, "exchange": exchange}


def waits(costs: Costs, model: ModelCosts, size: int) -> list[float]:
    """Seconds that a group waits for each module's weights, which it reads during the module before."""
    chain = model.chain()
    work = [sum(step(costs, model, m, size).values()) for m in chain]
    return [max(0.0, m.load_s - before) for m, before in zip(chain, [0.0, *work], strict=False)]


def chains(costs: Costs, model: ModelCosts, workers: int, bitrates: int = 1) -> Result:
    """Bitrates in groups of at most SHARES workers, which take in those that have become free between two modules."""
    chain = model.chain()
    first = sum(m.first_chain_s for m in model.modules.values())  # all groups at the same time, at the start
    by_size: dict[int, list[float]] = {}

    def seconds(size: int) -> list[float]:
        if size not in by_size:
            pairs = zip(chain, waits(costs, model, size), strict=True)
            by_size[size] = [sum(step(costs, model, m, size).values()) + wait for m, wait in pairs]
        return by_size[size]

    def script(worker: int, part: Pass) -> Iterator[tuple[float, Any]]:
        assert isinstance(part, ChainPass)
        bits, size = part.choices.bits, part.meeting.size
        yield costs.driver_s, Begun("join", part.modules[0], "join", bits, together=size > 1)
        yield 0.0, Ready("join", 0.0)
        for index in part.modules:
            if index >= virtual.ends.get(worker, NOWHERE):
                return
            yield 0.0, Begun("chain", index, str(index), bits, together=size > 1)
            took = seconds(size)[index]
            told = ItemResult(index, str(index), took, "", {}, bits) if part.meeting.rank == 0 else Ready("chain", took)
            yield took, told

    virtual = VirtualWorkers(workers, script, poll=False)
    items = [Item(i, str(i), 1.0) for i in range(len(chain))]
    work = Sequential([(Choices(float(b), {}, ()), items) for b in range(bitrates)], virtual, ENDLESS, lambda r: None)
    Supervisor(virtual, ENDLESS).run(work)
    size = max(1, min(SHARES, workers // bitrates))
    path = {"load": sum(waits(costs, model, size)), "forward": 0.0, "solve": 0.0, "exchange": 0.0, "first": first}
    for m in chain:
        for what, took in step(costs, model, m, size).items():
            path[what] += took
    return Result(first + virtual.clock, {**path, "driver": costs.driver_s})
