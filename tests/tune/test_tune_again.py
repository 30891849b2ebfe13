"""The `tune` command again, otherwise than before: what was trained is not lost, and models are not written over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import exl2ray

from exl2ray.calibration.data.sources import local_source
from exl2ray.errors import JobMismatchError, SourceError, UsageError
from exl2ray.events import Silent
from exl2ray.quant.group import Comm
from exl2ray.store.fs import Store
from exl2ray.terminal.pasted import check_models, missing_folder_hint
from exl2ray.tune import state
from exl2ray.tune.run import WORK, Tuned, tune
from exl2ray.tune.settings import Settings

Pairs = Callable[..., tuple[Path, Path]]
SMALL: dict[str, Any] = {"tokens": 2048, "length": 64, "step_tokens": 512, "passes": 1, "rate": 2e-2, "gain_rate": 5e-3}


def settings(pair: Pairs, text: tuple[Path, Path], output: Path, **changes: Any) -> Settings:
    source, exl2 = pair()
    sources = tuple(local_source(str(path)) for path in text)
    return Settings(**{**SMALL, "directory": str(exl2), "reference": str(source), "output": str(output), "sources": sources,
                       **changes})  # fmt: skip


def tuned(found: Settings) -> Tuned:
    return tune(found, torch.device("cpu"), Silent())


@pytest.mark.parametrize("change", [{"tokens": 1024}, {"seed": 3}, {"length": 32}], ids=str)
def test_another_tuning_does_not_take_the_place_of_one_that_was_stopped(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """What was trained for hours is not lost to a flag that was typed otherwise; the same command goes on."""
    out, kept = tmp_path / "out", state.save

    def stopping(store: Store, comm: Comm, progress: state.Progress, *given: Any) -> None:
        kept(store, comm, progress, *given)
        if progress.step == 2:
            raise KeyboardInterrupt

    few = {"tokens": 2048, "checkpoint_seconds": 0.0}
    with monkeypatch.context() as patch:
        patch.setattr(state, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            tuned(settings(pair, text, out, **few))
    before = {p: p.read_bytes() for p in (out / WORK / state.FOLDER).iterdir()}
    with pytest.raises(JobMismatchError, match=r"holds a tuning that is not finished \(2 steps\), with other settings") as e:
        tuned(settings(pair, text, out, **{**few, **change}))
    assert f"remove {out / WORK} to begin anew" in e.value.hint
    assert {p: p.read_bytes() for p in (out / WORK / state.FOLDER).iterdir()} == before
    reporter = Silent()
    tune(settings(pair, text, out, **few), torch.device("cpu"), reporter)
    assert any("going on from step 2" in f.get("message", "") for _, f in reporter.events)


@pytest.mark.parametrize(("place", "says"), [(0, "the reference itself"), (1, "the model to be tuned itself")])
def test_the_output_is_neither_model(pair: Pairs, text: tuple[Path, Path], tmp_path: Path, place: int, says: str) -> None:
    (tmp_path / "link").symlink_to(pair()[place])
    for output in (pair()[place], tmp_path / "link", pair()[place] / "x" / ".."):
        with pytest.raises(UsageError, match=f"-o .* is {says}") as e:
            tuned(settings(pair, text, output))
        assert "delete" not in e.value.hint


def test_names_that_are_no_folder(pair: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, exl2 = map(str, pair())
    for model, reference, status, words in (
        (exl2, "hf://owner/name", 2, "--reference hf://owner/name: is an address"),
        ("hf://owner/name", source, 2, "error: hf://owner/name: is an address"),
        (exl2, "owner/name", 3, "a repository on the Hub is hf://owner/name"),
        (exl2, "~/name", 2, "--reference ~/name: does not exist as it stands"),
    ):
        exl2ray("tune", model, "--reference", reference, "-o", str(tmp_path / "out"), seconds=20).ends_with(status, words)
    (tmp_path / "home" / "model").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(SourceError, match="~/model: does not exist") as e:
        check_models("~/model")
    assert f"give {tmp_path}/home/model" in e.value.hint
    monkeypatch.chdir(tmp_path)
    assert "Hub" not in missing_folder_hint("home/gone")
