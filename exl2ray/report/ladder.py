"""The ladder of bitrates: what each size costs in quality, as plots.

Loads matplotlib only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2ray.errors import UsageError
from exl2ray.evaluate.record import Evaluation, Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from exl2ray.report.style import Plot


def plot_ladder(models: Sequence[tuple[str, Evaluation]], path: str | Path, title: str = "") -> None:
    """Writes ``ladder_plots`` of (label, results) as PNG, SVG or PDF. Raises as `style.write_plots`; UsageError for none."""
    from exl2ray.report.style import write_plots

    write_plots(ladder_plots(models), path, title)


def ladder_plots(models: Sequence[tuple[str, Evaluation]]) -> list[Plot]:
    """KL divergence with its tail (log scale), perplexity and top-1 agreement over the size of the files.

    Each as far as a model has the figure. GGUF files are a curve of their own, the perplexity of the source is a line. Raises
    UsageError for no models.
    """
    from exl2ray.report.style import ACCENT, SERIES, Plot, plain_log_axis

    if not models:
        raise UsageError("a ladder needs at least one row")
    models = sorted(models, key=lambda m: m[1].file_bytes)
    factor, unit = (1e9, "GB") if models[-1][1].file_bytes >= 1e9 else (1e6, "MB")
    sources = [e.reference_perplexity.value for _, e in models if e.reference_perplexity is not None]

    def line(ax: Axes, values: Sequence[tuple[str, Evaluation, Figure | None]], below: bool = False, **style: Any) -> None:
        points = [(label, e.file_bytes / factor, v) for label, e, v in values if v is not None]
        x, y = [size for _, size, _ in points], [v.value for *_, v in points]
        looks = {"color": ACCENT, "marker": "o", "markersize": 5, "linewidth": 1.5, "capsize": 3, **style}
        ax.errorbar(x, y, yerr=[v.error or 0.0 for *_, v in points], **looks)
        for text, at in zip([label for label, *_ in points], zip(x, y, strict=True), strict=True):
            ax.annotate(text, at, xytext=(6, -10 if below else 4), textcoords="offset points", fontsize=8)
        ax.set_xlabel(f"size of the files, {unit}")
        ax.margins(x=0.16 if len(models[-1][0]) < 9 else 0.28, y=0.16)  # room for the label of the last point
        ax.locator_params(axis="x", nbins=5)

    gguf: dict[str, Any] = {"color": SERIES[2], "marker": "D"}
    curves = [([m for m in models if not m[1].is_gguf], "", {}, 1), ([m for m in models if m[1].is_gguf], "GGUF, ", gguf, 3)]
    curves = [curve for curve in curves if curve[0]]

    def kl(ax: Axes) -> None:
        for members, name, looks, number in curves:
            means = [(n, e, e.kl if e.kl is not None and e.kl.value > 0 else None) for n, e in members]
            tails = [("", e, f if (f := e.kl_tail.get("p99")) is not None and f.value > 0 else None) for _, e in members]
            line(ax, means, label=f"{name}mean", **looks)
            if any(v is not None for *_, v in tails):
                style: dict[str, Any] = {"color": SERIES[number], "linestyle": "--", "marker": "s", "markersize": 4}
                line(ax, tails, label=f"{name}99 % are below", **style)
        if len(ax.get_legend_handles_labels()[0]) > 1:
            ax.legend(loc="upper right")
        ax.set_ylabel("nats per token")
        plain_log_axis(ax, "y")

    def perplexity(ax: Axes) -> None:
        for members, _, looks, _ in curves:
            line(ax, [(n, e, Figure(e.perplexity.value, e.paired_error)) for n, e in members], **looks)
        if sources:
            ax.axhline(sources[0], linestyle="--", linewidth=1, color=ax.xaxis.label.get_color(), alpha=0.6)
            ax.annotate("source", (0, sources[0]), xycoords=("axes fraction", "data"), va="bottom", xytext=(3, 2),
                        textcoords="offset points", fontsize=8)  # fmt: skip

    def top1(ax: Axes) -> None:
        for members, _, looks, _ in curves:
            percent = [(n, e, e.top1 and Figure(100 * e.top1.value, 100 * (e.top1.error or 0.0))) for n, e in members]
            line(ax, percent, below=True, **looks)
        ax.set_ylabel("%")

    plots = [Plot("Perplexity", perplexity)]
    if any(e.kl is not None and e.kl.value > 0 for _, e in models):
        plots.insert(0, Plot("KL divergence from the source", kl))
    if any(e.top1 is not None for _, e in models):
        plots.append(Plot("Most probable token as in the source", top1))
    return plots
