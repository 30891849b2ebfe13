"""Models that are changed while one is tuned: no output is a mixture of two, and no checkpoint either."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from rounded_models import write_rounded
from test_tune_run import same, settings
from tiny_models import write_model

from exl2ray.cli import cli
from exl2ray.errors import JobMismatchError, SourceError
from exl2ray.events import Silent
from exl2ray.formats import file_states
from exl2ray.tune import inputs, run, state
from exl2ray.tune.run import tune
from exl2ray.tune.settings import Settings

Pairs = Callable[..., tuple[Path, Path]]
Change = Callable[[], None]


def told(found: Settings) -> str:
    reporter = Silent()
    tune(found, torch.device("cpu"), reporter)
    return "\n".join(fields.get("message", "") for _, fields in reporter.events)


@pytest.fixture
def own(pair: Pairs, text: tuple[Path, Path], tmp_path: Path) -> Callable[..., Settings]:
    """Settings of a tuning whose models may be changed."""
    source, exl2 = (Path(shutil.copytree(d, tmp_path / d.name)) for d in pair("Llama"))

    def get(output: str, **changes: Any) -> Settings:
        places = {"directory": str(exl2), "reference": str(source)}
        few = {"tokens": 2048, "checkpoint_seconds": 0.0, "streamed": True}
        return settings(pair, text, tmp_path / output, **{**places, **few, **changes})

    return get


@pytest.fixture
def other(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source, EXL2) of the same shapes."""
    root = tmp_path_factory.mktemp("other")
    torch.manual_seed(99)
    source = write_model(root / "source", "Llama", seed=99)
    return source, write_rounded(source, root / "exl2")


def replace(target: Path, source: Path) -> None:
    """As `mv` and rsync do."""
    shutil.copy(source, f"{target}.new")
    os.replace(f"{target}.new", target)


@pytest.mark.parametrize("which", ["directory", "reference"])
@pytest.mark.parametrize("moment", ["training", "deciding", "writing"])
def test_a_model_that_is_replaced_meanwhile(
    own: Callable[..., Settings], other: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, which: str, moment: str
) -> None:
    whole, given = own("whole"), own("out")
    told(whole)
    place = Path(getattr(given, which))
    name = "output.safetensors" if which == "directory" else "model.safetensors"
    theirs = other[which == "directory"] / name
    before = place.parent / "before"
    shutil.copy(place / name, before)
    called = {"training": (state, "save"), "deciding": (run.judge, "decide"), "writing": (run, "write_tuned")}[moment]
    original = getattr(*called)
    calls: list[int] = []
    last = 2 if moment == "training" else 1  # the first piece is told before the second checkpoint, and the hashes kept

    def calling(*args: Any, **more: Any) -> Any:
        calls.append(1)
        found = original(*args, **more) if moment == "training" else None
        if len(calls) == last:
            replace(place / name, theirs)
        return original(*args, **more) if moment != "training" else found

    monkeypatch.setattr(*called, calling)
    what = "it" if which == "directory" else given.directory
    with pytest.raises(JobMismatchError, match=f"{place}: {name} was changed while {what} was tuned") as caught:
        told(given)
    assert "put the files back" in caught.value.hint
    assert not (Path(given.output) / "config.json").exists()
    assert len(calls) == last, "no checkpoint of a mixture"
    replace(place / name, before)
    notes = told(given)
    assert "going on from step 2" in notes or moment != "training"
    assert "written again" not in notes, "hashed, so known to be as it was"
    assert same(Path(whole.output), Path(given.output))


def test_a_reference_that_is_quantised_itself_is_told(
    own: Callable[..., Settings], other: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Integers would move to another conversion's errors, with no word."""
    reporter = Silent()

    def stop(*_: object) -> None:
        raise InterruptedError

    monkeypatch.setattr(run, "check_memory", stop)
    for reference in (other[1], other[0]):
        with pytest.raises(InterruptedError):
            tune(own("out", reference=str(reference)), torch.device("cpu"), reporter)
    assert [f["message"].partition(":")[0] for _, f in reporter.events] == [f"--reference {other[1]} is an EXL2 model itself"]


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_json_does_without_words_but_warnings(
    flags: tuple[str, ...], own: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They went nowhere; standard output is for whoever reads JSON."""

    def tuning(*given: Any, **_: Any) -> None:
        given[2].event("note", message="a note")
        given[2].event("warning", message="a warning")
        raise SourceError("ended here", "")

    monkeypatch.setattr("exl2ray.commands.tune.tune", tuning)
    given = own("out")
    place = ["--reference", given.reference, "-o", given.output, "--device", "cpu"]
    found = CliRunner().invoke(cli, ["tune", given.directory, *place, *flags])
    assert ("a note" in found.stdout) == (not flags)
    assert "warning: a warning" in (found.stderr if flags else found.stdout)


def test_a_tokenizer_that_is_replaced_meanwhile(own: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    given = own("out")
    file = Path(given.directory) / "tokenizer.json"
    decide = run.judge.decide
    monkeypatch.setattr(run.judge, "decide", lambda *args: (file.write_text(file.read_text() + "\n"), decide(*args))[1])
    with pytest.raises(JobMismatchError, match=r"tokenizer\.json was changed while it was tuned"):
        told(given)


@pytest.mark.parametrize("hashed", [True, False])
def test_weights_that_are_only_written_again(
    own: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch, hashed: bool
) -> None:
    whole, given = own("whole"), own("out")
    told(whole)
    if not hashed:
        monkeypatch.setattr(inputs, "Hashing", lambda states, path: file_states.Hashing(states, path, 0))
    decide = run.judge.decide
    weights = Path(given.reference) / "model.safetensors"
    monkeypatch.setattr(run.judge, "decide", lambda *args: (os.utime(weights, (1, 1)), decide(*args))[1])
    assert told(given).count("were written again after tuning had begun") == (0 if hashed else 1)
    assert same(Path(whole.output), Path(given.output))


def test_a_model_that_is_gone_meanwhile(own: Callable[..., Settings], monkeypatch: pytest.MonkeyPatch) -> None:
    given = own("out")
    write = run.write_tuned
    away = f"{given.reference}.away"
    monkeypatch.setattr(run, "write_tuned", lambda *args: (os.rename(given.reference, away), write(*args))[1])
    with pytest.raises(JobMismatchError, match="was changed while"):
        told(given)
