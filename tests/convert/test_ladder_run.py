"""Several bitrates in one job: one table, one plot, figures that `eval` would give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from convert_helpers import Quiet, messages, recipe, run
from evaluation import evaluate

from exl2ray.calibration.text import builtin_documents
from exl2ray.convert import patch
from exl2ray.errors import CalibrationError
from exl2ray.evaluate.heldout import heldout_rows, heldout_text
from exl2ray.evaluate.tokens import find_tokenizer
from exl2ray.events import Silent
from exl2ray.report.facts import read_facts
from exl2ray.terminal.console import outputs_table


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokens") / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(3, 200, (3, 64)))
    return path


def test_a_ladder_is_evaluated(quiet: Quiet, tokens: Path, tmp_path: Path) -> None:
    settings = {"bits": (4.0, 5.0), "compile_full": str(tmp_path / "out-{bpw}"), "eval_text": str(tokens)}
    summary, reporter = run(quiet.model, tmp_path / "work", evaluate="auto", **settings)
    low, high = summary.outputs
    assert low.kl is not None
    assert high.kl is not None
    assert low.kl > high.kl > 0
    alone = evaluate(low.directory or "", quiet.model, _rows(tokens), "cpu")
    assert alone.kl is not None
    assert low.kl == pytest.approx(alone.kl.value, rel=1e-6)
    assert low.heldout_perplexity == pytest.approx(alone.perplexity.value, rel=1e-6)
    stored = json.loads((tmp_path / "work" / "evaluation.json").read_text())["results"]
    assert [r["kl"]["value"] for r in stored] == [low.kl, high.kl]
    assert (tmp_path / "work" / "ladder.png").read_bytes().startswith(b"\x89PNG")
    columns, rows = outputs_table([o.__dict__ for o in summary.outputs])
    assert columns[-4:] == ["held-out perplexity", "KL", "top-1", "where"]
    assert rows[0][-3] == f"{low.kl:.4f}"
    assert any("ladder.png" in m for m in messages(reporter, "note"))


def test_finished_models_are_not_evaluated_again(quiet: Quiet, tokens: Path, tmp_path: Path) -> None:
    settings = {"bits": (4.0, 5.0), "compile_full": str(tmp_path / "out-{bpw}"), "eval_text": str(tokens)}
    first, _ = run(quiet.model, tmp_path / "work", evaluate="auto", **settings)
    files = [*tmp_path.glob("out-*/*"), tmp_path / "work" / "evaluation.json", tmp_path / "work" / "ladder.png"]
    before = {p: p.stat().st_mtime_ns for p in files}
    second, reporter = run(quiet.model, tmp_path / "work", evaluate="auto", **settings)
    assert [name for name, _ in reporter.events if name == "stage"] == []
    assert {p: p.stat().st_mtime_ns for p in files} == before
    assert second.outputs == first.outputs
    other = tmp_path / "other.npy"
    np.save(other, np.load(tokens)[:2])
    third, _ = run(quiet.model, tmp_path / "work", evaluate="auto", **{**settings, "eval_text": str(other)})
    assert third.outputs[0].kl not in (None, first.outputs[0].kl)


def test_a_resume_with_the_whole_path_evaluates_nothing_again(
    quiet: Quiet, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job that began with a relative -cf goes on with -o alone, perhaps in another folder."""
    settings = {"eval_text": str(tokens), "evaluate": "always"}
    monkeypatch.chdir(tmp_path)
    first, begun = run(quiet.model, tmp_path / "work", compile_full="out", **settings)
    assert [f["key"] for name, f in begun.events if name == "item" and f["stage"] == "evaluate"][1:] == ["out"]
    monkeypatch.chdir("work")
    second, reporter = run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"), **settings)
    assert [name for name, _ in reporter.events if name == "stage"] == []
    assert second.outputs[0].kl == first.outputs[0].kl is not None
    assert [b.evaluation is not None for b in read_facts(str(tmp_path / "work")).bitrates] == [True]


def test_what_goes_wrong_afterwards_does_not_spoil_the_conversion(quiet: Quiet, tmp_path: Path) -> None:
    bad = tmp_path / "ids.npy"
    np.save(bad, np.full((2, 8), 10**6))
    settings = {"compile_full": str(tmp_path / "out"), "eval_text": str(bad), "evaluate": "always"}
    summary, reporter = run(quiet.model, tmp_path / "work", **settings)
    assert summary.outputs[0].kl is None
    assert Path(summary.outputs[0].files[0]).is_file()
    assert any("could not be evaluated" in m for m in messages(reporter, "warning"))


def test_one_bitrate_is_not_evaluated_unless_asked(quiet: Quiet, tmp_path: Path) -> None:
    _, reporter = run(quiet.model, tmp_path / "work", evaluate="auto", compile_full=str(tmp_path / "out"))
    assert "evaluate" not in [f["stage"] for name, f in reporter.events if name == "stage"]


def test_the_held_out_text_is_no_calibration_text() -> None:
    text = heldout_text()
    assert len(text.encode()) > 40_000
    known = "\n".join(d.text for d in builtin_documents())
    lines = [line for line in text.splitlines() if len(line) > 60]
    assert not [line for line in lines if line in known]


def test_rows_of_held_out_text(quiet: Quiet) -> None:
    tokenizer = find_tokenizer([quiet.model])
    rows = heldout_rows(tokenizer, 512)
    assert rows.shape[0] >= 10
    assert rows.shape[1] == 512
    with pytest.raises(CalibrationError, match="a row takes"):
        heldout_rows(tokenizer, 10**7)


def _rows(path: Path):  # type: ignore[no-untyped-def]
    import torch

    return torch.from_numpy(np.load(path))


def test_a_plot_of_what_a_model_was_before_is_removed(quiet: Quiet, tokens: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"bits": (4.0, 5.0), "compile_full": str(tmp_path / "out-{bpw}"), "eval_text": str(tokens)}
    work, out = tmp_path / "work", tmp_path / "out-5.0"
    run(quiet.model, work, evaluate="auto", **settings)
    plot, base = work / "ladder.png", recipe(quiet.model, work, **settings)
    elsewhere, nothing, changed = Silent(), Silent(), Silent()
    patch(base, ("*.0.*.o_proj=8",), elsewhere, bits=(5.0,), compile_full=str(tmp_path / "other"))
    patch(base, (), nothing, bits=(5.0,), undo=True)
    assert plot.exists()
    assert not [m for m in messages(nothing, "note") + messages(elsewhere, "note") if "ladder.png" in m]
    patch(base, ("*.0.*.o_proj=8",), changed, bits=(5.0,))
    assert not plot.exists()
    said = next(m for m in messages(changed, "note") if "ladder.png" in m)
    assert f"evaluation.json is of {out} before this, and ladder.png is removed; again with: exl2ray convert -o" in said
    summary, _ = run(quiet.model, work, evaluate="auto", **settings)
    assert plot.exists()
    assert json.loads((work / "evaluation.json").read_text())["results"][1]["kl"]["value"] == summary.outputs[1].kl
    run(quiet.model, work, evaluate="never", **{**settings, "head_bits": 8, "reuse": True})
    assert not plot.exists()
