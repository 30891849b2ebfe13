"""The driver's loop on fake workers: losses, poison, memory, deadlines, the window, signals."""

from __future__ import annotations

import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from dist_helpers import FakeSession
from hypothesis import example, given, settings
from hypothesis import strategies as st

from exl2ray.dist.fan import PASSING, Fan, Module, Part, stretches
from exl2ray.dist.faults import GroupBroken, WorkerOutOfMemory
from exl2ray.dist.items import ItemResult, MeasureItem, PerplexityItem
from exl2ray.dist.schedule import Limits, Scheduler
from exl2ray.dist.session import Lost, MissingArgument, Outcome
from exl2ray.errors import ClusterError, NumericError, StoreError

QUICK = Limits(first=5, floor=0.2, rest=0.01, grace=0.05, patience=0.05)


class Log:
    """Modules with one measuring part each, and what was finished."""

    def __init__(
        self, count: int, session: FakeSession, window: int = 4, ship: bool = True, limits: Limits | None = None
    ) -> None:
        self.done: list[tuple[int, tuple[int, int]]] = []
        modules = [Module(i, f"module {i}", 1.0, lambda n, i=i: self.parts(i, n)) for i in range(1, count + 1)]
        self.fan = Fan("measure", modules, session, window, ship=ship, limits=limits)

    def parts(self, index: int, count: int) -> list[Part]:
        items = [MeasureItem(index, "ab" * 16, (p, count)) for p in range(count)]
        return [Part("measure", i, lambda result, i=i: self.done.append((i.index, i.part))) for i in items]

    def complete(self, count: int) -> bool:
        """Every part of every module exactly once."""
        indices = {i for i, _ in self.done}
        sizes = {i: {p[1] for j, p in self.done if j == i} for i in indices}
        wanted = [(i, (p, n)) for i in indices for n in sizes[i] for p in range(n)]
        return indices == set(range(1, count + 1)) and sorted(self.done) == sorted(wanted)


def answer(worker: int, method: str, args: tuple[Any, ...]) -> Any:
    if method == "sweep":
        return ItemResult("sweep", 0.01, "", {})
    result = ItemResult(f"module {args[0].index}", 0.01, "", {})
    return (result, f"states after {args[0].index}") if method == "enter" else result


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(2, 6), st.integers(0, 10**6), st.booleans())
def test_every_part_is_done_once_whatever_is_lost(count: int, workers: int, window: int, seed: int, ship: bool) -> None:
    choice = random.Random(seed)

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        chance = choice.random()
        if chance < 0.15:
            return Lost("killed")
        if chance < 0.2 and len(args) > 1:
            return MissingArgument("the node is gone")
        if chance < 0.25:
            return StoreError("disk full")
        return answer(worker, method, args)

    session = FakeSession(workers, behave, seed)
    log = Log(count, session, window, ship)
    Scheduler(session, Limits(losses=10**6, rest=1e-6)).run(log.fan)
    assert log.complete(count)
    assert log.fan.peak_states <= (window + 1 if ship else 0)


def test_without_shipping_nobody_waits_for_states() -> None:
    """All workers begin at once, and no states travel but in the sweep."""
    asked: list[tuple[int, bool, int]] = []

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        if method == "enter":
            asked.append((args[0].index, args[0].ship, len(args)))
        return answer(worker, method, args)

    session = FakeSession(3, behave)
    log = Log(7, session, ship=False)
    assert {worker for worker, _ in log.fan.dispatch([0, 1, 2])} == {0, 1, 2}
    session = FakeSession(3, behave)
    log = Log(7, session, ship=False)
    Scheduler(session).run(log.fan)
    assert log.complete(7)
    assert {index for index, _, _ in asked} == set(range(1, 8))
    assert all(not ship and count == 1 for _, ship, count in asked)


@settings(max_examples=40, deadline=None)
@given(st.integers(8, 40), st.integers(1, 5), st.integers(0, 10**6))
def test_without_shipping_workers_go_straight_on(count: int, workers: int, seed: int) -> None:
    """Every module is entered by one worker; most follow the one that the same worker had before."""
    taken: dict[int, list[int]] = {}

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        if method == "enter":
            taken.setdefault(worker, []).append(args[0].index)
        return answer(worker, method, args)

    session = FakeSession(workers, behave, seed)
    log = Log(count, session, ship=False)
    Scheduler(session).run(log.fan)
    assert log.complete(count)
    whole = {i for i, (_, n) in log.done if n == 1}
    assert all(sum(i in own for own in taken.values()) == 1 for i in whole)
    jumps = sum(b != a + 1 for own in taken.values() for a, b in itertools.pairwise(own))
    assert jumps <= workers * (3 + count.bit_length())


class TimedSession(FakeSession):
    """Workers on machines of their own; the call that would end first does. seconds(worker, method, item): of a call."""

    def __init__(self, size: int, seconds: Callable[[int, str, Any], float]) -> None:
        super().__init__(size, answer)
        self._seconds, self.now = seconds, 0.0
        self._ends: dict[int, float] = {}

    def name(self, worker: int) -> str:
        return f"machine{worker}:1"

    def submit(self, worker: int, method: str, *args: Any, returns: int = 1) -> None:
        super().submit(worker, method, *args, returns=returns)
        self._ends[worker] = self.now + self._seconds(worker, method, args[0])

    def wait(self, timeout_seconds: float) -> Outcome | None:
        worker = min(self._ends, key=lambda w: self._ends[w])
        self.now = self._ends.pop(worker)
        self.asleep = set(self.calls) - {worker}
        return super().wait(timeout_seconds)


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 160), st.integers(2, 40), st.lists(st.floats(0.5, 4.0), min_size=4, max_size=4))
@example(154, 28, [1.25, 2.0, 1.5, 1.0])
def test_nobody_goes_far_to_help(count: int, workers: int, costs: list[float]) -> None:
    """States only go forward: whoever has helped with a later module would begin anew for an earlier one."""
    reached: dict[int, int] = {}
    entered: set[int] = set()
    cost = [costs[i % 4] for i in range(count + 1)]

    def seconds(worker: int, method: str, item: Any) -> float:
        if method == "measure":
            return cost[item.index] / item.part[1]
        here = reached.get(worker, 1)
        way = PASSING["measure"] * sum(cost[here if here <= item.index else 1 : item.index])
        assert item.index not in entered or way <= cost[item.index] / 2 + 1e-9
        reached[worker] = item.index + 1
        entered.add(item.index)
        return way + 0.1 * cost[item.index]

    log = Log(count, TimedSession(workers, seconds), ship=False)
    for module in log.fan.modules:
        module.cost = cost[module.index]
    Scheduler(log.fan.session).run(log.fan)
    assert log.complete(count)


def test_a_sweep_brings_all_workers_to_their_stretches() -> None:
    """One call each, told where everybody's stretch begins; nobody enters a module before all have answered."""
    log = Log(16, FakeSession(3, answer), ship=False)
    calls = log.fan.dispatch([0, 1, 2])
    assert [c.method for _, c in calls] == ["sweep"] * 3
    assert len({c.attempt for _, c in calls}) == 1  # a machine that takes all of them down is one loss
    items = [c.args[0] for _, c in calls]
    assert [i.meeting.rank for i in items] == [0, 1, 2]
    assert len({i.stretches for i in items}) == 1
    stretches = items[0].stretches
    assert [i for stretch in stretches for i in stretch] == list(range(1, 17))
    assert max(map(len, stretches)) == 6
    for worker, call in calls:
        assert log.fan.dispatch([0, 1, 2]) == []
        log.fan.finished(worker, call, answer(worker, "sweep", call.args), None)
    entered = {worker: c.args[0].index for worker, c in log.fan.dispatch([0, 1, 2])}
    assert entered == {rank: stretch[0] for rank, stretch in enumerate(stretches)}


def test_workers_of_several_machines_find_their_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession(3, answer)
    monkeypatch.setattr(session, "name", lambda worker: f"machine{worker % 2}:{worker}")
    log = Log(16, session, ship=False)
    assert [c.method for _, c in log.fan.dispatch([0, 1, 2])] == ["enter"] * 3
    log = Log(16, session, ship=False)
    Scheduler(session).run(log.fan)
    assert log.complete(16)


@pytest.mark.parametrize("loss", ["killed", "memory", "broken"])
def test_a_sweep_that_fails_is_left_out(loss: str) -> None:
    """Its member answers with a loss, the others wait for it for ever: they are ended, and work goes on without states."""
    swept: list[int] = []

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        if method == "sweep":
            swept.append(worker)
            outcome = {"killed": Lost("killed"), "memory": WorkerOutOfMemory("GPU memory"), "broken": GroupBroken("gone")}
            session.asleep |= {w for w in range(3) if w != worker}
            return outcome[loss]
        return answer(worker, method, args)

    session = FakeSession(3, behave)
    log = Log(9, session, ship=False, limits=QUICK)
    Scheduler(session, QUICK).run(log.fan)
    assert log.complete(9)
    assert len(swept) == 1
    assert sorted(session.killed) == [w for w in range(3) if w != swept[0]]


@settings(max_examples=60, deadline=None)
@example(6, 3, 0, 0.0)
@given(st.integers(1, 12), st.integers(1, 5), st.integers(0, 10**6), st.sampled_from([0.0, 0.1]))
def test_the_last_part_is_done_by_all_workers(count: int, workers: int, seed: int, losses: float) -> None:
    """Once, after all modules; by one worker if the others are lost."""
    choice = random.Random(seed)
    asked: list[PerplexityItem] = []
    ended: list[ItemResult] = []

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        if choice.random() < losses:
            return choice.choice([Lost("killed"), GroupBroken("gone"), StoreError("disk full")])
        if method != "perplexity":
            return answer(worker, method, args)
        assert {i for i, _ in log.done} == every
        asked.append(args[0])
        return ItemResult("perplexity", 0.01, "", {"perplexity": 2.0})

    session = FakeSession(workers, behave, seed)
    log = Log(count, session, ship=False, limits=QUICK)
    every = set(range(1, count + 1))
    item = PerplexityItem(4.0, ())
    part = Part("perplexity", item, ended.append, ready=lambda: {i for i, _ in log.done} == every, joint=True)
    log.fan.loose.append(part)
    Scheduler(session, Limits(losses=10**6, rest=1e-6, grace=0.01)).run(log.fan)
    assert log.complete(count)
    assert len(ended) == 1
    if not losses:  # whoever is still on the way to a module that others have finished is not waited for
        ranks = sorted(i.meeting.rank for i in asked)
        assert ranks == list(range(len(ranks)))
        assert {i.meeting.size for i in asked} == {len(ranks)} or len(ranks) == 1
    if (count, workers, seed, losses) == (6, 3, 0, 0.0):
        assert len(asked) == 3


@given(st.lists(st.floats(0.1, 10), min_size=1, max_size=40), st.integers(1, 8))
def test_stretches_are_as_even_as_can_be(costs: list[float], count: int) -> None:
    starts = stretches(costs, count)
    assert len(starts) == count
    assert starts[0] == 0
    assert starts == sorted(starts)
    assert all(0 <= s < len(costs) for s in starts)
    if len(costs) <= count:
        return
    assert len(set(starts)) == count
    worst = max(sum(costs[a:b]) for a, b in itertools.pairwise([*starts, len(costs)]))

    def least(first: int, runs: int) -> float:  # by trying everything
        key = (first, runs)
        if key not in known:
            ends = range(first + 1, len(costs) - runs + 2)
            known[key] = sum(costs[first:]) if runs == 1 else min(max(sum(costs[first:e]), least(e, runs - 1)) for e in ends)
        return known[key]

    known: dict[tuple[int, int], float] = {}
    assert worst <= least(0, count) * (1 + 1e-6)


@pytest.mark.parametrize("ship", [True, False])
def test_a_worker_that_vanishes_between_two_calls_is_replaced_by_the_others(ship: bool) -> None:
    """Its node went while it had nothing to do, so no call was lost. It held a module, and a stretch was in front of it."""
    log = Log(60, FakeSession(2, answer), ship=ship)
    for _ in range(1 if ship else 2):  # the sweep, then modules
        for worker, call in log.fan.dispatch([0, 1]):
            result = answer(worker, call.method, call.args)
            log.fan.finished(worker, call, *(result if call.method == "enter" else (result, None)))
    for _ in range(1000):
        if log.fan.done:
            break
        for worker, call in log.fan.dispatch([0]):
            result = answer(worker, call.method, call.args)
            log.fan.finished(worker, call, *(result if call.method == "enter" else (result, None)))
    assert log.complete(60)


def test_states_enter_the_module_that_they_belong_to() -> None:
    seen: dict[int, Any] = {}

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        if method == "enter" and len(args) > 1:
            seen[args[0].index] = (args[0].start, args[1])
        return answer(worker, method, args)

    session = FakeSession(3, behave)
    log = Log(6, session)
    Scheduler(session).run(log.fan)
    assert seen == {i: (i, f"states after {i - 1}") for i in range(2, 7)}


def test_the_window_holds_back_fast_workers() -> None:
    entered: list[int] = []

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        if method == "enter":
            entered.append(args[0].index)
        if method == "measure" and args[0].index == 1 and len(entered) < 3:
            time.sleep(0.01)
        return answer(worker, method, args)

    session = FakeSession(2, behave)
    log = Log(8, session, window=3)
    slow = {"left": 200}
    original = session.wait

    def wait(timeout_seconds: float) -> Any:
        # Whoever measures module 1 takes very long.
        for worker, (method, args, _) in session.calls.items():
            if method == "measure" and args[0].index == 1 and slow["left"]:
                slow["left"] -= 1
                session.asleep = {worker}
                break
        else:
            session.asleep = set()
        assert max(entered, default=0) - 1 < 3 or 1 in {i for i, _ in log.done}
        return original(timeout_seconds)

    session.wait = wait  # type: ignore[method-assign]
    Scheduler(session).run(log.fan)
    assert log.complete(8)
    assert slow["left"] == 0


def test_the_last_modules_are_split_between_idle_workers() -> None:
    session = FakeSession(4, answer)
    log = Log(5, session)
    Scheduler(session).run(log.fan)
    parts = {i: n for i, (_, n) in log.done}
    assert parts == {1: 1, 2: 1, 3: 2, 4: 2, 5: 4}


def test_an_item_that_loses_three_workers_stops_the_job() -> None:
    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        return Lost("signal 9") if args[0].index == 2 else answer(worker, method, args)

    session = FakeSession(2, behave)
    with pytest.raises(ClusterError, match=r"module 2 .* lost its workers 3 times; the last time: signal 9") as error:
        Scheduler(session, QUICK).run(Log(3, session).fan)
    assert "the logs" in error.value.hint


def test_a_defect_is_raised_at_once() -> None:
    calls = []

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        calls.append(method)
        raise NumericError("module 1: NaN")

    session = FakeSession(1, behave)
    with pytest.raises(NumericError, match="NaN"):
        Scheduler(session, QUICK).run(Log(3, session).fan)
    assert calls == ["enter"]


@pytest.mark.parametrize("times", [1, 2, 4])
def test_out_of_memory_is_tried_again_with_ever_smaller_batches(times: int) -> None:
    shrinks: list[int] = []

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        if method == "enter" and args[0].index == 2:
            shrinks.append(args[0].shrink)
            if len(shrinks) <= times:
                return WorkerOutOfMemory("the GPU ran out of memory")
        return answer(worker, method, args)

    session = FakeSession(2, behave)
    log = Log(3, session)
    if times == 4:
        with pytest.raises(WorkerOutOfMemory):
            Scheduler(session, QUICK).run(log.fan)
    else:
        Scheduler(session, QUICK).run(log.fan)
        assert log.complete(3)
    assert shrinks == [1, 4, 16, 64][: times + 1]


def test_a_full_disk_on_one_machine_leaves_the_work_to_the_others() -> None:
    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        return StoreError("disk full") if worker == 0 else answer(worker, method, args)

    session = FakeSession(2, behave)
    log = Log(4, session)
    Scheduler(session, QUICK).run(log.fan)
    assert log.complete(4)


def test_a_full_disk_everywhere_is_reported_as_such() -> None:
    session = FakeSession(2, lambda worker, method, args: StoreError("disk full"))
    with pytest.raises(StoreError, match="disk full"):
        Scheduler(session, QUICK).run(Log(2, session).fan)


def test_a_hung_worker_is_killed_at_its_deadline() -> None:
    session = FakeSession(2, answer)
    log = Log(6, session)
    events: list[tuple[str, dict[str, Any]]] = []
    hung: list[int] = []
    original = session.submit

    def submit(worker: int, method: str, *args: Any, returns: int = 1) -> None:
        if method == "measure" and args[0].index == 4 and not hung:
            hung.append(worker)
            session.asleep.add(worker)
        original(worker, method, *args, returns=returns)

    session.submit = submit  # type: ignore[method-assign]
    Scheduler(session, QUICK, lambda name, **fields: events.append((name, fields))).run(log.fan)
    assert session.killed == hung
    assert log.complete(6)
    assert [f["key"] for name, f in events if name == "lost"] == ["module 4"]


def test_the_first_interrupt_waits_for_work_in_flight() -> None:
    before = signal.getsignal(signal.SIGINT)
    session = FakeSession(2, answer)
    log = Log(50, session)
    original = session.wait
    waits: list[int] = []

    def wait(timeout_seconds: float) -> Any:
        waits.append(len(session.calls))
        if len(waits) == 10:
            os.kill(os.getpid(), signal.SIGINT)
        return original(timeout_seconds)

    session.wait = wait  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        Scheduler(session, QUICK).run(log.fan)
    assert not session.calls
    assert 10 <= len(waits) <= 14
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_interrupt_ends_at_once() -> None:
    session = FakeSession(1, answer)
    session.asleep = {0}
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    timer.start(), again.start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Scheduler(session, QUICK).run(Log(3, session).fan)
    assert 0.4 < time.monotonic() - start < 3
    assert session.calls
