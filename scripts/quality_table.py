#!/usr/bin/env python3
"""The table of results that quality.py left.

    python scripts/quality_table.py results.jsonl more.jsonl [--first NAME]

Figures are means over the calibration draws. [low, high] are 95 % intervals by bootstrap over evaluation rows, paired for
the ratio of KL to the first variant's; the ratios of single draws follow in parentheses. Sizes that differ from the first
variant's by more than 0.1 % in any draw are marked with the difference.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
RESAMPLES = 4000
SAME_BYTES = 1e-3
HEADINGS = ("model", "calibration", "bits", "variant", "bytes", "bpw", "perplexity", "KL", "KL ratio", "top-1", "quantise s")

Result = dict[str, Any]
Floats = NDArray[np.float64]


def load(paths: Iterable[Path]) -> list[Result]:
    """Results in the order they were made, of equal settings and sources the last one; a line cut short is left out."""
    found: dict[tuple[str, str], Result] = {}
    for path in paths:
        for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            try:
                result = json.loads(text)
            except json.JSONDecodeError:  # the process was killed while it wrote this
                continue
            found[result["key"], result["source"]] = result
    return list(found.values())


def render(results: Sequence[Result], variants: Sequence[str] = ()) -> str:
    """The table, and one of mean ratios if several variants were compared. ``variants``: their order, first one first."""
    order = list(dict.fromkeys([*variants, *(r["variant"] for r in results)]))
    groups: dict[tuple[str, str, float], dict[str, dict[int, Result]]] = {}
    for r in results:
        group = groups.setdefault((r["model"], r["calibration"], r["bits"]), {})
        group.setdefault(r["variant"], {})[r["draw"]] = r
    lines = [row(HEADINGS), row(["---"] * len(HEADINGS))]
    ratios: dict[tuple[str, float], list[float]] = {}
    models: set[str] = set()
    for (model, calibration, bits), group in groups.items():
        first = group.get(order[0], {})
        if model not in models:
            models.add(model)
            lines.append(row([model, "", "16", "(source)", "", "", source_perplexity(group), "0", "", "1", ""]))
        for name in order:
            if name in group:
                cells, ratio = figures(group[name], first)
                lines.append(row([model, calibration, f"{bits:g}", name, *cells]))
                if ratio is not None:
                    ratios.setdefault((name, bits), []).append(ratio)
    if len(order) > 1 and ratios:
        lines += ["", *mean_ratios(ratios, order)]
    return "\n".join(lines)


def document(results: Sequence[Result], variants: Sequence[str] = ()) -> str:
    """`render`, and where the text is of several kinds, KL by kind and in the tails."""
    there = {r["variant"] for r in results}
    parts = [render(results, [v for v in variants if v in there])]
    if any(r.get("kinds") for r in results):
        parts.append("KL by kind of text, with the standard error over its rows:\n\n" + by_kind(results))
    if any(r.get("tails") for r in results):
        parts.append("KL in the tails (the value that so many of all predictions do not exceed):\n\n" + tails(results))
    return "\n\n".join(parts)


def by_kind(results: Sequence[Result]) -> str:
    """A row for each result that knows the kinds of its rows, a column for each kind; draws beside each other."""
    known = [r for r in results if r.get("kinds")]
    kinds = list(dict.fromkeys(k for r in known for k in r["kinds"]))
    lines = [row(["model", "bits", "variant", "draw", *kinds]), row(["---"] * (4 + len(kinds)))]
    for r in known:
        kl, of = np.array(r["rows"]["kl"], dtype=np.float64), np.array(r["kinds"])
        cells = []
        for kind in kinds:
            rows = kl[of == kind]
            error = f" ± {rows.std(ddof=1) / math.sqrt(len(rows)):.4f}" if len(rows) > 1 else ""
            cells.append(f"{rows.mean():.4f}{error}" if len(rows) else "-")
        lines.append(row([r["model"], f"{r['bits']:g}", r["variant"], str(r["draw"]), *cells]))
    return "\n".join(lines)


def tails(results: Sequence[Result]) -> str:
    """Percentiles of the divergences of single predictions."""
    known = [r for r in results if r.get("tails")]
    names = list(dict.fromkeys(n for r in known for n in r["tails"]))
    shown = [f"{float('0.' + n.removeprefix('kl_p')) * 100:g} %" for n in names]
    lines = [row(["model", "bits", "variant", "draw", *shown]), row(["---"] * (4 + len(names)))]
    for r in known:
        cells = [f"{r['tails'][n]:.4f}" for n in names]
        lines.append(row([r["model"], f"{r['bits']:g}", r["variant"], str(r["draw"]), *cells]))
    return "\n".join(lines)


def mean_ratios(ratios: dict[tuple[str, float], list[float]], order: Sequence[str]) -> list[str]:
    """Geometric means of the KL ratios over models and calibration sets."""
    bits = sorted({b for _, b in ratios})
    lines = [row(["KL ratio, geometric mean", *(f"{b:g} bpw" for b in bits)]), row(["---"] * (len(bits) + 1))]
    for name in order:
        cells = [ratios.get((name, b), []) for b in bits]
        shown = [f"{math.exp(sum(map(math.log, c)) / len(c)):.3f} (of {len(c)})" if c else "-" for c in cells]
        lines.append(row([name, *shown]))
    return lines


def figures(draws: dict[int, Result], first: dict[int, Result]) -> tuple[list[str], float | None]:
    """Cells of a variant from its draws, and its ratio of KL to the first variant's over the draws both have."""
    values = list(draws.values())
    nll, kl, top1 = (stack(values, name) for name in ("nll", "kl", "top1"))
    size = np.mean([r["file_bytes"] for r in values])
    off = [draws[d]["file_bytes"] / first[d]["file_bytes"] - 1 for d in draws if d in first]
    worst = max(off, key=abs, default=0.0)
    mark = f" ({worst:+.2%}!)" if abs(worst) > SAME_BYTES else ""
    cells = [
        f"{size:.0f}{mark}",
        f"{np.mean([r['achieved_bpw'] for r in values]):.4f}",
        f"{math.exp(nll.mean()):.3f} [{', '.join(f'{math.exp(x):.3f}' for x in interval(nll))}]",
        f"{kl.mean():.5f} [{', '.join(f'{x:.5f}' for x in interval(kl))}]",
    ]
    shared = sorted(d for d in draws if d in first)
    ratio = None
    if shared:
        ours, theirs = stack([draws[d] for d in shared], "kl"), stack([first[d] for d in shared], "kl")
        ratio = float(ours.mean() / theirs.mean())
        low, high = ratio_interval(ours.mean(0), theirs.mean(0))
        single = ", ".join(f"{a:.3f}" for a in ours.mean(1) / theirs.mean(1))
        is_first = all(draws[d] is first[d] for d in shared)
        cells.append("1" if is_first else f"{ratio:.3f} [{low:.3f}, {high:.3f}] ({single})")
    else:
        cells.append("-")
    low, high = interval(top1)
    cells += [f"{top1.mean():.4f} [{low:.4f}, {high:.4f}]", f"{np.mean([r['quantize_seconds'] for r in values]):.1f}"]
    return cells, ratio


def source_perplexity(group: dict[str, dict[int, Result]]) -> str:
    """Perplexity of the model that was converted, the same in all results of a group."""
    draws = next(iter(group.values()))
    return f"{math.exp(stack(list(draws.values()), 'source_nll').mean()):.3f}"


def stack(results: Sequence[Result], name: str) -> Floats:
    """(draws, evaluation rows)"""
    return np.array([r["rows"][name] for r in results], dtype=np.float64)


def resampled(rows: int) -> NDArray[np.int64]:
    """(RESAMPLES, rows) indices; always the same, so that comparisons are paired."""
    return np.random.default_rng(0).integers(0, rows, (RESAMPLES, rows))


def interval(values: Floats) -> tuple[float, float]:
    """95 % interval of the mean of (draws, rows), rows resampled."""
    rows = values.mean(axis=0)
    low, high = np.percentile(rows[resampled(len(rows))].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def ratio_interval(ours: Floats, theirs: Floats) -> tuple[float, float]:
    """95 % interval of mean(ours) / mean(theirs), (rows,) each, the same rows resampled in both."""
    index = resampled(len(ours))
    low, high = np.percentile(ours[index].mean(axis=1) / theirs[index].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def line(result: Result) -> str:
    """A finished conversion in a few words."""
    kl, nll = np.mean(result["rows"]["kl"]), np.mean(result["rows"]["nll"])
    tune = f"tune {result['tune_seconds']:.1f} s, " if result.get("tune_seconds") else ""
    return (
        f"{result['model']}, {result['calibration']}, draw {result['draw']}, {result['bits']:g} bpw, {result['variant']}: "
        f"{result['file_bytes']} bytes, perplexity {math.exp(nll):.3f}, KL {kl:.5f}; "
        f"measure {result['measure_seconds']:.1f} s, quantise {result['quantize_seconds']:.1f} s, {tune}"
        f"evaluate {result['evaluate_seconds']:.1f} s"
    )


def row(cells: Iterable[str]) -> str:
    return "|" + "|".join("---" if c == "---" else f" {c} " for c in cells) + "|"


def append_log(path: Path, title: str, machine: str, command: str, table: str) -> None:
    """Appends a dated section. Paths of this machine are written relative to the checkout."""
    shown = command.replace(f"{ROOT}/", "").replace(f"{ROOT.parent}/", "../")
    with path.open("a", encoding="utf-8") as f:
        f.write(f"\n## {datetime.date.today().isoformat()} {title} ({machine})\n\n`{shown}`\n\n{table}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path)
    parser.add_argument("--first", help="variant to compare with; the first in the files if absent")
    args = parser.parse_args()
    for path in args.results:
        if not path.is_file():
            parser.error(f"{path}: no such file")
    results = load(args.results)
    names = list(dict.fromkeys(r["variant"] for r in results))
    if not results or (args.first and args.first not in names):
        parser.error(f"the variants in these files are: {', '.join(names) or 'none'}")
    print(document(results, [args.first] if args.first else []))


if __name__ == "__main__":
    main()
