"""Workers that make a group: who has met need not again, and whoever failed belongs to none any more."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from exl2ray.driver.actors import RayWorkers
from exl2ray.driver.workers import InlineWorkers, Over
from exl2ray.team.messages import Begun, Meeting, Pass, SensitivityPass, WorkerSetup


class Obedient:
    """Says that it begins, and does what the pass is called."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.end = 1 << 60

    def run(self, part: Pass) -> Iterator[Any]:
        assert isinstance(part, SensitivityPass)
        for index in count() if part.inputs_hash == "for ever" else (0,):
            if index >= self.end:
                return
            yield Begun("sensitivity", index, part.inputs_hash)
            if part.inputs_hash == "fail":
                raise ValueError("as asked for")

    def end_before(self, index: int) -> None:
        self.end = index

    def release(self) -> None:
        pass


def call(what: str) -> SensitivityPass:
    return SensitivityPass(hands={}, tokens=0, inputs_hash=what)


def answers(workers: RayWorkers, worker: int) -> list[Any]:
    """All that a worker says until its call is over."""
    said: list[Any] = []
    while not said or not isinstance(said[-1], (Over, Exception)):
        heard = workers.wait(1.0)
        if heard is not None:
            assert heard[0] == worker
            said.append(heard[1])
    return said


@pytest.fixture
def workers(cluster: Any, tmp_path: Any) -> Iterator[RayWorkers]:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    setup = WorkerSetup("", str(tmp_path), "cpu", None, None, 0.1, 1e6, "", "", 1)
    opened = RayWorkers(setup, Obedient, 2, cluster.address, claim={"num_gpus": 1, "num_cpus": 0})
    try:
        while opened.starting():
            opened.wait(0.2)
        yield opened
    finally:
        opened.close()


def test_workers_that_have_met_need_not_again(workers: RayWorkers) -> None:
    both = workers.idle()
    meetings = workers.meeting(both)
    assert [(m.rank, m.size) for m in meetings] == [(0, 2), (1, 2)]
    assert workers.meeting(both) == meetings

    workers.start(0, call("nothing"))
    assert isinstance(answers(workers, 0)[-1], Over)
    assert workers.meeting(both) == meetings
    workers.start(0, call("fail"))
    said = answers(workers, 0)
    assert [type(x) for x in said] == [Begun, ValueError]
    anew = workers.meeting(both)
    assert anew[0].serial != meetings[0].serial
    workers.kill(1)
    assert workers.meeting(both)[0].serial != anew[0].serial


def test_a_pass_that_goes_on_is_ended_from_outside(workers: RayWorkers) -> None:
    """Another thread of the actor hears it."""
    workers.start(0, call("for ever"))
    workers.end_before(0, 0)
    said = answers(workers, 0)
    assert isinstance(said[-1], Over)
    assert os.getpid() != int(workers.name(0).rpartition(":")[2])


def test_a_worker_in_this_process_is_alone() -> None:
    class Nothing:
        def __init__(self, setup: Any) -> None:
            pass

    assert InlineWorkers(None, Nothing).meeting([0]) == [Meeting()]  # type: ignore[arg-type]


def test_who_was_alone_in_between_meets_anew(workers: RayWorkers) -> None:
    """A store at which a group has met still has the addresses that its members had then."""
    both = workers.idle()
    first = workers.meeting(both)
    assert workers.meeting(both[:1]) == [Meeting()]
    again = workers.meeting(both)
    assert again[0].serial != first[0].serial
    assert workers.meeting(both[::-1])[0].serial != again[0].serial  # other ranks, another group
    assert workers.meeting(both)[0].serial != again[0].serial
