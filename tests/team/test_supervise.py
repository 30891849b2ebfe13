"""What the driver does after losses, poison, memory, deadlines and signals; on scripted workers."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest
from scripted_passes import Measuring

from exl2ray.driver.policy import Limits, Lost
from exl2ray.errors import ClusterError, NumericError, StoreError
from exl2ray.team.messages import Begun, WorkerOutOfMemory, translate


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


# ---- signals -----------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("words", ["std::bad_alloc", "[enforce fail] DefaultCPUAllocator: can't allocate memory: 8 bytes"])
def test_torch_without_main_memory_is_a_worker_out_of_memory(words: str) -> None:
    found = translate(RuntimeError(words))
    assert isinstance(found, WorkerOutOfMemory)
    assert "the host ran out of memory" in found.message
