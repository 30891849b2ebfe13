"""The ladder of bitrates: what each size costs in quality, as one picture.

Loads matplotlib only when something is drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")
DATES = {"svg": "Date", "pdf": "CreationDate"}  # names of what would differ from run to run


@dataclass(frozen=True)
class LadderRow:
    """One model of a ladder. kl: mean KL divergence from the source, nats per token; top1: agreement of the most probable
    token, 0 .. 1; both None without a reference. ``*_error``: standard errors, where known; that of the
    perplexity without what all models share, if it is to be compared along the ladder."""

    bpw: float  # as asked for, or of the linears
    file_bytes: int
    perplexity: float
    kl: float | None = None
    top1: float | None = None
    perplexity_error: float | None = None
    kl_error: float | None = None
    top1_error: float | None = None
    label: str = ""  # in place of the bitrate


def plot_ladder(
    rows: Sequence[LadderRow], path: str | Path, *, title: str = "", reference_perplexity: float | None = None
) -> None:
    """Writes the plot of a ladder: KL divergence (log scale), perplexity and top-1 agreement over the size of the files.

    The ending of ``path`` chooses PNG, SVG or PDF. Panels for which no row has a value are left out;
    ``reference_perplexity`` is that of the source model, drawn as a line. Raises UsageError for no rows or another ending,
    StoreError if the file cannot be written.
    """
    write_plot(path, partial(ladder_figure, rows, title, reference_perplexity))


def write_plot(path: str | Path, draw: Callable[[], Figure]) -> None:
    """Draws on white and writes as the ending of ``path`` says, always the same bytes. Raises as `plot_ladder`."""
    from exl2ray.formats.files import atomic_file
    from exl2ray.report.style import LIGHT, drawing

    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: a plot ends in {', '.join(FORMATS)}")
    kind = path.suffix.lower().removeprefix(".")
    with drawing(LIGHT):
        figure = draw()
        with atomic_file(path) as f:
            figure.savefig(f, format=kind, dpi=150, metadata={} if kind == "png" else {DATES[kind]: None})


def ladder_figure(rows: Sequence[LadderRow], title: str = "", reference_perplexity: float | None = None) -> Figure:
    """The figure of ``plot_ladder``; to be called, and saved, inside ``style.drawing``."""
    from matplotlib.ticker import MaxNLocator

    from exl2ray.report.style import new_figure, plain_log_axis

    if not rows:
        raise UsageError("a ladder needs at least one row")
    rows = sorted(rows, key=lambda r: r.file_bytes)
    panels = [("perplexity", "perplexity", "perplexity_error")]
    if any(r.kl is not None and r.kl > 0 for r in rows):
        panels.insert(0, ("KL divergence, nats per token", "kl", "kl_error"))
    if any(r.top1 is not None for r in rows):
        panels.append(("top-1 agreement, %", "top1", "top1_error"))
    figure, axes = new_figure(4.0 * len(panels) if len(panels) > 1 else 6.0, 3.6, len(panels))
    factor, unit = (1e9, "GB") if rows[-1].file_bytes >= 1e9 else (1e6, "MB")
    for ax, (label, name, error_name) in zip(axes, panels, strict=True):
        _panel(ax, rows, name, error_name, factor)
        ax.set_ylabel(label)
        ax.set_xlabel(f"size of the files, {unit}")
        ax.margins(x=0.16, y=0.16)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        if name == "kl":
            plain_log_axis(ax, "y")
        if name == "perplexity" and reference_perplexity is not None:
            ax.axhline(reference_perplexity, linestyle="--", linewidth=1, color=ax.xaxis.label.get_color(), alpha=0.6)
            ax.annotate("source", (0, reference_perplexity), xycoords=("axes fraction", "data"), ha="left", va="bottom",
                        xytext=(3, 2), textcoords="offset points", fontsize=8)  # fmt: skip
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def _panel(ax: Axes, rows: Sequence[LadderRow], name: str, error_name: str, factor: float) -> None:
    from exl2ray.report.style import ACCENT, clean_label

    scale = 100.0 if name == "top1" else 1.0
    points = [(r, getattr(r, name), getattr(r, error_name)) for r in rows]
    points = [(r, v * scale, (e or 0.0) * scale) for r, v, e in points if v is not None and (name != "kl" or v > 0)]
    x = [r.file_bytes / factor for r, _, _ in points]
    y = [v for _, v, _ in points]
    below = name == "top1"  # labels beside the curve, which rises here and falls elsewhere
    ax.errorbar(x, y, yerr=[e for _, _, e in points], color=ACCENT, marker="o", markersize=5, linewidth=1.5, capsize=3)
    for (row, _, _), at in zip(points, zip(x, y, strict=True), strict=True):
        ax.annotate(clean_label(row.label) or f"{row.bpw:.3f}".rstrip("0").rstrip("."), at, xytext=(6, -10 if below else 4),
                    textcoords="offset points", fontsize=8)  # fmt: skip
