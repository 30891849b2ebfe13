"""The plot of predicted beside measured KL, and what it is made from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from predicted_kl import PredictedKL, of_log, plot_prediction, prediction_plots, usable

from exl2ray.errors import UsageError
from exl2ray.report.style import Plot

POINTS = [PredictedKL(b, 0.5 * 2**-b, 0.6 * 2**-b, 0.01 * 2**-b) for b in (6.0, 2.5, 4.0)]


@contextmanager
def drawn(plots: list[Plot]) -> Iterator[list[Axes]]:
    axes = [Figure().subplots() for _ in plots]
    for plot, ax in zip(plots, axes, strict=True):
        plot.draw(ax)
    yield axes


def test_axes_and_diagonal() -> None:
    with drawn(prediction_plots(POINTS)) as (left, right):
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
    with drawn(prediction_plots(points)) as (left, _):
        assert [t.get_text() for t in left.get_legend().get_texts()] == ["a, x", "a, y", "b, x", "b, y"]
        assert len(left.texts) == 0


def test_files(tmp_path: Path) -> None:
    for name in ("a.png", "a.svg"):
        plot_prediction(POINTS[:1], tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    with pytest.raises(UsageError, match="no model"):
        plot_prediction([], tmp_path / "b.png")


@pytest.mark.parametrize(("predicted", "measured", "expected"), [
    (0.1, 0.2, True), (None, 0.2, False), (0.1, None, False), (0.0, 0.1, False), (0.1, -1e-9, False),
    (math.inf, 0.1, False), (0.1, math.nan, False),
])  # fmt: skip
def test_what_has_a_place_on_log_axes(predicted: float | None, measured: float | None, expected: bool) -> None:
    assert usable(predicted, measured) == expected


def test_the_table_of_the_log_is_found() -> None:
    points = of_log((Path(__file__).resolve().parents[2] / "docs" / "log.md").read_text(encoding="utf-8"))
    assert len(points) > 5
    assert all(usable(p.predicted, p.measured) for p in points)
