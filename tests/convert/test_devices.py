"""Where the workers compute, and what counts as a resumed job."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import Quiet, contents, items, messages, run

from exl2ray.devices import pick_device, pick_executor
from exl2ray.driver.workers import InlineWorkers
from exl2ray.errors import UsageError
from exl2ray.recipe import Recipe
from exl2ray.team.messages import Begun, DeviceFailed, Pass
from exl2ray.team.worker import Worker


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UsageError, match="--device cuda"):
        pick_device(Recipe("m", "w", device="cuda"))


def test_a_head_node_without_gpu_drives_gpu_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device(Recipe("m", "w", device="cuda", ray_address="head:6379")).type == "cuda"
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert pick_device(Recipe("m", "w", device="cuda")).type == "cuda"
    with pytest.raises(UsageError, match="--device cuda"):
        pick_device(Recipe("m", "w", device="cuda", executor="inline"))


def test_auto_takes_what_torch_sees() -> None:
    assert pick_device(Recipe("m", "w")).type == "cpu"


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, 0, "inline"),
        ({}, 1, "inline"),
        ({}, 2, "ray"),
        ({"gpus": 1}, 2, "inline"),
        ({"gpus": 2}, 0, "ray"),
        ({"ray_address": "head:6379"}, 1, "ray"),
        ({"executor": "ray"}, 1, "ray"),
        ({"executor": "inline"}, 2, "inline"),
    ],
)
def test_one_device_needs_no_ray(
    settings: dict[str, Any], gpus: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert pick_executor(Recipe("m", "w", **settings), torch.device("cuda" if gpus else "cpu")) == expected


class Failing(Worker):
    """Its GPU fails as soon as it begins a module of a chain, or whatever ``at`` is."""

    at = "chain"

    def run(self, part: Pass) -> Iterator[Any]:
        for said in super().run(part):
            if isinstance(said, Begun) and said.method == self.at:
                raise DeviceFailed("CUDA error: an illegal memory access was encountered")
            yield said


def test_after_a_cuda_error_the_conversion_goes_on_elsewhere(
    quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process has lost its GPU: what is in the work directory is kept, the rest is done by workers."""
    started: list[str] = []

    def opened(setup: Any, make: Any, executor: str, *args: Any) -> InlineWorkers:
        started.append(executor)
        return InlineWorkers(setup, Failing if len(started) == 1 else Worker)

    monkeypatch.setattr("exl2ray.steps.job.open_workers", opened)
    settings = {"bits": (4.0, 5.0), "compile_full": str(tmp_path / "out-{bpw}")}
    _, reporter = run(quiet.model, tmp_path / "work", executor="auto", **settings)
    assert started == ["inline", "ray"]
    assert any("going on in another process" in m for m in messages(reporter, "warning"))
    assert sorted(items(reporter)) == sorted(items(quiet.reporter)), "nothing twice"
    for bits, output in quiet.outputs.items():
        assert contents(tmp_path / f"out-{bits}") == contents(output)


def test_a_cuda_error_ends_a_run_that_was_asked_to_stay_in_this_process(
    quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class FailingAtOnce(Failing):
        at = "measure"

    monkeypatch.setattr("exl2ray.steps.job.Worker", FailingAtOnce)
    with pytest.raises(DeviceFailed):
        run(quiet.model, tmp_path / "work")
