"""A measuring pass of the driver on scripted workers and a clock of its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from virtual_workers import VirtualWorkers

from exl2ray.driver.independent import PASSING, Independent, Item
from exl2ray.driver.policy import Limits
from exl2ray.driver.supervise import Supervisor
from exl2ray.team.messages import Begun, ItemResult, MeasurePass, Pass, Ready

QUICK = Limits(first=500, floor=50, rest=0.01, grace=5, patience=5)
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
