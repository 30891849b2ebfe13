"""The plots of a report, one function each: facts in, a matplotlib figure out. Called inside ``style.drawing``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from exl2ray.report.allocation import Allocation
from exl2ray.report.chains import Chain
from exl2ray.report.curves import Curve, part_of
from exl2ray.report.style import DEPTH, MARKERS, clean_label, new_figure, plain_log_axis
from exl2ray.report.timeline import Span, Timeline

WIDTH = 10.0  # inches, of every figure of the page
_SMALLEST_ERROR = 1e-6  # on a log axis
_FEW_LAYERS = 16  # up to here cells carry their numbers
_FEW_WORKERS = 40  # up to here workers carry their names


def curves_figure(curves: Sequence[Curve]) -> Figure:
    """Error over bits per weight, a panel per kind of module, a line per layer."""
    parts = list(dict.fromkeys(c.part for c in curves))
    layers = sorted({c.layer for c in curves if c.layer is not None})
    norm = Normalize(layers[0], layers[-1]) if len(layers) > 1 else Normalize(0, 1)
    few = len(layers) <= _FEW_LAYERS
    figure, axes = new_figure(WIDTH, 3.9, len(parts))
    for ax, part in zip(axes, parts, strict=True):
        own = [c for c in curves if c.part == part]
        exact = all(c.weights for c in own)
        for c in own:
            x = [b / c.weights if exact and c.weights else b / 8e6 for b in c.total_bits]
            y = [max(e, _SMALLEST_ERROR) for e in c.errors]
            best = frontier(x, y)
            colour = DEPTH(norm(c.layer or 0))
            ax.plot([a for a, _ in best], [b for _, b in best], color=colour, linewidth=1.1, alpha=0.85)
            if few:
                ax.plot(x, y, color=colour, linestyle="none", marker="o", markersize=2.5, alpha=0.6)
        ax.set_title(clean_label(part))
        ax.set_xlabel("bits per weight of the module" if exact else "size of the module, MB")
        plain_log_axis(ax, "y")
    axes[0].set_ylabel("relative error of the output")
    if len(layers) > 1:
        bar = figure.colorbar(ScalarMappable(norm, DEPTH), ax=axes, label="layer", pad=0.01, fraction=0.03)
        bar.locator = MaxNLocator(6, integer=True)
        bar.outline.set_visible(False)
    return figure


def frontier(x: Sequence[float], y: Sequence[float]) -> list[tuple[float, float]]:
    """Points that no other one beats in both coordinates, from left to right: what is worth choosing."""
    out: list[tuple[float, float]] = []
    for point in sorted(zip(x, y, strict=True)):
        if not out or point[1] < out[-1][1]:
            out.append(point)
    return out


def chain_figure(chains: Sequence[Chain]) -> Figure:
    """Error of every quantised module over its layer, a panel per kind of module, a line per bitrate."""
    found = [(c.bits, part_of(m.key), m.layer, m.error) for c in chains for m in c.modules]
    points = [(bits, part, layer, error) for bits, part, layer, error in found if layer is not None and error is not None]
    parts = list(dict.fromkeys(part for _, part, _, _ in points))
    rates = sorted({bits for bits, *_ in points})
    figure, axes = new_figure(WIDTH, 3.6, len(parts), sharey=True)
    size = 4 if len({layer for _, _, layer, _ in points}) <= 2 * _FEW_LAYERS else 0
    for ax, part in zip(axes, parts, strict=True):
        for i, bits in enumerate(rates):
            line = sorted((layer, max(error, _SMALLEST_ERROR)) for b, p, layer, error in points if (b, p) == (bits, part))
            ax.plot([x for x, _ in line], [y for _, y in line], color=_rate_colour(i, len(rates)), linewidth=1.3,
                    marker=MARKERS[i % len(MARKERS)], markersize=size, label=f"{bits:g} bpw")  # fmt: skip
        ax.set_title(clean_label(part))
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    plain_log_axis(axes[0], "y")
    axes[0].set_ylabel("relative error of the output")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    return figure


def allocation_figure(allocation: Allocation, low: float, high: float) -> Figure:
    """Heat map of one bitrate. ``low``, ``high``: ends of the colour scale, the same for all bitrates of a page."""
    layers, roles = allocation.layers, allocation.roles
    cells = np.array([[allocation.bpw.get((layer, role), np.nan) for layer in layers] for role in roles])
    figure, (ax,) = new_figure(WIDTH, 0.95 + 0.27 * len(roles))
    image = _heat_map(ax, cells, Normalize(low, high if high > low else low + 1), "viridis")
    _layer_labels(ax, layers)
    ax.set_yticks(range(len(roles)), [clean_label(r) for r in roles])
    if len(layers) <= _FEW_LAYERS:
        _numbers(ax, cells, low, high)
    bar = figure.colorbar(image, ax=ax, label="bits per weight", pad=0.01, fraction=0.03)
    bar.locator = MaxNLocator(4)
    bar.outline.set_visible(False)
    return figure


COVERAGE_STEPS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0)  # multiples of a fair share
_COVERAGE = ("#b3202c", "#e0703f", "#f1b26a", "#cfd8dc", "#9cc4de", "#5b9bd0", "#2c64a8")
_NO_TOKENS = "#111111"


def experts_figure(counts: Mapping[int, Sequence[int]]) -> Figure:
    """Calibration tokens of every expert as multiples of a fair share, over layer and expert."""
    layers, experts = sorted(counts), max(len(c) for c in counts.values())
    cells = np.full((experts, len(layers)), np.nan)
    for column, layer in enumerate(layers):
        tokens = np.array(counts[layer], dtype=float)
        cells[: len(tokens), column] = np.where(tokens > 0, tokens / max(tokens.mean(), 1e-9), -1.0)
    few = experts <= _FEW_LAYERS
    figure, (ax,) = new_figure(WIDTH, min(6.0, 1.1 + (0.22 if few else 0.035) * experts))
    names = [f"below {COVERAGE_STEPS[0]:g}", *[f"from {step:g}" for step in COVERAGE_STEPS]]
    colours = ListedColormap([_NO_TOKENS, *_COVERAGE])
    norm = BoundaryNorm([-2.0, 0.0, *COVERAGE_STEPS, 1e30], colours.N)
    _heat_map(ax, cells, norm, colours)
    _layer_labels(ax, layers)
    ax.yaxis.set_major_locator(MaxNLocator(min(experts, 8), integer=True))
    ax.set_ylabel("expert")
    shown = [Patch(facecolor=_NO_TOKENS, label="no tokens", edgecolor=_COVERAGE[3], linewidth=0.5)]
    shown += [Patch(facecolor=c, label=n) for c, n in zip(_COVERAGE, names, strict=True)]
    figure.legend(handles=shown, loc="outside right upper", title="of a fair share", fontsize=8)
    return figure


def timeline_figure(timeline: Timeline) -> Figure:
    """Which worker had work of which stage when; lines where a run began."""
    workers = list(dict.fromkeys(s.worker for s in timeline.spans))
    stages = list(dict.fromkeys(s.stage for s in timeline.spans))
    factor, unit = next((f, u) for f, u in ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
                        if timeline.seconds > 3 * f or f == 1.0)  # fmt: skip
    figure, (ax,) = new_figure(WIDTH, min(7.0, 1.2 + 0.24 * len(workers)))
    rows = {worker: i for i, worker in enumerate(workers)}
    shown: list[Patch] = []
    for i, stage in enumerate(stages):
        own = _joined([s for s in timeline.spans if s.stage == stage], timeline.seconds / 1000)
        for worker in dict.fromkeys(s.worker for s in own):
            ranges = [(s.begin / factor, (s.end - s.begin) / factor) for s in own if s.worker == worker]
            ax.broken_barh(ranges, (rows[worker] - 0.4, 0.8), facecolor=_rate_colour(i, len(stages)), linewidth=0)
        shown.append(Patch(facecolor=_rate_colour(i, len(stages)), label=clean_label(stage)))
    for start in timeline.runs[1:]:
        ax.axvline(start / factor, linestyle=":", linewidth=1.2, color=ax.xaxis.label.get_color())
    ax.set_xlim(0, max(timeline.seconds / factor, 1e-9))
    ax.set_ylim(len(workers) - 0.4, -0.6)
    named = len(workers) <= _FEW_WORKERS
    ax.set_yticks(range(len(workers)) if named else [], [clean_label(w) for w in workers] if named else [])
    ax.set_ylabel("" if named else f"{len(workers)} workers")
    ax.set_xlabel(f"{unit} of running")
    ax.grid(axis="y", visible=False)
    ax.set_axisbelow(True)
    figure.legend(handles=shown, loc="outside right upper", fontsize=8)
    return figure


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


def _rate_colour(index: int, count: int) -> tuple[float, float, float, float]:
    return DEPTH(index / (count - 1) if count > 1 else 0.0)


def _heat_map(ax: Axes, cells: NDArray[np.float64], norm: Normalize, colours: str | ListedColormap) -> ScalarMappable:
    image = ax.imshow(cells, aspect="auto", norm=norm, cmap=colours, interpolation="none")
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def _layer_labels(ax: Axes, layers: Sequence[int]) -> None:
    step = next(s for s in (1, 2, 5, 10, 20, 50, 100, 1000, 10**7) if len(layers) / s <= 24)
    ticks = [i for i, layer in enumerate(layers) if layer % step == 0]
    ax.set_xticks(ticks, [str(layers[i]) for i in ticks])
    ax.set_xlabel("layer")


def _numbers(ax: Axes, cells: NDArray[np.float64], low: float, high: float) -> None:
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            dark = (value - low) / max(high - low, 1e-9) < 0.6
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="#ffffff" if dark else "#111111")
