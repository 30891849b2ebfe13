"""Where the time went, from the event log: stages, workers, and which of them had work when.

The log tells when a worker began something ("started") and when an item was complete ("item"). A worker counts as busy from
one to the other; what only prepares ("sweep", "join"; "enter" in older logs) ends when it begins the next thing.
Time in which no driver ran is left out: all times here are seconds of running.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from exl2ray.formats.json_file import as_number
from exl2ray.recipe import bpw_name
from exl2ray.report.values import mapping
from exl2ray.store.event_log import timed


@dataclass(frozen=True)
class Span:
    """A worker had this work from ``begin`` to ``end``, in seconds of running."""

    worker: str
    stage: str
    begin: float
    end: float


@dataclass(frozen=True)
class StageTime:
    """wall_seconds: from the announcement of the stage to its last item, over all runs. worker_seconds: sum of spans."""

    name: str
    finished: int  # items within the runs of the log
    wall_seconds: float
    worker_seconds: float
    workers: int

    @property
    def mean_busy(self) -> float | None:
        """Workers that had work of this stage, on average over its time."""
        return self.worker_seconds / self.wall_seconds if self.wall_seconds > 0 else None


@dataclass(frozen=True)
class Timeline:
    """All runs of a job, one after another as if nothing had been between them."""

    started: str  # time stamp of the first event, as logged
    ended: str
    runs: tuple[float, ...]  # seconds of running at which each run was opened
    seconds: float  # of running, all runs
    stages: tuple[StageTime, ...]
    spans: tuple[Span, ...]


def read_timeline(events: Iterable[Mapping[str, Any]]) -> Timeline | None:
    """None for a log without a single usable event."""
    reader = _Reader()
    for at, event in timed(events):
        reader.take(at, str(event["time"]), str(event.get("name")), mapping(event.get("fields")))
    return reader.finish()


@dataclass
class _Reader:
    first: str = ""
    last: str = ""
    clock: float | None = None  # of the last event
    now: float = 0.0  # seconds of running
    runs: list[float] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    begun: dict[str, float] = field(default_factory=dict)  # stage -> where its wall time is counted up to
    open: dict[str, tuple[str, str, float]] = field(default_factory=dict)  # worker -> (stage, key, begin)
    spans: list[Span] = field(default_factory=list)

    def take(self, at: float, stamp: str, name: str, f: Mapping[str, Any]) -> None:
        self.first = self.first or stamp
        self.last = stamp
        if name == "opened":
            self._close_all()
            self.begun.clear()
            self.runs.append(self.now)
        elif self.clock is not None:
            self.now += max(0.0, at - self.clock)  # clocks of several machines may disagree
        self.clock = at
        if name == "stage":
            self._of(str(f.get("stage")))
            self.begun[str(f.get("stage"))] = self.now
        elif name == "started":
            self._started(str(f.get("worker") or "?"), f)
        elif name == "item":
            self._item(str(f.get("stage")), str(f.get("key")))
        elif name == "lost":
            self._close(lambda stage, key: key == str(f.get("key")))

    def _of(self, stage: str) -> dict[str, float]:
        return self.stages.setdefault(stage, {"finished": 0.0, "wall": 0.0})

    def _started(self, worker: str, f: Mapping[str, Any]) -> None:
        self._close(lambda stage, key: True, worker)
        self.open[worker] = (self._stage_of(str(f.get("method")), as_number(f.get("bits"))), str(f.get("key")), self.now)

    def _stage_of(self, method: str, bits: float | None) -> str:
        """The stage that a call is for. A reference forward for several bitrates at once belongs to all of them."""
        if bits is not None:
            return f"quantize {bpw_name(bits)}"
        quantizing = any(name.startswith("quantize") for name in self.begun)
        return "quantize" if method in ("enter", "sweep") and quantizing else "measure"

    def _item(self, stage: str, key: str) -> None:
        counts = self._of(stage)
        counts["finished"] += 1
        counts["wall"] += self.now - self.begun.get(stage, self.now)
        self.begun[stage] = self.now
        self._close(lambda s, k: (s, k) == (stage, key))

    def _close(self, which: Any, worker: str | None = None) -> None:
        for name in [worker] if worker is not None else list(self.open):
            held = self.open.get(name)
            if held is not None and which(held[0], held[1]):
                del self.open[name]
                if self.now > held[2]:
                    self.spans.append(Span(name, held[0], held[2], self.now))

    def _close_all(self) -> None:
        self._close(lambda stage, key: True)

    def finish(self) -> Timeline | None:
        if self.clock is None:
            return None
        self._close_all()
        for name in dict.fromkeys(s.stage for s in self.spans):
            self._of(name)
        stages = [_stage_time(name, counts, self.spans) for name, counts in self.stages.items()]
        return Timeline(self.first, self.last, tuple(self.runs), self.now, tuple(stages), tuple(self.spans))


def _stage_time(name: str, counts: Mapping[str, float], spans: Iterable[Span]) -> StageTime:
    own = [s for s in spans if s.stage == name]
    busy = sum(s.end - s.begin for s in own)
    return StageTime(name, int(counts["finished"]), counts["wall"], busy, len({s.worker for s in own}))


def busy_share(timeline: Timeline) -> float | None:
    """Share of the workers' time, from the first to the last work of each, in which they had work; None without any."""
    held: dict[str, list[Span]] = {}
    for span in timeline.spans:
        held.setdefault(span.worker, []).append(span)
    there = sum(max(s.end for s in own) - min(s.begin for s in own) for own in held.values())
    return sum(s.end - s.begin for s in timeline.spans) / there if there > 0 else None
