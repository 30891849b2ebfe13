"""--score-rows: cheaper scores of the option tables, the same model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import contents, run
from tiny_models import write_model

from exl2ray.errors import UsageError
from exl2ray.recipe import Recipe


def without_scores(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_scores(v) for k, v in value.items() if k != "accuracy"}
    return [without_scores(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_only_the_scores_change(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", family, num_hidden_layers=1)
    measured, made = [], []
    for rows in (None, 2):
        work, target = tmp_path / f"work-{rows}", tmp_path / f"target-{rows}"
        run(model, work, quality="balanced", score_rows=rows, compile_full=str(target), bits=(4.5,))
        measured.append(json.loads((work / "measurement.json").read_text()))
        made.append({n: digest for n, digest in contents(target).items() if n.endswith((".safetensors", "config.json"))})
    assert made[0] == made[1]
    assert measured[0] != measured[1]
    assert without_scores(measured[0]) == without_scores(measured[1])


def test_it_is_refused_where_options_are_chosen_by_the_scores() -> None:
    for chosen in ({"quality": "reference"}, {"allocation": "module"}):
        with pytest.raises(UsageError, match="--score-rows 4: options are chosen per module"):
            Recipe("model", "work", score_rows=4, **chosen)  # type: ignore[arg-type]
    assert Recipe("model", "work", score_rows=4).job({}, None)["measure"]["score_rows"] == 4
    assert "score_rows" not in Recipe("model", "work").job({}, None)["measure"]
