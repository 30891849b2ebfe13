"""Who measures which module: stretches, help, groups of one machine, late comers; on scripted workers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scripted_passes import Measuring

from exl2ray.driver.independent import PASSING, cut
from exl2ray.driver.policy import Limits, Lost
from exl2ray.errors import StoreError
from exl2ray.team.messages import Begun, GroupBroken, ItemResult, WorkerOutOfMemory

ENDLESS = Limits(losses=10**6, rest=1e-6)


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
