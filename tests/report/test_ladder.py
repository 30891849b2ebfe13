"""The plots of a ladder of bitrates, and which evaluation is of which model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from report_helpers import evaluation

from exl2ray.errors import UsageError
from exl2ray.evaluate.record import Evaluation, Figure
from exl2ray.report.facts import read_facts
from exl2ray.report.ladder import ladder_plots, plot_ladder
from exl2ray.report.style import THEMES, Plot, _drawing


def model(bits: float, kl: float | None = None) -> tuple[str, Evaluation]:
    figures = {} if kl is None else {"kl": Figure(kl, 0.001), "top1": Figure(1 - 0.3 / bits, 0.002)}
    tail = {} if kl is None else {"p99": Figure(10 * kl)}
    ppl = Figure(5 + 4 / bits**2, 0.01)
    found = Evaluation("m", "s", 4, 64, 252, ppl, Figure(5.0), file_bytes=int(bits * 1e9), kl_tail=tail, **figures)
    return f"{bits:g}", found


MODELS = [model(b, 2.0**-b) for b in (6.0, 2.5, 3.0, 4.0)]
BITS = (3.0, 4.5)  # of the imitated work directories


@contextmanager
def drawn(plots: list[Plot]) -> Iterator[list[Axes]]:
    with _drawing(THEMES["light"]):
        axes = [Canvas().subplots() for _ in plots]
        for plot, ax in zip(plots, axes, strict=True):
            plot.draw(ax)
        yield axes


def test_plots_and_axes() -> None:
    with drawn(ladder_plots(MODELS)) as (kl, perplexity, top1):
        assert kl.get_yscale() == "log"
        assert (perplexity.get_yscale(), top1.get_yscale()) == ("linear", "linear")
        assert list(kl.lines[0].get_xdata()) == [2.5, 3.0, 4.0, 6.0]  # GB, smallest first
        assert list(top1.lines[0].get_ydata()) == pytest.approx([88, 90, 92.5, 95])
        assert [t.get_text() for t in kl.texts if t.get_text()] == ["2.5", "3", "4", "6"]
        assert [t.get_text() for t in kl.get_legend().get_texts()] == ["mean", "99 % are below"]
        assert "source" in [t.get_text() for t in perplexity.texts]


def test_gguf_files_are_a_curve_of_their_own() -> None:
    other = [(n, replace(e, model=f"/x/{n}.GGUF")) for n, e in (model(3.5, 0.2), model(5.0, 0.04))]
    with drawn(ladder_plots([*MODELS, *other])) as axes:
        assert [[list(line.get_xdata()) for line in ax.containers[i].lines[:1]] for ax in axes for i in (0, -1)] == [
            [[2.5, 3.0, 4.0, 6.0]], [[3.5, 5.0]]] * 3  # fmt: skip
        names = [t.get_text() for t in axes[0].get_legend().get_texts()]
        assert names == ["mean", "99 % are below", "GGUF, mean", "GGUF, 99 % are below"]
        colours = {line.get_color() for line in axes[0].lines if len(line.get_xdata()) > 1}
        assert len(colours) == 4
    with drawn(ladder_plots(other)) as axes:
        assert len(axes[1].containers) == 1


def test_without_a_reference_only_perplexity_is_drawn() -> None:
    plots = ladder_plots([model(0.005), model(0.004)])
    assert [p.title for p in plots] == ["Perplexity"]
    with drawn(plots) as (ax,):
        assert ax.get_xlabel() == "size of the files, MB"


@pytest.mark.parametrize("kl", [0.0, None])
def test_a_divergence_of_zero_has_no_place_on_a_log_axis(tmp_path: Path, kl: float | None) -> None:
    plot_ladder([model(8.0, kl), model(2.0, 0.3)], tmp_path / "x.png")
    assert (tmp_path / "x.png").stat().st_size > 5000


def test_png_and_svg(tmp_path: Path) -> None:
    for path in (tmp_path / "ladder.png", tmp_path / "ladder.svg"):
        plot_ladder(MODELS, path, title=r"$\frac{ 模型")
        first = path.read_bytes()
        plot_ladder(MODELS, path, title=r"$\frac{ 模型")
        assert path.read_bytes() == first
    assert (tmp_path / "ladder.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(tmp_path / "ladder.svg").getroot().tag.endswith("svg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ladder.png", "ladder.svg"]


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one row"):
        plot_ladder([], tmp_path / "x.png")
    with pytest.raises(UsageError, match=r"\.png, \.svg"):
        plot_ladder(MODELS, tmp_path / "x.gif")
    with pytest.raises(UsageError, match="no folder"):
        plot_ladder(MODELS, tmp_path / "missing" / "x.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("folder", "found"),
    [("/out/imitation-{b:g}bpw", 2), ("elsewhere/imitation-{b:g}bpw/", 2), ("/out/{b:g}", 0), ("/out/imitation-9bpw", 0)],
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
    assert sum(b.evaluation is not None for b in facts.bitrates) == found
