"""The driver on scripted workers and a clock of its own: losses, poison, memory, deadlines, groups, late comers, signals."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from virtual_workers import VirtualWorkers

from exl2ray.driver.independent import PASSING, Independent, Item, cut
from exl2ray.driver.policy import Limits, Lost
from exl2ray.driver.sequential import Sequential
from exl2ray.driver.supervise import Supervisor
from exl2ray.errors import ClusterError, NumericError, StoreError
from exl2ray.team.messages import (
    Begun,
    ChainPass,
    Choices,
    GroupBroken,
    ItemResult,
    MeasurePass,
    Pass,
    Ready,
    WorkerOutOfMemory,
)

QUICK = Limits(first=500, floor=50, rest=0.01, grace=5, patience=5)
ENDLESS = Limits(losses=10**6, rest=1e-6)
Faults = Callable[[int, Begun], Any]  # what goes wrong when this worker begins this; None: nothing


def fine(worker: int, begun: Begun) -> Any:
    return None


class Measuring:
    """Modules 1 to ``count`` on scripted workers. seconds(worker, index) of measuring one; passing as a share of that."""

    def __init__(
        self, count: int, workers: int, fault: Faults = fine, limits: Limits = QUICK, together: bool = False,
        seconds: Callable[[int, int], float] = lambda worker, index: 1.0, look_up: Any = lambda begun: None,
    ) -> None:  # fmt: skip
        self.count, self.fault, self.seconds = count, fault, seconds
        self.done: list[int] = []
        self.begun: dict[int, list[Begun]] = {}  # by worker
        self.passes: list[tuple[int, MeasurePass]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.workers = VirtualWorkers(workers, self.script)
        self.reached: dict[int, int] = {}
        items = [Item(i, f"module {i}", seconds(0, i)) for i in range(1, count + 1)]
        self.work = Independent(
            items, self.make, self.workers, lambda r: self.done.append(r.index), look_up, PASSING["measure"], together
        )
        tell = lambda name, **fields: self.events.append((name, fields))  # noqa: E731
        self.supervisor = Supervisor(self.workers, limits, tell)

    def make(self, indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> MeasurePass:
        hashes = dict.fromkeys(indices, "ab" * 16)
        return MeasurePass(modules=indices, hashes=hashes, stretches=stretches, keep_from=keep_from)

    def script(self, worker: int, part: Pass) -> Iterator[tuple[float, Any]]:
        """As `exl2ray.team.source_passes`: one thing after another, up to where the driver has it end."""
        assert isinstance(part, MeasurePass)
        self.passes.append((worker, part))
        if part.stretches:
            begun = Begun("sweep", -1, "sweep", together=True)
            yield from self.saying(worker, begun)
            yield 1.0, Ready("sweep", 1.0)
        for index in part.modules:
            if index >= self.workers.ends.get(worker, 1 << 60):
                return
            here = self.reached.get(worker, 1) if not part.stretches else index
            way = index - (here if here <= index else 1)
            begun = Begun("measure", index, f"module {index}", passed=way)
            yield from self.saying(worker, begun)
            self.reached[worker] = index + 1
            seconds = self.seconds(worker, index) * (1 + PASSING["measure"] * way)
            yield seconds, ItemResult(index, begun.key, seconds, "", {})

    def saying(self, worker: int, begun: Begun) -> Iterator[tuple[float, Any]]:
        self.begun.setdefault(worker, []).append(begun)
        yield 0.0, begun
        fault = self.fault(worker, begun)
        if fault is not None:
            yield 0.1, fault

    def run(self) -> float:
        """Until everything is done, once; seconds."""
        self.supervisor.run(self.work)
        assert sorted(self.done) == list(range(1, self.count + 1))
        return self.workers.clock

    def told(self, name: str) -> list[dict[str, Any]]:
        return [fields for n, fields in self.events if n == name]


# ---- independent modules ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6), st.booleans())
def test_every_module_is_done_once_whatever_is_lost(count: int, workers: int, seed: int, together: bool) -> None:
    choice = random.Random(seed)

    def fault(worker: int, begun: Begun) -> Any:
        faults = [Lost("killed"), StoreError("disk full"), GroupBroken("gone") if begun.together else Lost("killed")]
        return choice.choice(faults) if choice.random() < 0.25 else None

    Measuring(count, workers, fault, ENDLESS, together).run()


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 40), st.integers(1, 5))
@example(23, 5)
def test_workers_go_straight_on(count: int, workers: int) -> None:
    """Every module is done, and told of, once; most follow the one that the same worker had before. A module that a worker
    begins in the moment in which another one takes it over is begun twice: the driver hears of it too late."""
    m = Measuring(count, workers)
    m.run()
    taken = [[b.index for b in own] for own in m.begun.values()]
    begun = list(itertools.chain(*taken))
    assert set(begun) == set(range(1, count + 1))
    assert len(begun) <= count + workers
    jumps = sum(b != a + 1 for own in taken for a, b in itertools.pairwise(own))
    assert jumps <= workers * (3 + count.bit_length())


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 120), st.integers(2, 16), st.floats(1.0, 4.0))
@example(120, 8, 1.33)
@example(119, 2, 3.0)
def test_a_slow_worker_is_helped(count: int, workers: int, slower: float) -> None:
    """The end is near the best that these workers could do, and never later than without help."""
    m = Measuring(count, workers, seconds=lambda worker, index: slower if worker == 0 else 1.0)
    took = m.run()
    ideal = count / (workers - 1 + 1 / slower)
    way = PASSING["measure"] * count
    assert took <= ideal + way + 3 * slower  # (119, 2, 3.0) needs 2.3


def test_a_worker_that_joins_late_gets_modules_at_once() -> None:
    """In the middle of a pass, from the end of what another one has in front of it."""
    m = Measuring(20, 2)
    m.workers.absent = {1}

    def tick() -> None:
        if m.workers.clock >= 4:
            m.workers.absent.clear()

    m.supervisor.run(m.work, tick)
    assert sorted(m.done) == list(range(1, 21))
    assert 6 <= len(m.begun[1]) <= 9
    assert m.workers.clock < 15


def test_workers_of_one_machine_begin_together() -> None:
    """One call each, told where everybody's stretch begins; a machine that takes all of them down is one loss."""
    m = Measuring(16, 3, together=True)
    m.run()
    first = [part for _, part in m.passes[:3]]
    assert [p.meeting.rank for p in first] == [0, 1, 2]
    assert len({p.stretches for p in first}) == 1
    assert [i for stretch in first[0].stretches for i in stretch] == list(range(1, 17))
    assert max(map(len, first[0].stretches)) == 6
    assert [p.modules for p in first] == list(first[0].stretches)
    assert all(not p.stretches for _, p in m.passes[3:])


MACHINES = [("aabb", [2, 2]), ("abab", [2, 2]), ("aaab", [1, 3]), ("a" * 12, [4, 8]), ("abc", [])]


@pytest.mark.parametrize(("names", "sizes"), MACHINES, ids=lambda x: str(x))
def test_workers_of_several_machines_begin_as_a_group_each(
    monkeypatch: pytest.MonkeyPatch, names: str, sizes: list[int]
) -> None:
    """Groups follow one another along the model, and whoever is alone on a machine goes first."""
    m = Measuring(60, len(names), together=True)
    monkeypatch.setattr(m.workers, "name", lambda worker: f"{names[worker]}:{worker}")
    m.run()
    first = {worker: part for worker, part in reversed(m.passes)}
    assert sorted(i for part in first.values() for i in part.modules) == list(range(1, 61))
    teams = {part.stretches for part in first.values() if part.stretches}
    assert sorted(len(t) for t in teams) == [n for n in sizes if n > 1]
    for stretches in teams:
        members = {names[w] for w, part in first.items() if part.stretches == stretches}
        assert len(members) == 1
        modules = [i for stretch in stretches for i in stretch]
        assert modules == list(range(modules[0], modules[-1] + 1))
    alone = [part.modules[0] for part in first.values() if not part.stretches]
    assert (1 in alone) == (len(teams) < len(set(names)))


def test_a_group_with_a_longer_way_gets_less() -> None:
    def way(starts: Sequence[int]) -> float:
        return 0.5 * starts[2] / 2 if len(starts) > 2 else 0.0

    first = cut([1.0] * 40, 4)
    assert [len(r) for r in first] == [10] * 4
    sizes = [len(r) for r in cut([1.0] * 40, 4, way)]
    assert sum(sizes) == 40
    assert sizes[0] - sizes[-1] == pytest.approx(0.5 * 22 / 2, abs=2)


@pytest.mark.parametrize("loss", [Lost("killed"), WorkerOutOfMemory("GPU memory"), GroupBroken("gone")], ids=repr)
def test_a_group_that_fails_at_the_start_is_left_out(loss: Any) -> None:
    """One member fails, the others wait for it for ever: they are ended, and work goes on without a group."""

    def fault(worker: int, begun: Begun) -> Any:
        if begun.method != "sweep":
            return None
        if worker == 1:
            m.workers.asleep |= {0, 2}
            return loss
        return None

    m = Measuring(9, 3, fault, together=True)
    m.run()
    assert sorted(m.workers.killed) == [0, 2]
    assert [b.method for own in m.begun.values() for b in own].count("sweep") == 3
    assert len(m.told("lost")) == isinstance(loss, Lost)


def test_what_was_committed_before_a_loss_is_found() -> None:
    """And not done again."""

    def found(begun: Begun) -> ItemResult:
        return ItemResult(begun.index, begun.key, 1.0, "", {})

    m = Measuring(4, 1, lambda w, b: Lost("killed") if b.index == 2 else None, look_up=found)
    m.run()
    assert [f["key"] for f in m.told("found")] == ["module 2"]
    assert [b.index for b in m.begun[0]] == [1, 2, 3, 4]


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40), st.integers(1, 8))
def test_stretches_are_as_even_as_can_be(costs: list[float], count: int) -> None:
    pieces = cut(costs, count)
    assert [i for piece in pieces for i in piece] == list(range(len(costs)))
    assert len(pieces) == min(count, len(costs))
    worst = max(sum(costs[i] for i in piece) for piece in pieces)

    def least(first: int, runs: int) -> float:  # by trying everything
        key = (first, runs)
        if key not in known:
            ends = range(first + 1, len(costs) - runs + 2)
            known[key] = sum(costs[first:]) if runs == 1 else min(max(sum(costs[first:e]), least(e, runs - 1)) for e in ends)
        return known[key]

    known: dict[tuple[int, int], float] = {}
    assert worst <= least(0, len(pieces)) * (1 + 1e-6)


# ---- faults -----------------------------------------------------------------------------------------------------------


def test_a_module_that_loses_three_workers_stops_the_job() -> None:
    m = Measuring(3, 2, lambda w, b: Lost("signal 9") if b.index == 2 else None)
    with pytest.raises(ClusterError, match=r"module 2 .* lost its workers 3 times; the last time: signal 9") as error:
        m.run()
    assert "the logs" in error.value.hint


def test_a_defect_is_raised_at_once() -> None:
    m = Measuring(3, 1, lambda w, b: NumericError("module 1: NaN"))
    with pytest.raises(NumericError, match="NaN"):
        m.run()
    assert len(m.begun[0]) == 1


@pytest.mark.parametrize("times", [1, 2, 4])
def test_out_of_memory_is_tried_again_with_ever_smaller_batches(times: int) -> None:
    shrinks: list[int] = []

    def fault(worker: int, begun: Begun) -> Any:
        if begun.index != 2:
            return None
        shrinks.append(next(p for w, p in reversed(m.passes) if w == worker).shrink.get(begun.key, 1))
        return WorkerOutOfMemory("the GPU ran out of memory") if len(shrinks) <= times else None

    m = Measuring(3, 2, fault)
    if times == 4:
        with pytest.raises(WorkerOutOfMemory):
            m.run()
    else:
        m.run()
    assert shrinks == [1, 4, 16, 64][: times + 1]


def test_a_full_disk_on_one_machine_leaves_the_work_to_the_others() -> None:
    m = Measuring(8, 2, lambda w, b: StoreError("disk full") if w == 0 else None, Limits(rest=2.0))
    m.run()
    assert len(m.begun[0]) <= 3


def test_a_full_disk_everywhere_is_reported_as_such() -> None:
    with pytest.raises(StoreError, match="disk full"):
        Measuring(2, 2, lambda w, b: StoreError("disk full")).run()


def test_a_hung_worker_is_killed_at_its_deadline() -> None:
    """From what other modules took; what it had finished stays."""

    def fault(worker: int, begun: Begun) -> Any:
        if begun.index == 5 and not m.workers.killed:
            m.workers.asleep.add(worker)
        return None

    m = Measuring(6, 2, fault)
    assert 50 < m.run() < 60
    assert len(m.workers.killed) == 1
    assert [f["key"] for f in m.told("lost")] == ["module 5"]
    assert "no answer for" in m.told("lost")[0]["reason"]


def test_a_worker_that_hangs_before_it_begins_is_killed_too() -> None:
    m = Measuring(2, 1)
    m.workers.asleep = {0}
    assert m.run() < 60
    assert m.workers.killed == [0]


# ---- chains -----------------------------------------------------------------------------------------------------------


class Chains:
    """Bitrates of ``count`` modules each on scripted workers; a module takes as many seconds as its group is small."""

    def __init__(self, bits: int, count: int, workers: int, fault: Faults = fine, limits: Limits = QUICK) -> None:
        self.count, self.fault = count, fault
        self.groups: list[tuple[float, tuple[int, ...]]] = []  # bits and first module of each part
        self.sizes: list[int] = []
        self.done: list[tuple[float, int]] = []
        self.workers = VirtualWorkers(workers, self.script)
        items = [Item(i, f"module {i}", 1.0) for i in range(1, count + 1)]
        chains = [(Choices(float(b), {}, ()), items) for b in range(bits)]
        self.work = Sequential(chains, self.workers, limits, lambda r: self.done.append((r.bits or 0.0, r.index)))
        self.supervisor = Supervisor(self.workers, limits)
        self.expected = [(float(b), i) for b in range(bits) for i in range(1, count + 1)]

    def script(self, worker: int, part: Pass) -> Iterator[tuple[float, Any]]:
        assert isinstance(part, ChainPass)
        bits, size = part.choices.bits, part.meeting.size
        if part.meeting.rank == 0:
            self.groups.append((bits, part.modules))
            self.sizes.append(size)
        for method, index in [("join", part.modules[0]), *(("chain", i) for i in part.modules)]:
            if method == "chain" and index >= self.workers.ends.get(worker, 1 << 60):
                return
            begun = Begun(method, index, f"module {index}", bits, together=size > 1)
            yield 0.0, begun
            fault = self.fault(worker, begun)
            if fault is not None:
                yield 0.1, fault
            result = ItemResult(index, begun.key, 1.0, "", {}, bits)
            yield 1.0 / size, (result if method == "chain" and part.meeting.rank == 0 else Ready(method, 1.0 / size))

    def run(self) -> None:
        self.supervisor.run(self.work)
        assert sorted(self.done) == self.expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 10), st.integers(0, 10**6))
def test_every_module_of_every_chain_is_done_in_order(bits: int, count: int, workers: int, seed: int) -> None:
    """Whatever is lost: the others of its group say that it is broken."""
    choice = random.Random(seed)

    def fault(worker: int, begun: Begun) -> Any:
        return choice.choice([Lost("killed"), GroupBroken("gone")]) if choice.random() < 0.1 else None

    c = Chains(bits, count, workers, fault, Limits(losses=10**6, grace=2, patience=5))
    with contextlib.suppress(ClusterError):  # a group that breaks five times in a row without a loss
        c.run()
    for b in range(bits):
        own = [index for found, index in c.done if found == b]
        assert own == sorted(own)


def test_bitrates_share_the_workers_out() -> None:
    c = Chains(3, 6, 8)
    c.run()
    assert sorted(c.sizes[:3]) == [2, 3, 3]


def test_a_group_takes_in_workers_that_have_become_free() -> None:
    c = Chains(2, 6, 4, lambda w, b: None)
    c.work._todo[1] = (c.work._todo[1][0], c.work._todo[1][1][:2])  # the second one is shorter
    c.supervisor.run(c.work)
    assert c.sizes[:2] == [2, 2]
    assert c.sizes[2:] == [4]
    assert c.workers.clock < 5


def test_after_a_loss_the_survivors_wait_a_little_for_a_replacement() -> None:
    lost: list[int] = []

    def fault(worker: int, begun: Begun) -> Any:
        if begun.method == "chain" and begun.index == 2 and worker == 1 and not lost:
            lost.append(worker)
            c.workers.absent.add(1)
            return Lost("killed")
        return GroupBroken("gone") if begun.method == "chain" and begun.index == 2 and len(c.sizes) == 1 else None

    c = Chains(1, 4, 2, fault, Limits(patience=7.0, grace=3.0))
    c.run()
    assert c.sizes == [2, 1]
    assert c.workers.clock >= 7.0


def test_a_group_that_hangs_is_killed_at_the_deadline_of_its_module() -> None:
    """All wait for the one that hangs. Members are ready with a module after the first of them has finished it."""

    def fault(worker: int, begun: Begun) -> Any:
        if begun.method == "chain" and begun.index == 4 and not c.workers.killed:
            c.workers.asleep.add(worker)
        return None

    def tick() -> None:
        assert c.workers.clock < 200, "nobody is killed"

    c = Chains(1, 5, 2, fault)
    c.supervisor.run(c.work, tick)
    assert sorted(c.done) == c.expected
    assert c.workers.killed


def test_a_group_that_cannot_work_together_is_reported() -> None:
    c = Chains(1, 3, 2, lambda w, b: GroupBroken("no route to host") if b.method == "join" else None)
    with pytest.raises(ClusterError, match="cannot work together"):
        c.run()
    assert len(c.sizes) == 5


# ---- signals ----------------------------------------------------------------------------------------------------------


def test_the_first_interrupt_waits_for_the_modules_in_hand() -> None:
    before = signal.getsignal(signal.SIGINT)

    def fault(worker: int, begun: Begun) -> Any:
        if begun.index == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return None

    m = Measuring(50, 2, fault)
    with pytest.raises(KeyboardInterrupt):
        m.run()
    assert not m.workers.calls
    assert 5 in m.done
    assert len(m.done) <= 11
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_ends_at_once() -> None:
    def fault(worker: int, begun: Begun) -> Any:
        m.workers.asleep = {0}
        return None

    m = Measuring(3, 1, fault)
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(1)
        if len(ticks) in (5, 9):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        m.supervisor.run(m.work, tick)
    assert len(ticks) == 9
    assert m.workers.calls
