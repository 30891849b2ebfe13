"""The plot of a ladder of bitrates."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from exl2ray.errors import StoreError, UsageError
from exl2ray.report.ladder import LadderRow, ladder_figure, plot_ladder
from exl2ray.report.style import LIGHT, drawing

ROWS = [LadderRow(b, int(b * 1e9), 5 + 4 / b**2, 2.0**-b, 1 - 0.3 / b, 0.01, 0.001, 0.002) for b in (6.0, 2.5, 3.0, 4.0)]


def test_panels_and_axes() -> None:
    with drawing(LIGHT):
        figure = ladder_figure(ROWS, "a model", reference_perplexity=5.0)
        kl, perplexity, top1 = figure.axes
        assert kl.get_yscale() == "log"
        assert (perplexity.get_yscale(), top1.get_yscale()) == ("linear", "linear")
        assert list(kl.lines[0].get_xdata()) == [2.5, 3.0, 4.0, 6.0]  # GB, smallest first
        assert list(top1.lines[0].get_ydata()) == pytest.approx([88, 90, 92.5, 95])
        assert [t.get_text() for t in kl.texts] == ["2.5", "3", "4", "6"]


def test_without_a_reference_only_perplexity_is_drawn() -> None:
    with drawing(LIGHT):
        figure = ladder_figure([LadderRow(4.0, 5_000_000, 7.5), LadderRow(3.0, 4_000_000, 8.5)])
        assert [ax.get_ylabel() for ax in figure.axes] == ["perplexity"]
        assert figure.axes[0].get_xlabel() == "size of the files, MB"


@pytest.mark.parametrize("kl", [0.0, None])
def test_a_divergence_of_zero_has_no_place_on_a_log_axis(tmp_path: Path, kl: float | None) -> None:
    plot_ladder([LadderRow(8.0, 10**9, 5.0, kl), LadderRow(2.0, 10**8, 9.0, 0.3)], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_png_and_svg(tmp_path: Path) -> None:
    for path in (tmp_path / "ladder.png", tmp_path / "ladder.svg"):
        plot_ladder(ROWS, path, title=r"$\frac{ 模型", reference_perplexity=5.0)
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    svg = ElementTree.parse(tmp_path / "ladder.svg").getroot()
    assert svg.tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ladder.png", "ladder.svg"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one row"):
        plot_ladder([], tmp_path / "x.png")
    with pytest.raises(UsageError, match=r"\.png, \.svg"):
        plot_ladder(ROWS, tmp_path / "x.gif")
    with pytest.raises(StoreError, match="cannot be written"):
        plot_ladder(ROWS, tmp_path / "missing" / "x.png")
    assert list(tmp_path.iterdir()) == []
