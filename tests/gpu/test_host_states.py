"""States that have no room on a GPU: the same bytes, wherever they are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from tiny_models import write_model

from exl2ray.convert import convert
from exl2ray.events import Silent
from exl2ray.quant import rows
from exl2ray.quant.rows import room_for_states
from exl2ray.recipe import Recipe
from exl2ray.team import runner as runner_module

GPU = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("quality", ["reference", "balanced"])
def test_states_in_main_memory_give_the_same_model(
    quality: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring, the backward pass and quantising on both kinds of states."""
    model = write_model(tmp_path / "model")

    def made(name: str) -> list[str]:
        out = tmp_path / name
        work = tmp_path / f"{name}-work"
        settings = {"length": 128, "measurement_length": 128, "device": "cuda", "evaluate": "never", "executor": "inline"}
        convert(Recipe(str(model), str(work), (4.0,), compile_full=str(out), quality=quality, **settings), Silent())
        files = [work / "measurement.json", *sorted(out.glob("*.safetensors"))]
        return [hashlib.sha256(f.read_bytes()).hexdigest() for f in files]

    on_gpu = made("gpu")
    monkeypatch.setattr(runner_module, "states_fit", lambda *given, **more: False)
    assert made("host") == on_gpu


@pytest.mark.gpu
def test_what_leaves_the_gpu_is_page_locked() -> None:
    assert room_for_states((16, 128, 64), torch.float16, torch.device("cpu"), GPU).is_pinned()
    assert not room_for_states((17, 128, 64), torch.float16, torch.device("cpu"), GPU).is_pinned()
    assert room_for_states((16, 128, 64), torch.float16, GPU, GPU).is_cuda


def test_without_page_locked_memory_it_is_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, empty = [], torch.empty

    def without(*shape: int, pin_memory: bool = False, **more: object) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise RuntimeError("the system has none")
        return empty(*shape, **more)  # type: ignore[call-overload,no-any-return]

    monkeypatch.setattr(rows.torch, "empty", without)
    found = room_for_states((16, 128, 64), torch.float16, torch.device("cpu"), GPU)
    assert (asked, tuple(found.shape), found.dtype) == ([True, False], (16, 128, 64), torch.float16)
    asked.clear()
    room_for_states((16, 128, 64), torch.float16, torch.device("cpu"), torch.device("cpu"))
    assert asked == [False]
