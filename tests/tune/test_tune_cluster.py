"""Tuning by several workers of a private Ray: the same bytes whatever their number, and whoever is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tune_run import same, settings

from exl2ray.driver.actors import RayWorkers
from exl2ray.events import Silent
from exl2ray.tune.run import tune
from exl2ray.tune.settings import Where

pytestmark = pytest.mark.cluster
Pairs = Callable[..., tuple[Path, Path]]
FEW: dict[str, Any] = {"tokens": 16384, "checkpoint_seconds": 0.001}


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[RayWorkers]:
    """The workers of tunings, newest last; they claim little, so that two cores are enough for four of them."""
    found: list[RayWorkers] = []

    def open_workers(setup: Any, make: Any, executor: str, workers: Any = None, address: Any = None) -> RayWorkers:
        found.append(RayWorkers(setup, make, workers, address, claim={"num_cpus": 0.25}))
        return found[-1]

    monkeypatch.setattr("exl2ray.tune.driving.open_workers", open_workers)
    return found


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_the_same_bytes_by_one_to_four_workers(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, family: str, request: pytest.FixtureRequest
) -> None:
    tune(settings(pair, text, tmp_path / "alone", family, **FEW), torch.device("cpu"), Silent())
    opened = request.getfixturevalue("opened")
    for workers in (2, 3, 4):
        out = tmp_path / f"by-{workers}"
        streamed = workers == 3
        given = settings(pair, text, out, family, **FEW, streamed=streamed)
        tune(given, torch.device("cpu"), Silent(), where=Where("ray", workers))
        assert opened[-1].notes == []
        assert same(tmp_path / "alone", out), workers


class Killing(Silent):
    """Kills a worker, another one each time, whenever one of some steps is told."""

    def __init__(self, opened: list[RayWorkers], steps: set[int]) -> None:
        super().__init__()
        self.opened, self.steps, self.kills = opened, steps, 0

    def event(self, name: str, **fields: Any) -> None:
        super().event(name, **fields)
        if name == "item" and fields["done"] in self.steps:
            self.steps.discard(fields["done"])
            slots = [s for s in self.opened[-1]._slots.values() if s.name]
            victim = slots[self.kills % len(slots)]
            os.kill(int(victim.name.rpartition(":")[2]), signal.SIGKILL)
            self.kills += 1


def test_ten_workers_are_killed(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tune(settings(pair, text, tmp_path / "alone", **FEW), torch.device("cpu"), Silent())
    reporter = Killing(request.getfixturevalue("opened"), set(range(2, 32, 3)))
    tune(settings(pair, text, tmp_path / "killed", **FEW), torch.device("cpu"), reporter, where=Where("ray", 3))
    assert reporter.kills == 10
    assert sum("a worker was lost" in f.get("message", "") for n, f in reporter.events if n == "warning") >= 10
    assert same(tmp_path / "alone", tmp_path / "killed")
