"""KL divergence as the allocation predicted it, beside what an evaluation measured.

Loads matplotlib only when something is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.errors import UsageError
from exl2ray.report.ladder import write_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3f7fd0", "#d98a1f", "#1f9e9a", "#d1495b", "#8a63d2", "#7a7a7a")


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


def plot_prediction(points: Sequence[PredictedKL], path: str | Path, *, title: str = "") -> None:
    """Writes ``prediction_figure`` as PNG, SVG or PDF. Raises UsageError for no points or another ending, StoreError."""
    write_plot(path, partial(prediction_figure, points, title))


def prediction_figure(points: Sequence[PredictedKL], title: str = "") -> Figure:
    """Measured over predicted KL on log axes with the diagonal, and their ratio by bitrate. Inside ``style.drawing``."""
    from matplotlib.ticker import MaxNLocator

    from exl2ray.report.style import MARKERS, clean_label, new_figure, plain_log_axis

    if not points:
        raise UsageError("no model with a predicted and a measured KL divergence")
    figure, (left, right) = new_figure(10.0, 4.0, 2)
    series, kinds = (list(dict.fromkeys(x)) for x in ([p.series for p in points], [p.kind for p in points]))
    for name in series:
        for kind in kinds:
            own = sorted((p for p in points if (p.series, p.kind) == (name, kind)), key=lambda p: p.bits)
            label = ", ".join(clean_label(t) for t in (name, kind) if t)
            colour = COLOURS[series.index(name) % len(COLOURS)]
            if own:
                _draw(left, right, own, label, colour, MARKERS[kinds.index(kind) % len(MARKERS)])
    ends = [v for p in points for v in (p.predicted, p.measured)]
    low, high = min(ends) / 1.7, max(ends) * 1.7
    ink = left.xaxis.label.get_color()
    left.plot([low, high], [low, high], linestyle="--", linewidth=1, color=ink, alpha=0.6, zorder=1)
    right.axhline(1.0, linestyle="--", linewidth=1, color=ink, alpha=0.6, zorder=1)
    left.set(xlim=(low, high), ylim=(low, high), xlabel="predicted KL, nats per token", ylabel="measured KL, nats per token")
    plain_log_axis(left, "x")
    plain_log_axis(left, "y")
    ratios = [p.ratio for p in points]
    right.set(ylim=(min(0.8, 0.95 * min(ratios)), max(1.2, 1.05 * max(ratios))))
    right.set(xlabel="bits per weight", ylabel="measured over predicted")
    right.margins(x=0.12)
    right.xaxis.set_major_locator(MaxNLocator(5))
    right.yaxis.set_major_locator(MaxNLocator(4))
    if len(series) * len(kinds) == 1:
        for p in points:
            left.annotate(f"{p.bits:g}", (p.predicted, p.measured), xytext=(7, -10), textcoords="offset points", fontsize=8)
    else:
        left.legend(fontsize=8, loc="upper left")
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _draw(left: Axes, right: Axes, points: Sequence[PredictedKL], label: str, colour: str, marker: str) -> None:
    x, y = [p.predicted for p in points], [p.measured for p in points]
    bits, ratios = [p.bits for p in points], [p.ratio for p in points]
    left.plot(x, y, linestyle="none", label=label, color=colour, marker=marker, markersize=5)
    right.plot(bits, ratios, linewidth=1.2, color=colour, marker=marker, markersize=5)
    errors = [min(p.error or 0.0, 0.9 * p.measured) for p in points]
    if any(errors):
        left.errorbar(x, y, yerr=errors, linestyle="none", color=colour, capsize=3)
        ratio_errors = [e / p.predicted for e, p in zip(errors, points, strict=True)]
        right.errorbar(bits, ratios, yerr=ratio_errors, linestyle="none", color=colour, capsize=3)
