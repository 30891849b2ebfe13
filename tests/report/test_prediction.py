"""Predicted beside measured KL: the plot, and where a report finds both."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from report_helpers import evaluation, html_of

from exl2ray.errors import UsageError
from exl2ray.report.facts import read_facts
from exl2ray.report.prediction import PredictedKL, plot_prediction, prediction_figure, usable
from exl2ray.report.sections import _prediction
from exl2ray.report.style import LIGHT, drawing

POINTS = [PredictedKL(b, 0.5 * 2**-b, 0.6 * 2**-b, 0.01 * 2**-b) for b in (6.0, 2.5, 4.0)]
BITS = (3.0, 4.5)  # of the imitated work directories


def test_axes_and_diagonal() -> None:
    with drawing(LIGHT):
        figure = prediction_figure(POINTS, "a model")
        left, right = figure.axes
        assert (left.get_xscale(), left.get_yscale(), right.get_yscale()) == ("log", "log", "linear")
        assert left.get_xlim() == left.get_ylim()
        (low, high), (same_low, same_high) = left.lines[-1].get_xdata(), left.lines[-1].get_ydata()
        assert (low, high) == (same_low, same_high) == left.get_xlim()
        assert low < min(p.predicted for p in POINTS) < max(p.measured for p in POINTS) < high
        assert list(right.lines[0].get_xdata()) == [2.5, 4.0, 6.0]
        assert list(right.lines[0].get_ydata()) == pytest.approx([1.2] * 3)
        assert right.get_ylim()[0] < 1 < 1.2 < right.get_ylim()[1]
        assert sorted(t.get_text() for t in left.texts) == ["2.5", "4", "6"]
        assert left.get_legend() is None


def test_several_models_have_a_legend_and_no_labels() -> None:
    points = [PredictedKL(4.0, p, 0.1, None, m, k) for p, m in ((0.1, "a"), (0.09, "b")) for k in ("x", "y")]
    with drawing(LIGHT):
        left, right = prediction_figure(points[:3]).axes
        assert [t.get_text() for t in left.get_legend().get_texts()] == ["a, x", "a, y", "b, x"]
        assert len({(line.get_color(), line.get_marker()) for line in right.lines[:3]}) == 3
        assert len(left.texts) == 0


def test_files(tmp_path: Path) -> None:
    for path in (tmp_path / "a.png", tmp_path / "a.svg", tmp_path / "a.pdf"):
        plot_prediction(POINTS[:1], path)
        first = path.read_bytes()
        plot_prediction(POINTS[:1], path)
        assert path.read_bytes() == first
    with pytest.raises(UsageError, match="no model"):
        plot_prediction([], tmp_path / "a.png")
    with pytest.raises(UsageError, match="ends in"):
        plot_prediction(POINTS, tmp_path / "a.gif")


@pytest.mark.parametrize(("predicted", "measured", "expected"), [
    (0.1, 0.2, True), (None, 0.2, False), (0.1, None, False), (0.0, 0.1, False), (0.1, -1e-9, False),
    (math.inf, 0.1, False), (0.1, math.nan, False),
])  # fmt: skip
def test_what_has_a_place_on_log_axes(predicted: float | None, measured: float | None, expected: bool) -> None:
    assert usable(predicted, measured) == expected


@pytest.mark.parametrize(
    ("folder", "found"),
    [("/out/imitation-{b:g}bpw", 1), ("elsewhere/imitation-{b:g}bpw/", 1), ("/out/{b:g}", 0), ("/out/imitation-9bpw", 0)],
)
def test_models_are_found_by_where_they_were_written(small_work: Path, tmp_path: Path, folder: str, found: int) -> None:
    """Also after they were moved; a model of another job is not taken for one of this one."""
    work = Path(shutil.copytree(small_work, tmp_path / "work"))
    results = evaluation(BITS)
    for result, b in zip(results["results"], BITS, strict=True):
        result["model"] = folder.format(b=b)
    (work / "evaluation.json").write_text(json.dumps(results))
    facts = read_facts(str(work))
    assert [b.predicted_kl for b in facts.bitrates] == [0.45 * 2.0**-b for b in BITS]
    assert len(_prediction(facts)) == found
    assert html_of(work).count("Predicted and measured KL") == 2 * found  # the heading and the figure's name


def test_without_a_prediction_there_is_no_plot(small_work: Path, tmp_path: Path) -> None:
    work = Path(shutil.copytree(small_work, tmp_path / "work"))
    (work / "evaluation.json").write_text(json.dumps(evaluation(BITS)))
    log = work / "events.jsonl"
    log.write_text(log.read_text().replace("predicted_kl", "other"))
    assert _prediction(read_facts(str(work))) == []
