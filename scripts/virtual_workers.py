"""Workers that only say what a script has them say, on a virtual clock: for simulations, and for tests of the driver."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from exl2ray.driver.policy import Lost
from exl2ray.driver.workers import Over
from exl2ray.team.messages import Meeting, Pass


class VirtualWorkers:
    """`exl2ray.driver.workers.Workers` on a clock of its own.

    script(worker, part): yields (seconds, said): what a worker says on its way through a pass, and how long after what it
    said before. Exceptions and Lost end the call. poll: time passes while nobody has anything to say, as deadlines need it.
    machine: how many workers share one.
    """

    def __init__(
        self, size: int, script: Callable[[int, Pass], Iterator[tuple[float, Any]]], poll: bool = True, machine: int = 1 << 30
    ) -> None:
        self.size, self._script, self.clock, self._poll, self._machine = size, script, 0.0, poll, machine
        self.notes: list[str] = []
        self.killed: list[int] = []
        self.asleep: set[int] = set()  # workers that say nothing
        self.absent: set[int] = set()  # neither idle nor starting
        self.ends: dict[int, int] = {}
        self.calls: dict[int, tuple[float, Iterator[tuple[float, Any]], Any]] = {}

    def idle(self) -> list[int]:
        return [w for w in range(self.size) if w not in self.calls and w not in self.absent]

    def starting(self) -> int:
        return 0

    def name(self, worker: int) -> str:
        return f"fake{worker // self._machine}:{worker}"

    def now(self) -> float:
        return self.clock

    def start(self, worker: int, work: Pass) -> None:
        assert worker not in self.calls
        self.ends.pop(worker, None)
        self._go_on(worker, self._script(worker, work))

    def _go_on(self, worker: int, script: Iterator[tuple[float, Any]]) -> None:
        seconds, said = next(script, (0.0, Over()))
        self.calls[worker] = (self.clock + seconds, script, said)

    def wait(self, seconds: float) -> tuple[int, Any] | None:
        ready = [w for w in self.calls if w not in self.asleep]
        worker = min(ready, key=lambda w: self.calls[w][0], default=None)
        if worker is None or (self._poll and self.calls[worker][0] > self.clock + seconds):
            self.clock += seconds
            return None
        at, script, said = self.calls.pop(worker)
        self.clock = max(self.clock, at)
        if not isinstance(said, (Over, Lost, Exception)):
            self._go_on(worker, script)
        return worker, said

    def end_before(self, worker: int, index: int) -> None:
        self.ends[worker] = index

    def kill(self, worker: int) -> None:
        self.killed.append(worker)
        self.calls.pop(worker, None)
        self.asleep.discard(worker)

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        return [Meeting(("127.0.0.1", 1), rank, len(workers)) for rank in range(len(workers))]

    def log_place(self) -> str:
        return "the logs"

    def close(self) -> None:
        self.calls.clear()
