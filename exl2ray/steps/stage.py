"""What is told of a pass while it goes on: its beginning, items and end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from exl2ray import timeline
from exl2ray.quant.measure_moe import starved_experts
from exl2ray.store.pace import Pace
from exl2ray.team.messages import ItemResult

if TYPE_CHECKING:
    from exl2ray.steps.job import Job


class Stage:
    """Reports the beginning, items and end of a pass, and writes them to the event log."""

    def __init__(self, job: Job, name: str, items: int, done: int) -> None:
        self.job, self.name, self.items, self.done = job, name, items, done

    def __enter__(self) -> Stage:
        self.start = time.monotonic()
        self.pace = Pace(self.items, self.done, 1, self.start)
        self.job.reporter.event("stage", stage=self.name, items=self.items, done=self.done)
        if not self.job.began:
            self.job.began = True
            self.job.work.event("start", **timeline.taken())
        self.job.work.event("stage", stage=self.name, items=self.items, done=self.done)
        return self

    def __call__(self, result: ItemResult) -> None:
        self.job.source_state.settle()
        self.done += 1
        now, workers = time.monotonic(), self.job.workers.size
        self.pace.finished(self.done, now, result.worker, result.seconds, workers)
        fields: dict[str, Any] = {
            "stage": self.name, "key": result.key, "done": self.done, "items": self.items, "seconds": result.seconds,
            "worker": result.worker, "workers": workers, "queue": self.items - self.done,
            "eta_seconds": self.pace.eta_seconds(now),
        }  # fmt: skip
        self.job.work.event("item", **fields, received=result.received)
        self.job.reporter.event("item", **fields, detail=result.detail)
        for note in result.notes:
            self.job.reporter.event("note", message=f"{result.key}: {note}")
        starved = starved_experts(_coverage(result.payload))
        if starved:
            self.job.reporter.event("warning", message=f"{result.key}: {starved}")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.job.reporter.event("end", stage=self.name, seconds=time.monotonic() - self.start)


def _coverage(payload: Mapping[str, Any]) -> Sequence[Mapping[str, float]]:
    """Tokens per expert of a measured or quantised module; empty for a dense one."""
    extra = payload["profile"]["extra"] if "profile" in payload else payload
    experts: Sequence[Mapping[str, float]] = extra.get("experts", ())
    return experts
