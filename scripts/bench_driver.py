"""What the driver costs: no-op items per second through its queue, and its share of a tiny conversion.

    python scripts/bench_driver.py [--model DIR]

1. A thousand modules with work that does nothing, on two Ray actors: calls per second (a module is two calls).
2. A conversion of a small model on one Ray worker: the time in which no worker had anything to do, over the time from the
   first call to the last result. Appends both to docs/log.md with ``--log``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

import exl2ray.steps
from exl2ray.convert import convert
from exl2ray.dist.fan import Fan, Module, Part
from exl2ray.dist.items import EnterItem, ItemResult, MeasureItem, WorkerSetup
from exl2ray.dist.schedule import Flow, Scheduler
from exl2ray.dist.session import RaySession
from exl2ray.events import Silent
from exl2ray.recipe import Recipe

ROOT = Path(__file__).resolve().parents[1]
LEAST_ITEMS_PER_SECOND = 200
MOST_OVERHEAD = 0.02


class Idle:
    """A worker that does nothing."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.name = f"{platform.node()}:{os.getpid()}"

    def enter(self, item: EnterItem, entry: Any = None) -> tuple[ItemResult, None]:
        return ItemResult(str(item.index), 0.0, "", {}, (), self.name), None

    def measure(self, item: MeasureItem) -> ItemResult:
        return ItemResult(str(item.index), 0.0, "", {}, (), self.name)


class Timed(Scheduler):
    """Notes when any worker was busy."""

    instances: ClassVar[list[Timed]] = []

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.idle_seconds, self.run_seconds = 0.0, 0.0
        self._idle_since: float | None = None
        Timed.instances.append(self)

    def run(self, flow: Flow, tick: Any = lambda: None) -> None:
        start = time.monotonic()
        self._idle_since = None
        super().run(flow, tick)
        self.run_seconds += time.monotonic() - start
        if self._idle_since is not None:
            self.idle_seconds += time.monotonic() - self._idle_since

    def _submit(self, flow: Flow) -> None:
        super()._submit(flow)
        if self._running and self._idle_since is not None:
            self.idle_seconds += time.monotonic() - self._idle_since
            self._idle_since = None

    def _settle(self, flow: Flow, worker: int, value: Any, second: Any) -> None:
        if len(self._running) == 1:
            self._idle_since = time.monotonic()
        super()._settle(flow, worker, value, second)


def setup(work: str) -> WorkerSetup:
    return WorkerSetup("", work, "cpu", None, None, 0.1, 1e6, "", "", 1)


def items_per_second(modules: int, workers: int) -> float:
    with tempfile.TemporaryDirectory() as work:
        session = RaySession(setup(work), Idle, workers, "local", claim={"num_cpus": 0.5})
        done: list[ItemResult] = []
        made = [
            Module(i, str(i), 1.0, lambda n, i=i: [Part("measure", MeasureItem(i, "ab" * 16), done.append)])  # type: ignore[misc]
            for i in range(1, modules + 1)
        ]
        try:
            Scheduler(session).run(Fan("measure", made[:20], session, 4))  # warm up
            start = time.monotonic()
            Scheduler(session).run(Fan("measure", made[20:], session, 4))
            return 2 * (modules - 20) / (time.monotonic() - start)
        finally:
            session.close()


def overhead(model: Path) -> tuple[float, float]:
    """(share of the time without work in flight, seconds of scheduling) of a conversion on one worker."""
    exl2ray.steps.Scheduler = Timed  # type: ignore[misc]
    work = Path(tempfile.mkdtemp())
    try:
        convert(
            Recipe(str(model), str(work / "work"), compile_full=str(work / "out"), length=128, measurement_length=128,
                   device="cpu", gpus=1, ray_address="local"),
            Silent(),
        )  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    scheduler = Timed.instances[-1]
    return scheduler.idle_seconds / scheduler.run_seconds, scheduler.run_seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory for the second figure")
    parser.add_argument("--modules", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log", action="store_true", help="append the figures to docs/log.md")
    args = parser.parse_args()
    rate = items_per_second(args.modules, args.workers)
    lines = [f"{rate:.0f} calls/s through the queue, {args.workers} workers (expected >= {LEAST_ITEMS_PER_SECOND})"]
    fine = rate >= LEAST_ITEMS_PER_SECOND
    if args.model is not None:
        share, seconds = overhead(args.model)
        lines.append(
            f"driver overhead {share:.2%} of {seconds:.0f} s, {args.model.name}, one CPU worker "
            f"(expected < {MOST_OVERHEAD:.0%})"
        )
        fine = fine and share < MOST_OVERHEAD
    for line in lines:
        print(line)
    if args.log:
        machine = f"{os.cpu_count()} cores, torch {torch.__version__}"
        command = " ".join(["python", "scripts/bench_driver.py", *(a for a in sys.argv[1:] if a != "--log")])
        with (ROOT / "docs" / "log.md").open("a", encoding="utf-8") as f:
            f.write(f"\n## {datetime.date.today()} driver ({machine})\n\n`{command}`\n\n")
            f.writelines(f"* {line}\n" for line in lines)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
