"""Chains on scripted workers: order, how bitrates share workers out, groups that lose members."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted_passes import QUICK, Faults, fine
from virtual_workers import VirtualWorkers

from exl2ray.driver.independent import Item
from exl2ray.driver.policy import Limits, Lost
from exl2ray.driver.sequential import Sequential
from exl2ray.driver.supervise import Supervisor
from exl2ray.errors import ClusterError
from exl2ray.team.messages import Begun, ChainPass, Choices, GroupBroken, ItemResult, Pass, Ready


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
