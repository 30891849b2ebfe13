"""How plots look, on light and on dark paper, and how they become files or part of a page.

A plot is a function that draws on one pair of axes. On the page each is a picture of its own, so that a narrow window
stacks what a wide one shows side by side; a file has them in a row.
"""

from __future__ import annotations

import base64
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

_shown_by = os.environ.pop("MPLBACKEND", None)  # a notebook's, say, that is not installed here; we only write files
import matplotlib.style  # noqa: E402
from matplotlib import rc_context  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.colors import LinearSegmentedColormap  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator  # noqa: E402

if _shown_by is not None:
    os.environ["MPLBACKEND"] = _shown_by

from exl2ray.errors import Exl2RayError, StoreError  # noqa: E402
from exl2ray.formats.files import atomic_file  # noqa: E402
from exl2ray.report.plot_files import check_plot  # noqa: E402
from exl2ray.terminal.console import clean  # noqa: E402

ACCENT = "#3f7fd0"
SERIES = (ACCENT, "#d98a1f", "#1f9e9a", "#d1495b", "#8a63d2", "#7a7a7a")
# Readable on white and on near black alike: neither end is much lighter or darker than the other.
DEPTH = LinearSegmentedColormap.from_list("depth", ["#4f6bd8", "#1f9e9a", "#d98a1f", "#d1495b"])
MARKERS = "osD^vP*X"
MAX_LABEL = 28  # characters
THEMES = {
    "light": {"ink": "#1d2126", "grid": "#d8dce1", "face": "#ffffff"},
    "dark": {"ink": "#e4e7eb", "grid": "#363c44", "face": "#15181c"},
}  # the colours of page.html
WIDTH = 4.4  # inches of one plot: legible on a phone, and three of them beside each other on a desk
DATES = {"svg": "Date", "pdf": "CreationDate"}  # names of what would differ from run to run

Draw = Callable[[Axes], None]


@dataclass(frozen=True)
class Plot:
    """height: inches, at WIDTH; wide: twice as wide where the window has room for it."""

    title: str
    draw: Draw
    height: float = 3.2
    wide: bool = False


def svg_uris(plot: Plot) -> dict[str, str]:
    """The plot as ``data:`` addresses of SVG pictures by theme; those of a wide one also as "wide light" and "wide dark"."""
    out = {}
    for theme, colours in THEMES.items():
        for name, width in ((theme, WIDTH), (f"wide {theme}", 2 * WIDTH))[: 1 + plot.wide]:
            with _drawing(colours):
                figure = Figure(figsize=(width, plot.height), layout="constrained")
                plot.draw(figure.subplots())
                buffer = BytesIO()
                figure.savefig(buffer, format="svg", metadata={DATES["svg"]: None})
            out[name] = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
    return out


def write_plots(plots: Sequence[Plot], path: str | Path, title: str = "") -> None:
    """Writes plots in a row on white as PNG, SVG or PDF, as the ending of ``path`` says; always the same bytes.

    Raises UsageError for another ending or a folder that is missing, StoreError if the file cannot be written.
    """
    check_plot(path)
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".")
    with _refused(path), _drawing(THEMES["light"]):
        figure = Figure(figsize=(WIDTH * len(plots), max(p.height for p in plots)), layout="constrained")
        for plot, ax in zip(plots, figure.subplots(1, len(plots), squeeze=False)[0], strict=True):
            plot.draw(ax)
            ax.set_title(plot.title if len(plots) > 1 else "")
        figure.suptitle(clean_label(title) if title else "", fontsize=10)
        with atomic_file(path) as f:
            figure.savefig(f, format=kind, dpi=150, metadata={} if kind == "png" else {DATES[kind]: None})


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What matplotlib cannot do, with its settings and fonts as they are here, is an error of ours."""
    try:
        yield
    except (Exl2RayError, OSError, MemoryError):
        raise
    except Exception as e:
        raise StoreError(f"{path}: cannot be drawn: {type(e).__name__}: {str(e)[:200]}", "see matplotlib's settings") from e


@contextmanager
def _drawing(colours: Mapping[str, str]) -> Iterator[None]:
    """Figures are made and saved inside: our style whatever the user's is, and no warnings about missing glyphs."""
    ink, face = colours["ink"], colours["face"]
    inks = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    faces = ("axes.facecolor", "figure.facecolor", "savefig.facecolor")
    settings: Any = {
        **dict.fromkeys(inks, ink), **dict.fromkeys(faces, face), "grid.color": colours["grid"], "grid.linewidth": 0.6,
        "font.size": 9.5, "font.family": ["DejaVu Sans"], "axes.titlesize": 10, "legend.fontsize": 8, "legend.frameon": False,
        "text.parse_math": False,  # names may hold anything, dollar signs too
        "axes.grid": True, "axes.spines.top": False, "axes.spines.right": False, "axes.formatter.use_mathtext": False,
        "svg.fonttype": "path",  # the same picture wherever it is opened
        "svg.hashsalt": "exl2ray",  # the same bytes for the same picture
    }  # fmt: skip
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)  # it remarks on building its font cache
    try:
        with warnings.catch_warnings(), matplotlib.style.context("default"), rc_context(settings):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def plain_log_axis(ax: Axes, which: str) -> None:
    """Log scale with labels such as 0.05 and not powers of ten; about a handful of them whatever the range."""
    (ax.set_yscale if which == "y" else ax.set_xscale)("log")
    low, high = ax.get_ylim() if which == "y" else ax.get_xlim()
    decades = math.log10(high / low) if low > 0 else 3.0
    steps = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axis = ax.yaxis if which == "y" else ax.xaxis
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def clean_label(text: str) -> str:
    """Text of a label: printable, and cut where it would take the room of the plot."""
    text = clean(text.replace("\n", " "))
    return text if len(text) <= MAX_LABEL else text[: MAX_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
