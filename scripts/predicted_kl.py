#!/usr/bin/env python3
"""Plots predicted over measured KL divergence of what quality.py converted, or of the table in a log.

    python scripts/predicted_kl.py results.jsonl more.jsonl --output predicted-kl.svg
    python scripts/predicted_kl.py --log docs/log.md --output docs/predicted-kl.svg

Results of conversions whose measurement holds sensitivities have a prediction; others are left out. Draws are averaged. In a
log, the table is the one with a column "predicted KL: A, B, C", whose KL stands in the columns before it.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import quality_table  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from exl2ray.errors import Exl2RayError, UsageError  # noqa: E402
from exl2ray.report.style import MARKERS, SERIES, Plot, clean_label, plain_log_axis, write_plots  # noqa: E402

HEADING = "predicted KL: module, -hb 6, linear"  # of the table's last column
NAMES = ("module", "linear -hb 6", "linear")  # of its columns of measured KL, in the order of the predictions


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


def plot_prediction(points: Sequence[PredictedKL], path: str | Path, title: str = "") -> None:
    """Writes ``prediction_plots`` as PNG, SVG or PDF. Raises as `style.write_plots`, and UsageError for no points."""
    write_plots(prediction_plots(points), path, title)


def prediction_plots(points: Sequence[PredictedKL]) -> list[Plot]:
    """Measured over predicted KL on log axes with the diagonal, and their ratio by bitrate. UsageError for no points."""
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


def of_results(results: Iterable[quality_table.Result]) -> list[PredictedKL]:
    """A point per model, bitrate and variant."""
    found: dict[tuple[str, float, str], list[tuple[float, float]]] = defaultdict(list)
    for r in results:
        predicted, rows = r.get("predicted_kl"), r["rows"].get("kl")
        measured = mean(rows) if rows else None
        if usable(predicted, measured):
            found[r["model"], r["bits"], r["variant"]].append((predicted, measured))  # type: ignore[arg-type]
    return [
        PredictedKL(bits, mean(p for p, _ in draws), mean(m for _, m in draws), None, model, variant)
        for (model, bits, variant), draws in found.items()
    ]


def of_log(text: str) -> list[PredictedKL]:
    """The points of the table; none if there is no such table."""
    lines = iter(text.splitlines())
    heading = next((line for line in lines if HEADING in line), None)
    if heading is None:
        return []
    columns = _cells(heading)
    points = []
    for line in lines:
        if not line.startswith("|"):
            break
        if set(line) <= set("|- "):
            continue
        row = dict(zip(columns, _cells(line), strict=True))
        predictions = [float(v) for v in re.findall(r"[\d.]+", row[HEADING])]
        for name, predicted in zip(NAMES, predictions, strict=True):
            points.append(PredictedKL(float(row["-b"]), predicted, float(row[name]), None, row["model"], name))
    return points


def _cells(line: str) -> list[str]:
    return [c.strip() for c in line.strip().strip("|").split("|")]


def agreement(points: Sequence[PredictedKL]) -> str:
    """A line per series: range and mean of measured over predicted."""
    lines = []
    for name in dict.fromkeys(p.series for p in points):
        ratios = [p.ratio for p in points if p.series == name]
        geometric = math.exp(mean(map(math.log, ratios)))
        lines.append(f"{name}: measured over predicted {min(ratios):.2f} to {max(ratios):.2f}, mean {geometric:.2f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="files of quality.py, JSON lines")
    parser.add_argument("--log", type=Path, help="a page with the table of predictions")
    parser.add_argument("--output", type=Path, required=True, help="PNG, SVG or PDF")
    args = parser.parse_args(arguments)
    points = of_results(quality_table.load(args.results))
    if args.log is not None:
        points += of_log(args.log.read_text(encoding="utf-8"))
    try:
        if not points:
            raise UsageError("no result has a prediction", "--allocation linear measures what predictions are made from")
        plot_prediction(points, args.output)
    except Exl2RayError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    print(agreement(points))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
