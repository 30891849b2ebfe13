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
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import quality_table  # noqa: E402

from exl2ray.errors import Exl2RayError, UsageError  # noqa: E402
from exl2ray.report.ladder import PredictedKL, plot_prediction, usable  # noqa: E402

HEADING = "predicted KL: module, -hb 6, linear"  # of the table's last column
NAMES = ("module", "linear -hb 6", "linear")  # of its columns of measured KL, in the order of the predictions


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
