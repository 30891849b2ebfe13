#!/usr/bin/env python3
"""Plots KL divergence over file size, a curve for each way to quantise a model: of a table in a log, or of results.

    python scripts/kl_over_bytes.py --log docs/log.md --entry "KL over bytes, two passes" --output docs/kl-over-bytes.svg
    python scripts/kl_over_bytes.py --log docs/log.md --entry "Gemma 3 270M without" --output docs/kl-over-bytes-gemma.svg
    python scripts/kl_over_bytes.py results.jsonl --model smollm2 --output kl.svg

In a log, the table is the first one, of the entry if one is named, whose second column is "file, MB"; every further column
is a curve, and a cell counts by the number that it begins with. Results of quality.py give a curve for each variant; draws
are averaged.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import quality_table  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

from exl2ray.errors import Exl2RayError, UsageError  # noqa: E402
from exl2ray.report.style import MARKERS, SERIES, Plot, clean_label, plain_log_axis, write_plots  # noqa: E402

SIZE = "file, MB"
Curves = dict[str, list[tuple[float, float]]]  # name -> (megabytes, KL), by size


def of_log(text: str, entry: str = "") -> Curves:
    """The curves of the table, in the order of its columns; none if there is no such table. entry: begins below a heading
    with these words."""
    lines = iter(_below(text.splitlines(), entry) if entry else text.splitlines())
    heading = next((line for line in lines if line.startswith("|") and _cells(line)[1:2] == [SIZE]), None)
    curves: Curves = defaultdict(list)
    for line in lines if heading is not None else ():
        if not line.startswith("|"):
            break
        size, *cells = _cells(line)[1:]
        for name, cell in zip(_cells(heading or "")[2:], cells, strict=True):
            number = re.match(r"\*{0,2}(\d[\d.]*)", cell)
            if number:
                curves[name].append((float(size), float(number[1])))
    return dict(curves)


def _below(lines: Sequence[str], entry: str) -> list[str]:
    """The lines between the first heading with these words and the next one of its level or above."""
    begin = next((i for i, line in enumerate(lines) if line.startswith("#") and entry in line), len(lines))
    level = len(lines[begin].split()[0]) if begin < len(lines) else 0
    rest = lines[begin + 1 :]
    end = next((i for i, line in enumerate(rest) if re.match(f"#{{1,{max(1, level)}}} ", line)), len(rest))
    return list(rest[:end])


def of_results(results: Iterable[quality_table.Result], model: str | None) -> Curves:
    """A curve for each variant of one model: the one that is named, or the first."""
    found: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for r in results:
        model = model or r["model"]
        if r["model"] == model:
            found[r["variant"], r["bits"]].append((r["file_bytes"] / 1e6, mean(r["rows"]["kl"])))
    curves: Curves = defaultdict(list)
    for (variant, _), points in found.items():
        curves[variant].append((mean(x for x, _ in points), mean(y for _, y in points)))
    return {name: sorted(points) for name, points in curves.items()}


def plot(curves: Curves, path: Path, title: str = "") -> None:
    """Raises UsageError for no curves, and as `style.write_plots`."""
    if not curves:
        raise UsageError("no figures to plot", f"a table with the columns bpw and {SIZE}, or results of quality.py")

    def draw(ax: Axes) -> None:
        for i, (name, points) in enumerate(curves.items()):
            colour, marker = SERIES[i % len(SERIES)], MARKERS[i % len(MARKERS)]
            x, y = zip(*points, strict=True)
            ax.plot(x, y, color=colour, marker=marker, markersize=5, linewidth=1.4, label=clean_label(name))
        ax.set(xlabel="size of the file, MB", ylabel="KL from the source, nats per token")
        plain_log_axis(ax, "y")
        ax.margins(x=0.08, y=0.25)
        ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)  # above: curves cross all of the plot

    write_plots([Plot(title, draw, height=3.6)], path, title)


def _cells(line: str) -> list[str]:
    return [c.strip() for c in line.strip().strip("|").split("|")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", type=Path, help="files of quality.py, JSON lines")
    parser.add_argument("--log", type=Path, help="a page with a table of sizes and divergences")
    parser.add_argument("--entry", default="", help="of that page: the table below a heading with these words")
    parser.add_argument("--model", help="of the results; the first one if absent")
    parser.add_argument("--title", default="")
    parser.add_argument("--output", type=Path, required=True, help="PNG, SVG or PDF")
    args = parser.parse_args(arguments)
    curves = of_results(quality_table.load(args.results), args.model)
    if args.log is not None:
        curves.update(of_log(args.log.read_text(encoding="utf-8"), args.entry))
    try:
        plot(curves, args.output, args.title)
    except Exl2RayError as e:
        print(f"error: {e}", file=sys.stderr)
        return e.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
