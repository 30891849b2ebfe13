"""Places that are written to and are none, plots that cannot be drawn: told before the work, and nothing finished is lost."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bounded import exl2ray
from matplotlib.figure import Figure
from small_sources import write_exl2, write_source
from workdir_cases import PLACES, Conversion

from exl2ray.cli import cli
from exl2ray.commands import evaluate
from exl2ray.convert import patch
from exl2ray.errors import StoreError, UsageError
from exl2ray.events import Silent
from exl2ray.job_opening import check_measurement_target
from exl2ray.recipe import Recipe
from exl2ray.store.apart import refuse_within
from exl2ray.tune import run

ADDRESS = "s3://bucket/there"
NOTEBOOK = {"MPLBACKEND": "module://matplotlib_inline.backend_that_is_not_here"}
COMMANDS = {
    "convert": ["convert", "-i", "m", "-o", "w", "-b", "4", "-cf", ADDRESS, "--device", "cpu"],
    "a dry run": ["convert", "-i", "m", "-o", "w", "-b", "4", "-cf", ADDRESS, "--device", "cpu", "--dry-run"],
    "plan": ["plan", "-i", "m", "-b", "4", "-cf", ADDRESS],
    "measuring": ["convert", "-i", "m", "-o", "w", "-b", "4", "-om", ADDRESS, "--device", "cpu"],
    "measure": ["measure", "-i", "m", "-o", "w", "-om", ADDRESS, "--device", "cpu"],
    "patch": ["patch", "-o", "w", "-cf", "gs://bucket/x", "--set", "lm_head=6"],
    "tune": ["tune", "e", "--reference", "m", "-o", "hf://me/x"],
    "report": ["report", "w", "-o", ADDRESS],
    "positions": ["eval", "e", "--positions", f"{ADDRESS}.npz"],
    "measurement": ["convert", "-i", "m", "-o", "w", "-m", "https://host/m.json", "--device", "cpu"],
    "measurement of solve": ["solve", "-i", "m", "-m", ADDRESS],
    "ids": ["eval", "e", "--tokens", ADDRESS],
    "text": ["eval", "e", "--text", "http://host/a.txt"],
    "text of an evaluation": ["plan", "-i", "m", "--eval-text", ADDRESS],
    "GGUF": ["eval", "--reference", "m", "--gguf", ADDRESS],
    "questions": ["chat", "e", "--prompts", ADDRESS],
    "verify": ["verify", "hf://me/x"],
    "inspect": ["inspect", ADDRESS],
    "publish": ["publish", "e", "hf://me/x", "--repo", "me/x", "--dry-run"],
    "figures": ["publish", "e", "--eval", ADDRESS, "--repo", "me/x", "--dry-run"],
    "token": ["publish", "e", "--token-file", ADDRESS, "--repo", "me/x"],
    "figures of a report": ["report", "w", "--eval", "file:///a.json"],
    "plot": ["eval", "e", "--ladder", "--plot", f"{ADDRESS}.png"],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_an_address_is_no_place_on_this_machine(case: str, tmp_path: Path) -> None:
    write_source(tmp_path / "m")
    write_exl2(tmp_path / "e")
    before = sorted(p.name for p in tmp_path.iterdir())
    exl2ray(*COMMANDS[case], cwd=tmp_path).ends_with(2, "an address, where a path is needed")
    assert sorted(p.name for p in tmp_path.iterdir()) == before, "no folder called s3:"


def test_two_bitrates_by_links_into_one_folder(tmp_path: Path) -> None:
    write_source(tmp_path / "m")
    (tmp_path / "real").mkdir()
    for name in ("3.0", "4.0"):
        (tmp_path / name).symlink_to("real")
    for target in ("{bpw}", "real/{bpw}/../x"):
        run = exl2ray("convert", "-i", "m", "-o", "w", "-b", "3", "-b", "4", "-cf", target, "--device", "cpu", "-l", "128",
                      "-ml", "128", "--dry-run", cwd=tmp_path)  # fmt: skip
        run.ends_with(2, "are one directory")


def test_a_backend_of_matplotlib_that_is_not_here(made: Conversion, tmp_path: Path) -> None:
    """A notebook exports the name of its own to every command."""
    exl2ray("report", made.copy_of_work(tmp_path / "w"), env=NOTEBOOK).ends_with(0)
    plot = tmp_path / "plot.png"
    flags = ["--rows", "1", "--length", "32", "--plot", plot, "--device", "cpu"]
    exl2ray("eval", made.target, made.target5, "--reference", made.model, *flags, env=NOTEBOOK).ends_with(0)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_figures_come_before_a_plot_that_cannot_be_drawn(
    made: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("no font")

    monkeypatch.setattr(Figure, "savefig", broken)
    plot = tmp_path / "x.svg"
    flags = ["--rows", "1", "--length", "32", "--device", "cpu", "--json", "--plot", str(plot)]
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(made.target), str(made.target5), "--reference", str(made.model), *flags])
    out, err = capsys.readouterr()
    assert ended.value.code == 7
    assert f"{plot}: cannot be drawn: ValueError: no font" in err
    assert not plot.exists()
    assert len(json.loads(out.splitlines()[0])["results"]) == 2


def test_figures_come_before_positions_that_cannot_be_written(
    made: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _: object) -> None:
        raise StoreError(f"{path}: No space left on device")

    monkeypatch.setattr(evaluate, "write_positions", full)
    flags = ["--rows", "1", "--length", "32", "--device", "cpu", "--json", "--positions", str(tmp_path / "p.npz")]
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(made.target), "--reference", str(made.model), *flags])
    assert ended.value.code == 7
    assert len(json.loads(capsys.readouterr().out.splitlines()[0])["results"]) == 1


def test_a_ladder_that_cannot_be_drawn_costs_no_figures(made: Conversion, tmp_path: Path) -> None:
    work, target = made.copy_of_work(tmp_path / "w"), tmp_path / "out"
    np.save(tmp_path / "eval.npy", np.random.default_rng(0).integers(3, 259, (3, 64)))
    judged = ("--evaluate", "always", "--eval-text", tmp_path / "eval.npy")
    flags = made.arguments(work, target / "{bpw}", "-b", "4", "-b", "5", *judged)
    exl2ray(*flags, seconds=120, memory=6 << 30).ends_with(0, "held-out perplexity")
    (work / "ladder.png").unlink()
    (work / "ladder.png").mkdir()
    run = exl2ray("convert", "-o", work, *PLACES[:4], seconds=60, memory=6 << 30)
    run.ends_with(0, "no plot of size against quality", "held-out perplexity")


KEPT = ["logs", "quant/x", "measure", "nonce/a/b", "job.json", "driver.lock", "source", "events.jsonl"]


@pytest.mark.parametrize("place", KEPT)
def test_a_model_is_not_put_where_the_work_directory_keeps_its_own(place: str, tmp_path: Path) -> None:
    """-nr took a finished model's config.json and tokenizer away, since files in logs/ are ours."""
    work = tmp_path / "w"
    (tmp_path / "link").symlink_to(work)
    for given in (work / place, tmp_path / "link" / place, work / "x" / ".." / place):
        with pytest.raises(UsageError, match="keeps its own") as e:
            refuse_within("-cf", given, str(work))
        assert "-cf" in e.value.hint
    for fine in ("out", "logs2", "quantised", "models/logs", "../logs", ".."):
        refuse_within("-cf", work / fine, str(work))


OURS = '{\n "exl2ray work directory": 1'


def test_nor_where_another_work_directory_does(tmp_path: Path) -> None:
    """The other job's -nr would take it. Only folders with a job.json of ours count, and only what it keeps there."""
    other = tmp_path / "other"
    (other / "quant").mkdir(parents=True)
    for given in (other / "quant" / "mine", other / "measurement.json", other / "logs"):
        refuse_within("-cf", given, str(tmp_path / "w"))
        (other / "job.json").write_text('{"jobs": []}')
        refuse_within("-cf", given, str(tmp_path / "w"))
        (other / "job.json").write_text(OURS)
        with pytest.raises(UsageError, match="other keeps its own"):
            refuse_within("-cf", given, str(tmp_path / "w"), "measurement.json")
        (other / "job.json").unlink()
    (other / "job.json").write_text(OURS)
    refuse_within("-cf", other / "models" / "4.0", str(tmp_path / "w"))


def test_a_part_of_a_work_directory_is_told_as_that(tmp_path: Path) -> None:
    work = tmp_path / "w"
    (work / "quant").mkdir(parents=True)
    (work / "job.json").write_text(OURS)
    for command in (("status",), ("report",), ("patch", "--set", "lm_head=6", "-o")):
        exl2ray(*command, work / "quant").ends_with(7, "quant: is not a work directory", f"it is a part of {work}: give that")
        exl2ray(*command, tmp_path).ends_with(7, "is not a work directory: it has no job.json")
        exl2ray(*command, tmp_path / "absent").ends_with(7, "absent: is not a work directory: it does not exist")
    for command in ("status", "report"):
        exl2ray(command, work / "job.json").ends_with(7, "a file, not a work directory", f"{work}: give that")


def test_a_measurement_does_not_take_the_place_of_the_job(tmp_path: Path) -> None:
    """After measuring for hours job.json was replaced, or the file could not be written."""
    write_source(tmp_path / "m")
    common = ["-i", "m", "-o", "w", "-b", "4", "--device", "cpu", "-l", "128", "-ml", "128", "--dry-run"]
    for wanted in ("w/job.json", "w/driver.lock", "w/logs", "w/events.jsonl"):
        exl2ray("convert", *common, "-om", wanted, cwd=tmp_path).ends_with(2, f"-om w/{wanted[2:]}", "keeps its own")
    check_measurement_target(str(tmp_path / "w" / "measurement.json"), str(tmp_path / "w"))
    check_measurement_target(str(tmp_path / "w" / "mine.json"), str(tmp_path / "w"))


def test_tuning_and_patching_stay_out_of_it_too(tmp_path: Path) -> None:
    work = tmp_path / "w"
    work.mkdir()
    (work / "job.json").write_text(OURS)
    given = SimpleNamespace(path=tmp_path / "other")
    pair: Any = SimpleNamespace(start=given, source=given)
    with pytest.raises(UsageError, match=r"-o .* keeps its own logs"):
        run._refuse_inputs(pair, work / "logs" / "tuned", "-o")
    run._refuse_inputs(pair, work / "tuned", "-o")
    recipe = Recipe(str(tmp_path / "m"), str(work), (4.0,), compile_full=str(tmp_path / "out"))
    with pytest.raises(UsageError, match=r"-cf .* keeps its own logs"):
        patch(recipe, ("lm_head=6",), Silent(), compile_full=str(work / "logs"))
