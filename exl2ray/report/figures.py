"""The plots of a report that are about its modules and workers: facts in, plots out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, Colormap, ListedColormap, Normalize
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from exl2ray.report.allocation import Allocation
from exl2ray.report.chains import Chain
from exl2ray.report.curves import Curve, part_of
from exl2ray.report.style import DEPTH, MARKERS, Plot, clean_label, plain_log_axis
from exl2ray.report.time_spent import Span, Timeline
from exl2ray.wording import plural

_SMALLEST_ERROR = 1e-6  # on a log axis
_FEW_LAYERS = 16  # up to here cells carry their numbers
_FEW_WORKERS = 40  # up to here workers carry their names


def curves_plots(curves: Sequence[Curve]) -> list[Plot]:
    """Error over bits per weight, a plot per kind of module, a line per layer."""
    layers = sorted({c.layer for c in curves if c.layer is not None})
    norm = Normalize(layers[0], layers[-1]) if len(layers) > 1 else Normalize(0, 1)

    def draw(ax: Axes, own: Sequence[Curve]) -> None:
        exact = all(c.weights for c in own)
        for c in own:
            x = [b / c.weights if exact and c.weights else b / 8e6 for b in c.total_bits]
            y = [max(e, _SMALLEST_ERROR) for e in c.errors]
            best = frontier(x, y)
            colour = DEPTH(norm(c.layer or 0))
            ax.plot([a for a, _ in best], [b for _, b in best], color=colour, linewidth=1.1, alpha=0.85)
            if len(layers) <= _FEW_LAYERS:
                ax.plot(x, y, color=colour, linestyle="none", marker="o", markersize=2.5, alpha=0.6)
        ax.set(xlabel="bits per weight of the module" if exact else "size of the module, MB", ylabel="relative error")
        plain_log_axis(ax, "y")
        if len(layers) > 1:
            _colour_bar(ax, ScalarMappable(norm, DEPTH), "layer", integer=True)

    parts = dict.fromkeys(c.part for c in curves)
    return [Plot(clean_label(p), lambda ax, p=p: draw(ax, [c for c in curves if c.part == p])) for p in parts]  # type: ignore[misc]


def frontier(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Points that no other one beats in both coordinates, from left to right: what is worth choosing."""
    out: list[tuple[float, float]] = []
    for point in sorted(zip(x, y, strict=True)):
        if not out or point[1] < out[-1][1]:
            out.append(point)
    return out


def chain_plots(chains: Sequence[Chain]) -> list[Plot]:
    """Error of every quantised module over its layer, a plot per kind of module, a line per bitrate."""
    found = [(c.bits, part_of(m.key), m.layer, m.error) for c in chains for m in c.modules]
    points = [(bits, part, layer, error) for bits, part, layer, error in found if layer is not None and error is not None]
    rates = sorted({bits for bits, *_ in points})
    size = 4 if len({layer for _, _, layer, _ in points}) <= 2 * _FEW_LAYERS else 0
    heights = [max(error, _SMALLEST_ERROR) for *_, error in points]

    def draw(ax: Axes, part: str) -> None:
        for i, bits in enumerate(rates):
            line = sorted((layer, max(error, _SMALLEST_ERROR)) for b, p, layer, error in points if (b, p) == (bits, part))
            ax.plot([x for x, _ in line], [y for _, y in line], color=_series_colour(i, len(rates)), linewidth=1.3,
                    marker=MARKERS[i % len(MARKERS)], markersize=size, label=f"{bits:g}")  # fmt: skip
        ax.set(xlabel="layer", ylabel="relative error", ylim=(min(heights) / 1.2, max(heights) * 1.2))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        plain_log_axis(ax, "y")
        if len(rates) > 1:
            _legend_below(ax, title="bits per weight asked for")

    parts = dict.fromkeys(part for _, part, *_ in points)
    return [Plot(clean_label(p), lambda ax, p=p: draw(ax, p), 3.2 + 0.4 * (len(rates) > 1)) for p in parts]  # type: ignore[misc]


def allocation_plot(bits: float, allocation: Allocation, low: float, high: float) -> Plot:
    """Heat map of one bitrate, layers downwards. ``low``, ``high``: ends of the colour scale, the same for all of a page."""
    layers, roles = allocation.layers, allocation.roles
    cells = np.array([[allocation.bpw.get((layer, role), np.nan) for role in roles] for layer in layers])
    norm = Normalize(low, high if high > low else low + 1)

    def draw(ax: Axes) -> None:
        image = _heat_map(ax, cells, norm, "viridis")
        _layer_labels(ax, layers)
        ax.set_xticks(range(len(roles)), [clean_label(r)[:9] for r in roles])
        ax.xaxis.tick_top()
        if len(layers) <= _FEW_LAYERS:
            for (row, column), value in np.ndenumerate(cells):
                if np.isfinite(value):
                    colour = "#ffffff" if norm(value) < 0.6 else "#111111"
                    ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7.5, color=colour)
        _colour_bar(ax, image, "bits per weight")

    return Plot(f"{bits:g} bits per weight asked for", draw, _height(len(layers)))


COVERAGE_STEPS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of a fair share
_COVERAGE = ("#b3202c", "#e0703f", "#f1b26a", "#cfd8dc", "#9cc4de", "#5b9bd0", "#2c64a8")
_NO_TOKENS = "#111111"


def experts_plot(name: str, counts: Mapping[int, Sequence[int]]) -> Plot:
    """Calibration tokens of every expert as multiples of a fair share, over expert and layer."""
    layers, experts = sorted(counts), max(len(c) for c in counts.values())
    cells = np.full((len(layers), experts), np.nan)
    for row, layer in enumerate(layers):
        tokens = np.array(counts[layer], dtype=float)
        cells[row, : len(tokens)] = np.where(tokens > 0, tokens / max(tokens.mean(), 1e-9), -1.0)
    names = [f"below {COVERAGE_STEPS[0]:g}", *[f"from {step:g}" for step in COVERAGE_STEPS]]

    def draw(ax: Axes) -> None:
        colours = ListedColormap([_NO_TOKENS, *_COVERAGE])
        _heat_map(ax, cells, BoundaryNorm([-2.0, 0.0, *COVERAGE_STEPS, 1e30], colours.N), colours)
        _layer_labels(ax, layers)
        ax.xaxis.set_major_locator(MaxNLocator(min(experts, 8), integer=True))
        ax.set_xlabel("expert")
        shown = [Patch(facecolor=_NO_TOKENS, label="no tokens", edgecolor=_COVERAGE[3], linewidth=0.5)]
        shown += [Patch(facecolor=c, label=n) for c, n in zip(_COVERAGE, names, strict=True)]
        _legend_below(ax, shown, title="of a fair share")

    return Plot(f"In the {name}", draw, 0.8 + _height(len(layers)))


def timeline_plot(timeline: Timeline) -> Plot:
    """Which worker had work of which stage when; lines where a run began."""
    spans = timeline.spans
    workers, stages = (list(dict.fromkeys(x)) for x in ([s.worker for s in spans], [s.stage for s in spans]))
    factor, unit = next((f, u) for f, u in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
                        if timeline.seconds > 3 * f or f == 1.0)  # fmt: skip

    def draw(ax: Axes) -> None:
        for i, stage in enumerate(stages):
            for span in _joined([s for s in spans if s.stage == stage], timeline.seconds / 1000):
                at, row = (span.begin / factor, (span.end - span.begin) / factor), workers.index(span.worker)
                ax.broken_barh([at], (row - 0.4, 0.8), facecolor=_series_colour(i, len(stages)), linewidth=0)
        for start in timeline.runs[1:]:
            ax.axvline(start / factor, linestyle=":", linewidth=1.2, color=ax.xaxis.label.get_color())
        ax.set(xlim=(0, max(timeline.seconds / factor, 1e-9)), ylim=(len(workers) - 0.4, -0.6), xlabel=f"{unit} of running")
        named = len(workers) <= _FEW_WORKERS
        ax.set_yticks(range(len(workers)) if named else [], [clean_label(w)[:16] for w in workers] if named else [])
        ax.set_ylabel("" if named else plural(len(workers), "worker"))
        ax.grid(axis="y", visible=False)
        ax.set_axisbelow(True)
        patches = [Patch(facecolor=_series_colour(i, len(stages)), label=clean_label(s)) for i, s in enumerate(stages)]
        _legend_below(ax, patches)

    return Plot("", draw, min(7.0, 1.6 + 0.22 * len(workers)), wide=True)


def _joined(spans: Sequence[Span], gap: float) -> list[Span]:
    """Spans of one stage, those of a worker joined that lie less than ``gap`` seconds apart: fewer, and without seams."""
    last: dict[str, Span] = {}
    out = []
    for span in spans:
        before = last.get(span.worker)
        if before is not None and span.begin - before.end < gap:
            last[span.worker] = replace(before, end=span.end)
        else:
            out += [before] if before is not None else []
            last[span.worker] = span
    return [*out, *last.values()]


def _series_colour(index: int, count: int) -> tuple[float, float, float, float]:
    return DEPTH(index / (count - 1) if count > 1 else 0.0)


def _legend_below(ax: Axes, handles: Sequence[Patch] | None = None, title: str = "") -> None:
    found = handles if handles is not None else ax.get_legend_handles_labels()[0]
    figure = ax.get_figure()
    assert figure is not None
    figure.legend(handles=found, loc="outside lower center", ncols=min(4, len(found)), title=title, title_fontsize=8,
                  columnspacing=1.2, handlelength=1.4)  # fmt: skip


def _colour_bar(ax: Axes, mapped: ScalarMappable, label: str, integer: bool = False) -> None:
    figure = ax.get_figure()
    assert figure is not None
    bar = figure.colorbar(mapped, ax=ax, label=label, pad=0.02, fraction=0.05)
    bar.locator = MaxNLocator(5, integer=integer)
    bar.outline.set_visible(False)


def _heat_map(ax: Axes, cells: NDArray[np.float64], norm: Normalize, colours: str | Colormap) -> ScalarMappable:
    image = ax.imshow(cells, aspect="auto", norm=norm, cmap=colours, interpolation="none")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def _height(layers: int) -> float:
    """Inches of a heat map: rows that can be told apart, a page that can be scrolled."""
    return min(6.5, 0.8 + 0.24 * layers) if layers <= _FEW_LAYERS else min(6.5, 2.4 + 0.09 * layers)


def _layer_labels(ax: Axes, layers: Sequence[int]) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000, 10**7) if len(layers) / s <= 24)
    ticks = [i for i, layer in enumerate(layers) if layer % step == 0]
    ax.set_yticks(ticks, [str(layers[i]) for i in ticks])
    ax.set_ylabel("layer")
