"""How figures look, and how they become part of a page: SVG that takes its colours from the page's style sheet."""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import StringIO
from typing import Any

import matplotlib.style
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from exl2ray.terminal.console import clean

ACCENT = "#3f7fd0"
# Readable on white and on near black alike: neither end is much lighter or darker than the other.
DEPTH = LinearSegmentedColormap.from_list("depth", ["#4f6bd8", "#1f9e9a", "#d98a1f", "#d1495b"])
MARKERS = "osD^vP*X"
MAX_LABEL = 28  # characters

_INK, _GRID = "#0a0b0c", "#0a0b0e"  # stand for colours of the page, see ``svg_text``
PAGE: Mapping[str, str] = {"ink": _INK, "grid": _GRID, "face": "none"}
LIGHT: Mapping[str, str] = {"ink": "#222222", "grid": "#d9d9d9", "face": "#ffffff"}


@contextmanager
def drawing(colours: Mapping[str, str]) -> Iterator[None]:
    """Figures are made and saved inside: our style whatever the user's is, and no warnings about missing glyphs."""
    ink, grid, face = colours["ink"], colours["grid"], colours["face"]
    settings: Any = {
        "font.size": 9,
        "font.family": ["DejaVu Sans"],
        "text.parse_math": False,  # names may hold anything, dollar signs too
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": ink,
        "axes.facecolor": face,
        "figure.facecolor": face,
        "savefig.facecolor": face,
        "axes.titlesize": 10,
        "axes.grid": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.formatter.use_mathtext": False,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": grid,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "svg.fonttype": "path",  # the same picture wherever it is opened
        "svg.hashsalt": "exl2ray",  # the same bytes for the same picture
    }
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # it remarks on building its font cache
    try:
        with warnings.catch_warnings(), matplotlib.style.context("default"), rc_context(settings):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def new_figure(width: float, height: float, panels: int = 1, **shared: Any) -> tuple[Figure, list[Axes]]:
    """A figure of ``panels`` axes in a row; inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, **shared)
    return figure, list(axes[0])


def plain_log_axis(ax: Axes, which: str, unit: str = "") -> None:
    """Log scale with labels such as 0.05 and not powers of ten; about a handful of them whatever the range."""
    (ax.set_yscale if which == "y" else ax.set_xscale)("log")
    low, high = ax.get_ylim() if which == "y" else ax.get_xlim()
    decades = math.log10(high / low) if low > 0 else 3.0
    steps = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis = ax.yaxis if which == "y" else ax.xaxis
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{unit}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def clean_label(text: str) -> str:
    """Text of a label: printable, and cut where it would take the room of the plot."""
    text = clean(text).replace("\n", " ")
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def svg_text(figure: Figure, name: str) -> str:
    """The figure as an <svg> element for a page. ``name``: unique in the page; its ids begin with it.

    Text and axes take the page's colours: ``currentColor`` and the variable ``--grid``. No comments and no metadata.
    """
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Type": None, "Format": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = svg.replace(_INK, "currentColor").replace(_GRID, "var(--grid)")
    return re.sub(r'^<svg [^>]*?(viewBox="[^"]*")[^>]*>', _open_tag, svg, count=1)


def _open_tag(match: re.Match[str]) -> str:
    return f'<svg {match[1]} aria-hidden="true">'  # HTML needs no name spaces
