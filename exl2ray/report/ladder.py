"""Plots of finished models: what each size costs in quality, and the KL divergence that was predicted for it.

Loads matplotlib only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.errors import UsageError
from exl2ray.evaluate.record import Evaluation, Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from exl2ray.report.style import Plot


@dataclass(frozen=True)
class PredictedKL:
    """One converted model. predicted, measured: KL from the source in nats per token, both above 0.

    series, kind: what has a colour and what a marker of its own where there are several (models, ways to allocate).
    """

    bits: float  # asked for
    predicted: float
    measured: float
    error: float | None = None  # standard error of ``measured``
    series: str = ""
    kind: str = ""

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.measured / self.predicted


def usable(predicted: float | None, measured: float | None) -> bool:
    """Whether both are there and have a place on a log axis."""
    return all(v is not None and math.isfinite(v) and v > 0 for v in (predicted, measured))


def plot_ladder(models: Sequence[tuple[str, Evaluation]], path: str | Path, title: str = "") -> None:
    """Writes ``ladder_plots`` of (label, results) as PNG, SVG or PDF. Raises as `style.write_plots`; UsageError for none."""
    from exl2ray.report.style import write_plots

    write_plots(ladder_plots(models), path, title)


def plot_prediction(points: Sequence[PredictedKL], path: str | Path, title: str = "") -> None:
    """Writes ``prediction_plots`` as PNG, SVG or PDF. Raises as `style.write_plots`, and UsageError for no points."""
    from exl2ray.report.style import write_plots

    write_plots(prediction_plots(points), path, title)


def ladder_plots(models: Sequence[tuple[str, Evaluation]]) -> list[Plot]:
    """KL divergence with its tail (log scale), perplexity and top-1 agreement over the size of the files.

    Each as far as a model has the figure; the perplexity of the source is a line. Raises UsageError for no models.
    """
    from exl2ray.report.style import ACCENT, SERIES, Plot, plain_log_axis

    if not models:
        raise UsageError("a ladder needs at least one row")
    models = sorted(models, key=lambda m: m[1].file_bytes)
    factor, unit = (1e9, "GB") if models[-1][1].file_bytes >= 1e9 else (1e6, "MB")
    sources = [e.reference_perplexity.value for _, e in models if e.reference_perplexity is not None]

    def line(ax: Axes, values: Sequence[tuple[str, Evaluation, Figure | None]], below: bool = False, **style: object) -> None:
        points = [(label, e.file_bytes / factor, v) for label, e, v in values if v is not None]
        x, y = [size for _, size, _ in points], [v.value for *_, v in points]
        looks = {"color": ACCENT, "marker": "o", "markersize": 5, "linewidth": 1.5, "capsize": 3, **style}
        ax.errorbar(x, y, yerr=[v.error or 0.0 for *_, v in points], **looks)  # type: ignore[arg-type]
        for text, at in zip([label for label, *_ in points], zip(x, y, strict=True), strict=True):
            ax.annotate(text, at, xytext=(6, -10 if below else 4), textcoords="offset points", fontsize=8)
        ax.set_xlabel(f"size of the files, {unit}")
        ax.margins(x=0.16, y=0.16)
        ax.locator_params(axis="x", nbins=5)

    def kl(ax: Axes) -> None:
        line(ax, [(n, e, e.kl if e.kl is not None and e.kl.value > 0 else None) for n, e in models], label="mean")
        tails = [("", e, f if (f := e.kl_tail.get("p99")) is not None and f.value > 0 else None) for _, e in models]
        if any(v is not None for *_, v in tails):
            line(ax, tails, color=SERIES[1], linestyle="--", marker="s", markersize=4, label="99 % are below")
            ax.legend(loc="upper right")
        ax.set_ylabel("nats per token")
        plain_log_axis(ax, "y")

    def perplexity(ax: Axes) -> None:
        line(ax, [(n, e, Figure(e.perplexity.value, e.paired_error)) for n, e in models])
        if sources:
            ax.axhline(sources[0], linestyle="--", linewidth=1, color=ax.xaxis.label.get_color(), alpha=0.6)
            ax.annotate("source", (0, sources[0]), xycoords=("axes fraction", "data"), va="bottom", xytext=(3, 2),
                        textcoords="offset points", fontsize=8)  # fmt: skip

    def top1(ax: Axes) -> None:
        percent = [(n, e, e.top1 and Figure(100 * e.top1.value, 100 * (e.top1.error or 0.0))) for n, e in models]
        line(ax, percent, below=True)
        ax.set_ylabel("%")

    plots = [Plot("Perplexity", perplexity)]
    if any(e.kl is not None and e.kl.value > 0 for _, e in models):
        plots.insert(0, Plot("KL divergence from the source", kl))
    if any(e.top1 is not None for _, e in models):
        plots.append(Plot("Most probable token as in the source", top1))
    return plots


def prediction_plots(points: Sequence[PredictedKL]) -> list[Plot]:
    """Measured over predicted KL on log axes with the diagonal, and their ratio by bitrate. UsageError for no points."""
    from exl2ray.report.style import MARKERS, SERIES, Plot, clean_label, plain_log_axis

    if not points:
        raise UsageError("no model with a predicted and a measured KL divergence")
    series, kinds = (list(dict.fromkeys(x)) for x in ([p.series for p in points], [p.kind for p in points]))
    groups = [(s, k, sorted((p for p in points if (p.series, p.kind) == (s, k)), key=lambda p: p.bits))
              for s in series for k in kinds]  # fmt: skip

    def draw(ax: Axes, ratios: bool) -> None:
        for name, kind, own in groups:
            x = [p.bits if ratios else p.predicted for p in own]
            y = [p.ratio if ratios else p.measured for p in own]
            errors = [min(p.error or 0.0, 0.9 * p.measured) / (p.predicted if ratios else 1.0) for p in own]
            label = ", ".join(clean_label(t) for t in (name, kind) if t)
            colour, marker = SERIES[series.index(name) % len(SERIES)], MARKERS[kinds.index(kind) % len(MARKERS)]
            ax.errorbar(x, y, errors, linestyle="-" if ratios else "none", linewidth=1.2, capsize=3, markersize=5,
                        label=label, color=colour, marker=marker)  # fmt: skip

    def measured(ax: Axes) -> None:
        draw(ax, ratios=False)
        ends = [v for p in points for v in (p.predicted, p.measured)]
        low, high = min(ends) / 1.7, max(ends) * 1.7
        ax.plot([low, high], [low, high], linestyle="--", linewidth=1, color=ax.xaxis.label.get_color(), alpha=0.6, zorder=1)
        ax.set(xlim=(low, high), ylim=(low, high), xlabel="predicted, nats per token", ylabel="measured, nats per token")
        plain_log_axis(ax, "x")
        plain_log_axis(ax, "y")
        if len(groups) == 1:
            for p in points:
                ax.annotate(f"{p.bits:g}", (p.predicted, p.measured), xytext=(7, -10), textcoords="offset points", fontsize=8)
        else:
            ax.legend(loc="upper left")

    def ratio(ax: Axes) -> None:
        draw(ax, ratios=True)
        ratios = [p.ratio for p in points]
        ax.axhline(1.0, linestyle="--", linewidth=1, color=ax.xaxis.label.get_color(), alpha=0.6, zorder=1)
        ax.set(ylim=(min(0.8, 0.95 * min(ratios)), max(1.2, 1.05 * max(ratios))))
        ax.set(xlabel="bits per weight asked for", ylabel="measured over predicted")
        ax.margins(x=0.12)
        ax.locator_params(nbins=5)

    return [Plot("Predicted and measured KL divergence", measured), Plot("Their ratio", ratio)]
