"""On how many rows the option tables are scored: few unless options are chosen by the scores; the model is the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from convert_helpers import contents, recipe, run, without_scores
from tiny_models import write_model

from exl2ray.convert import convert
from exl2ray.errors import StoreError, UsageError
from exl2ray.events import Silent
from exl2ray.formats.measurement import read_measurement
from exl2ray.job_opening import FEW_SCORES, score_rows
from exl2ray.recipe import Recipe
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
        with pytest.raises(StoreError, match=r"measure\.score_rows is 0"):
            score_rows(plain, replace(job, job={**job.job, "measure": {**before, "score_rows": 0}}))
    with pytest.raises(StoreError, match="score-rows"):
        run(model, tmp_path / "work-3", quality="balanced", score_rows=5)
    run(model, tmp_path / "work-3", quality="balanced")
    job = WorkDir.read_job(str(tmp_path / "work-3"))
    assert job is not None
    assert job.job["measure"]["score_rows"] == 3


def test_a_choice_by_few_scores_is_told_of(tmp_path: Path) -> None:
    model, measurement = write_model(tmp_path / "model", "Llama", num_hidden_layers=1), tmp_path / "m.json"
    few = recipe(model, tmp_path / "a", quality="balanced", score_rows=FEW_SCORES, output_measurement=str(measurement))
    convert(few, Silent())
    said = Silent()
    convert(recipe(model, tmp_path / "b", quality="reference", measurement=str(measurement)), said)
    warnings = [f["message"] for name, f in said.events if name == "warning"]
    assert any("accuracies on 4 calibration rows" in w and "--quality reference" in w for w in warnings), warnings
