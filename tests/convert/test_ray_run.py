"""The default executor: a private local Ray, one worker on the CPU, and what happens when that worker is killed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import Quiet, contents, items, logged, messages, recipe

from exl2ray.convert import convert
from exl2ray.events import Silent


class Killer(Silent):
    """Kills the worker that reports the second module, as soon as it has."""

    def __init__(self) -> None:
        super().__init__()
        self.killed: list[int] = []
        self.workers: set[int] = set()

    def event(self, name: str, **fields: Any) -> None:
        super().event(name, **fields)
        if name == "item":
            pid = int(fields["worker"].rsplit(":", 1)[1])
            self.workers.add(pid)
            if fields["done"] == 2 and not self.killed:
                self.killed.append(pid)
                os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_replaced(quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    reporter = Killer()
    settings = {"executor": "ray", "bits": (4.0, 5.0), "compile_full": str(tmp_path / "out-{bpw}")}
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    convert(recipe(quiet.model, tmp_path / "work", **settings), reporter)
    (dead,) = reporter.killed
    assert dead != os.getpid()
    assert os.getpid() not in reporter.workers
    assert len(reporter.workers) == 2, "the killed worker and the one in its place"
    assert any("lost" in m for m in messages(reporter, "warning"))
    assert logged(tmp_path / "work", "lost")
    assert sorted(items(reporter)) == sorted(items(quiet.reporter))
    for bits, output in quiet.outputs.items():
        assert contents(tmp_path / f"out-{bits}") == contents(output)
    assert (tmp_path / "work" / "measurement.json").read_bytes() == (quiet.work / "measurement.json").read_bytes()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    import ray

    assert not ray.is_initialized()
