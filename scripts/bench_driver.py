"""What the driver costs: no-op modules per second, and its share of a tiny conversion.

    python scripts/bench_driver.py [--model DIR]

1. A thousand modules with work that does nothing, on two Ray actors: modules per second.
2. A conversion of a small model on one Ray worker: the time in which no worker had anything to do, over the time from the
   first call to the last result. Appends both to docs/log.md with ``--log``.
"""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch

import exl2ray.steps.job
from exl2ray.convert import convert
from exl2ray.driver.actors import RayWorkers
from exl2ray.driver.independent import Independent, Item
from exl2ray.driver.supervise import Supervisor
from exl2ray.events import Silent
from exl2ray.recipe import Recipe
from exl2ray.team.messages import Begun, ItemResult, MeasurePass, Pass, WorkerSetup

ROOT = Path(__file__).resolve().parents[1]
LEAST_ITEMS_PER_SECOND = 200
MOST_OVERHEAD = 0.02


class Idle:
    """A worker that does nothing."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.end = 1 << 60

    def run(self, part: Pass) -> Iterator[Any]:
        assert isinstance(part, MeasurePass)
        for index in part.modules:
            if index >= self.end:
                break
            yield Begun("measure", index, str(index))
            yield ItemResult(index, str(index), 0.0, "", {})
        self.end = 1 << 60

    def end_before(self, index: int) -> None:
        self.end = index


class Timed(Supervisor):
    """Notes when no worker had a call."""

    instances: ClassVar[list[Timed]] = []

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.idle_seconds, self.run_seconds, self._last = 0.0, 0.0, time.monotonic()
        Timed.instances.append(self)

    def run(self, work: Any, tick: Any = lambda: None) -> None:
        start = self._last = time.monotonic()
        super().run(work, tick)
        self.run_seconds += time.monotonic() - start

    def _enforce(self, work: Any) -> None:
        now = time.monotonic()
        if not self._calls:
            self.idle_seconds += now - self._last
        self._last = now
        super()._enforce(work)


def setup(work: str) -> WorkerSetup:
    return WorkerSetup("", work, "cpu", None, None, 0.1, 1e6, "", "", 1)


def items_per_second(modules: int, workers: int) -> float:
    """Modules that begin and end, in a second."""

    def make(indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> MeasurePass:
        return MeasurePass(modules=indices, hashes={})

    with tempfile.TemporaryDirectory() as work:
        session = RayWorkers(setup(work), Idle, workers, "local", claim={"num_cpus": 0.5})
        try:
            for count in (20, modules):  # the first to warm up
                items = [Item(i, str(i), 1.0) for i in range(1, count + 1)]
                start = time.monotonic()
                Supervisor(session).run(Independent(items, make, session, lambda result: None))
            return modules / (time.monotonic() - start)
        finally:
            session.close()


def overhead(model: Path) -> tuple[float, float]:
    """(share of the time without a call, seconds of supervising) of a conversion on one worker."""
    exl2ray.steps.job.Supervisor = Timed  # type: ignore[misc]
    work = Path(tempfile.mkdtemp())
    try:
        convert(
            Recipe(str(model), str(work / "work"), compile_full=str(work / "out"), length=128, measurement_length=128,
                   device="cpu", gpus=1, ray_address="local"),
            Silent(),
        )  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)
    supervisor = Timed.instances[-1]
    return supervisor.idle_seconds / supervisor.run_seconds, supervisor.run_seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="model directory for the second figure")
    parser.add_argument("--modules", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--log", action="store_true", help="append the figures to docs/log.md")
    args = parser.parse_args()
    rate = items_per_second(args.modules, args.workers)
    lines = [f"{rate:.0f} modules/s, {args.workers} workers (expected >= {LEAST_ITEMS_PER_SECOND})"]
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
