"""Work in items that need nothing from each other: any idle worker takes the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from exl2ray.dist.items import ItemResult
from exl2ray.dist.schedule import Call, Flow


@dataclass
class Task:
    """One call. ``key`` names it for people; ``cost`` in weights, for deadlines. ``found`` looks for its result in the
    work directory after a loss. ``item`` has a field ``shrink``: the divisor of batch sizes after running out of memory.
    """

    method: str
    item: Any
    key: str
    cost: float
    on_done: Callable[[ItemResult], None]
    found: Callable[[], ItemResult | None] = lambda: None
    worker: int | None = field(default=None, init=False)
    finished: bool = field(default=False, init=False)


class Pool(Flow):
    def __init__(self, tasks: Sequence[Task]) -> None:
        super().__init__()
        self.tasks = list(tasks)

    @property
    def done(self) -> bool:
        return all(t.finished for t in self.tasks)

    def dispatch(self, idle: Sequence[int]) -> list[tuple[int, Call]]:
        waiting = [t for t in self.tasks if t.worker is None and not t.finished]
        calls = []
        for worker, task in zip(idle, waiting, strict=False):
            task.worker = worker
            item = replace(task.item, shrink=self.shrink.get(task.key, 1))
            calls.append((worker, Call(task.method, (item,), task.key, task.cost)))
        return calls

    def finished(self, worker: int, call: Call, result: Any, second: Any) -> None:
        self._finish(self._of(worker), result)

    def lost(self, worker: int, call: Call, alive: bool) -> None:
        task = self._of(worker)
        task.worker = None
        result = task.found()  # it may have been finished before the loss
        if result is not None:
            self._finish(task, result)

    def _finish(self, task: Task, result: ItemResult) -> None:
        task.finished, task.worker = True, None
        task.on_done(result)

    def _of(self, worker: int) -> Task:
        return next(t for t in self.tasks if t.worker == worker)
