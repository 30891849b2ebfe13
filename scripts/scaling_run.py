"""One conversion of `scaling.py`: what it took, told from its events, and digests of what came out."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from exl2ray.convert import convert
from exl2ray.events import Silent
from exl2ray.formats.files import sha256_of
from exl2ray.recipe import Recipe
from exl2ray.store.event_log import read_events
from exl2ray.store.open import open_store

SINGLE = (4.0,)


@dataclass(frozen=True)
class Run:
    model: str
    work: str  # measure, reference, quantized or ladder
    gpus: int


@dataclass(frozen=True)
class Call:
    """One call on a worker, as the event log tells it."""

    method: str
    key: str
    worker: str
    seconds: float
    received: int


@dataclass(frozen=True)
class Figure:
    """What a run took. Seconds: of the stages, without the start of Ray and its workers, and without writing models.

    start_s: Ray and workers; write_s: shards, as far as they were not written meanwhile; total_s: everything. driver_s: time
    within ``seconds`` without any call in flight. busy: share of the workers' time that they had a call. moved_gb: what came
    to workers from other workers. items: every module that was finished, (key, seconds, GB received).
    """

    run: Run
    seconds: float
    start_s: float
    write_s: float
    total_s: float
    driver_s: float
    busy: float
    moved_gb: float
    items: tuple[tuple[str, float, float], ...]
    calls: tuple[Call, ...]
    digests: dict[str, str] = field(default_factory=dict)


class Recorder(Silent):
    """Keeps events with their times; tells of warnings at once."""

    def __init__(self, warn: Any) -> None:
        super().__init__()
        self.times: list[float] = []
        self._warn = warn

    def event(self, name: str, **fields: Any) -> None:
        super().event(name, **fields)
        self.times.append(time.monotonic())
        if name in ("warning", "error"):
            self._warn(str(fields.get("message")))

    def time_of(self, name: str, compiling: bool, last: bool = False) -> float | None:
        """When the first or last event of this name, of a stage that writes models or another one, came."""
        found = [
            t for t, (n, f) in zip(self.times, self.events, strict=True)
            if n == name and str(f.get("stage", "")).startswith("compile") == compiling
        ]  # fmt: skip
        return (found[-1] if last else found[0]) if found else None


def execute(
    run: Run, model: Path, place: Path, measurement: Path | None, options: dict[str, Any], warn: Any,
    events: Path | None = None,
) -> Figure:
    """Converts ``model`` in a new directory of ``place``, which is removed again.

    A measurement is left as ``place/NAME-measurement-GPUS.json``. options: further fields of the recipe, Ray's address too.
    events: where to put the event log, MODEL-WORK-GPUS.jsonl.
    """
    work, out = place / "work", place / "out"
    clear(work, out)
    kept = place / f"{run.model}-measurement-{run.gpus}.json"
    measuring = run.work == "measure"
    recipe = Recipe(
        in_dir=str(model), out_dir=str(work), gpus=run.gpus, executor="ray",
        propagate="reference" if run.work == "reference" else "quantized", evaluate="never",
        measurement=None if measuring else str(measurement), output_measurement=str(kept) if measuring else None,
        compile_full=None if measuring else f"{out}/{{bpw}}", shard_size=1024, **{"bits": SINGLE, **options},
    )  # fmt: skip
    recorder = Recorder(warn)
    begin = time.monotonic()
    try:
        convert(recipe, recorder)
        end = time.monotonic()
        log, _ = read_events(open_store(str(work)))
        if events is not None:
            events.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(e) + "\n" for e in log)
            (events / f"{run.model}-{run.work}-{run.gpus}.jsonl").write_text(text, encoding="utf-8")
        digests = digests_of([(kept.name.replace(f"-{run.gpus}.", "."), kept)] if measuring else files_of(out))
    finally:
        clear(work, out)
    first, last = recorder.time_of("stage", False), recorder.time_of("end", False, True)
    if first is None or last is None:
        raise RuntimeError(f"{run}: the conversion had nothing to do")
    written = recorder.time_of("end", True, True)
    calls, covered, worked = calls_of(log)
    items = [(f["key"], f["seconds"], f["received"] / 1e9) for f in (e["fields"] for e in log if e["name"] == "item")]
    return Figure(
        run=run, seconds=last - first, start_s=first - begin, write_s=max(0.0, (written or last) - last),
        total_s=end - begin, driver_s=max(0.0, last - first - covered), busy=worked / run.gpus / (last - first),
        moved_gb=sum(c.received for c in calls) / 1e9, items=tuple(items), calls=tuple(calls), digests=digests,
    )  # fmt: skip


def calls_of(log: Sequence[dict[str, Any]]) -> tuple[list[Call], float, float]:
    """(finished calls, seconds in which a call was in flight, seconds of all calls) of an event log."""
    calls: list[Call] = []
    began: dict[str, float] = {}  # worker -> when
    covered = worked = since = 0.0
    for event in log:
        name, f = event["name"], event["fields"]
        now = datetime.fromisoformat(str(event["time"]).replace("Z", "+00:00")).timestamp()
        if name == "started":
            since = since if began else now
            began[f["worker"]] = now
        elif name in ("finished", "lost"):
            ended = [f["worker"]] if name == "finished" else list(began)  # a loss does not tell of whom; none is expected
            worked += sum(now - began.pop(w) for w in ended if w in began)
            covered += 0.0 if began else now - since
        if name == "finished":
            calls.append(Call(f["method"], f["key"], f["worker"], f["seconds"], f["received"]))
    return calls, covered, worked


def files_of(directory: Path) -> list[tuple[str, Path]]:
    return [(str(p.relative_to(directory)), p) for p in sorted(directory.rglob("*")) if p.is_file()]


def digests_of(files: Sequence[tuple[str, Path]]) -> dict[str, str]:
    """SHA-256 by name."""
    with ThreadPoolExecutor(8) as pool:
        return dict(zip([name for name, _ in files], pool.map(sha256_of, [path for _, path in files]), strict=True))


def clear(*directories: Path) -> None:
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)
