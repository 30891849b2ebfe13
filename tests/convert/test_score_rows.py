"""On how many rows the option tables are scored: few unless options are chosen by the scores; the model is the same."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import MEASURED, contents, messages, recipe, run, without_scores
from tiny_models import write_model

from exl2ray.commands.allocations import solve
from exl2ray.convert import convert, dry_run
from exl2ray.errors import StoreError, UsageError
from exl2ray.events import Silent
from exl2ray.formats.measurement import read_measurement
from exl2ray.job_opening import FEW_SCORES, score_rows
from exl2ray.plan.compose import Wishes, compose
from exl2ray.recipe import Recipe
from exl2ray.result_warnings import few_scores_warning
from exl2ray.store.workdir import WorkDir

ALL = 1000  # more rows than there are


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_only_the_scores_change(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family, num_hidden_layers=1)
    measured, made = [], []
    for rows in (ALL, 2, None):
        work, target = tmp_path / f"work-{rows}", tmp_path / f"target-{rows}"
        run(model, work, quality="balanced", score_rows=rows, compile_full=str(target), bits=(4.5,))
        measured.append(json.loads((work / "measurement.json").read_text()))
        made.append({n: digest for n, digest in contents(target).items() if n.endswith((".safetensors", "config.json"))})
    assert made[0] == made[1] == made[2]
    assert measured[0]["measurement"] != measured[1]["measurement"] != measured[2]["measurement"]
    assert without_scores(measured[0]) == without_scores(measured[1]) == without_scores(measured[2])
    assert [read_measurement(tmp_path / f"work-{r}" / "measurement.json").scores for r in (2, None)] == [
        {"rows": 2}, {"rows": FEW_SCORES},
    ]  # fmt: skip


def test_all_rows_where_options_are_chosen_by_the_scores() -> None:
    for chosen in ({"quality": "reference"}, {"allocation": "module"}):
        with pytest.raises(UsageError, match="--score-rows 4: options are chosen per module"):
            Recipe("model", "work", score_rows=4, **chosen)  # type: ignore[arg-type]
        assert score_rows(Recipe("model", "work", **chosen), None) is None  # type: ignore[arg-type]
    assert score_rows(Recipe("model", "work", output_measurement="m.json"), None) is None, "for others, who choose by them"
    assert score_rows(Recipe("model", "work"), None) == FEW_SCORES
    assert score_rows(Recipe("model", "work", score_rows=7), None) == 7


def test_a_job_goes_on_as_it_began(tmp_path: Path) -> None:
    """Also one of a version that scored all rows, whose job says nothing; and another number is another measurement."""
    model = write_model(tmp_path / "model", "Llama", num_hidden_layers=1)
    for rows, known in ((3, 3), (FEW_SCORES, FEW_SCORES)):
        work = tmp_path / f"work-{known}"
        measure = recipe(model, work, quality="balanced", score_rows=rows, output_measurement=str(tmp_path / "m.json"))
        convert(measure, Silent())
        job = WorkDir.read_job(str(work))
        assert job is not None
        assert job.job["measure"]["score_rows"] == known
        plain = recipe(model, work, quality="balanced")
        assert score_rows(plain, job) == known
        assert score_rows(replace(plain, no_resume=True), job) == FEW_SCORES
        before = {k: v for k, v in job.job["measure"].items() if k != "score_rows"}
        assert score_rows(plain, replace(job, job={**job.job, "measure": before})) is None
        for damaged in (0, None, True, "4"):
            with pytest.raises(StoreError, match=rf"measure\.score_rows is {damaged!r};"):
                score_rows(plain, replace(job, job={**job.job, "measure": {**before, "score_rows": damaged}}))
    with pytest.raises(StoreError, match="score-rows"):
        run(model, tmp_path / "work-3", quality="balanced", score_rows=5)
    run(model, tmp_path / "work-3", quality="balanced")
    job = WorkDir.read_job(str(tmp_path / "work-3"))
    assert job is not None
    assert job.job["measure"]["score_rows"] == 3


def told(recipe: Recipe, dry: bool = False) -> list[str]:
    said = Silent()
    (dry_run if dry else convert)(recipe, said)
    return [m for m in messages(said, "warning") if "accuracies on" in m]


def test_a_choice_by_few_scores_is_told_of(tmp_path: Path) -> None:
    """By all that chooses or says what would be chosen, once, and on the card; of a job that goes on, too."""
    model, measurement = write_model(tmp_path / "model", "Llama", num_hidden_layers=1), tmp_path / "m.json"
    few = recipe(model, tmp_path / "a", quality="balanced", score_rows=FEW_SCORES, output_measurement=str(measurement))
    convert(few, Silent())
    again = {"quality": "reference", "bits": (4.5, 5.0), "compile_full": str(tmp_path / "{bpw}")}
    with_file = recipe(model, tmp_path / "b", measurement=str(measurement), **again)
    goes_on = recipe(model, tmp_path / "a", reuse=True, **again)
    for plan in (with_file, goes_on):
        said = told(plan, dry=True)
        assert len(said) == 1, said
        assert "accuracies on 4 calibration rows" in said[0]
        assert "--allocation module, in another work directory or with -nr" in said[0]
        assert told(replace(plan, quality="balanced"), dry=True) == []
        assert [w for w in compose(plan, Wishes(), True, print).warnings if "accuracies on" in w] == said
        assert told(plan) == said
        assert (tmp_path / "4.5" / "README.md").read_text().count("accuracies on 4 calibration rows") == 1
        shutil.rmtree(tmp_path / "4.5")
        shutil.rmtree(tmp_path / "5.0")
    assert told(replace(goes_on, no_resume=True), dry=True) == []
    solved = solve(str(model), str(measurement), (4.5,), "squared", 2.0, "module")
    assert any("accuracies on 4 calibration rows" in w for w in solved[0].warnings)


def test_scores_on_all_rows_are_not_doubted(tmp_path: Path) -> None:
    model, measurement = write_model(tmp_path / "model", "Llama", num_hidden_layers=1), tmp_path / "m.json"
    for rows in (ALL, MEASURED):
        work = tmp_path / f"work-{rows}"
        convert(recipe(model, work, quality="balanced", score_rows=rows, output_measurement=str(measurement)), Silent())
        assert read_measurement(measurement).scores is None
        assert told(recipe(model, tmp_path / f"with-{rows}", measurement=str(measurement)), dry=True) == []
        assert told(recipe(model, work, reuse=True), dry=True) == []


@pytest.mark.parametrize("rows", [None, 0, True, 1.5, 10**299, "x\x1b[31m](http://e)\n<b>", [[[1]]], {"a": 1}])
def test_what_others_wrote_as_number_of_rows_is_not_repeated(rows: Any) -> None:
    (text,) = few_scores_warning({"rows": rows})
    assert text.startswith("options are chosen by accuracies on some calibration rows: ")
