"""Where the workers compute, and what counts as a resumed job."""

from __future__ import annotations

import pytest
import torch

from exl2ray.config import Recipe
from exl2ray.errors import UsageError
from exl2ray.steps import pick_device


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
