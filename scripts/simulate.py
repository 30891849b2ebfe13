#!/usr/bin/env python3
"""How conversions scale over 1 to 64 GPUs, simulated from what the items of a conversion cost on one.

    python scripts/simulate.py                    the table
    python scripts/simulate.py --write-docs       the same, into docs/scaling.md
    python scripts/simulate.py --costs MINE.json  other costs; `schedule_costs.py` says what the fields mean

Passes: "measure", quantisation on "reference" states, quantisation on "quantized" states of one bitrate, and a "ladder" of
three. `scaling.py --compare` prints the same beside what was measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from schedule_costs import Costs
from schedules import Result, chains, source_modules

ROOT = Path(__file__).resolve().parents[1]
COSTS, DOCS = ROOT / "scripts" / "costs.json", ROOT / "docs" / "scaling.md"
BEGIN, END = "<!-- table of scripts/simulate.py -->\n", "<!-- end of table -->\n"
GPUS = (1, 2, 4, 8, 16, 32, 64)
PASSES = ("measure", "reference", "quantized", "ladder")
BITRATES = 3  # of a ladder
COUNTS = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)  # among which enough GPUs are looked for
ENOUGH = 0.95  # of the best speed-up


def predict(costs: Costs, model: str, kind: str, gpus: int, layers: int | None = None) -> Result:
    """One pass of a model, perhaps of ``layers`` layers only."""
    made = costs.models[model]
    if layers is not None:
        made = replace(made, layers=layers)
    if kind in ("quantized", "ladder"):
        return chains(costs, made, gpus, BITRATES if kind == "ladder" else 1)
    return source_modules(costs, made, gpus, kind == "measure")


class Simulation:
    """Results by model, pass and number of GPUs, each computed once."""

    def __init__(self, costs: Costs) -> None:
        self.costs = costs
        self.result = cache(self._result)

    def _result(self, model: str, kind: str, gpus: int) -> Result:
        return predict(self.costs, model, kind, gpus)

    def speed_up(self, model: str, kind: str, gpus: int) -> float:
        return self.result(model, kind, 1).seconds / self.result(model, kind, gpus).seconds

    def enough(self, model: str, kind: str) -> int:
        """The smallest number of GPUs with nearly the best speed-up: of 1 to 16 and some above."""
        ups = {n: self.speed_up(model, kind, n) for n in COUNTS}
        return next(n for n, up in ups.items() if up >= ENOUGH * max(ups.values()))

    def limit(self, model: str, kind: str) -> str:
        """What more GPUs do not shorten."""
        r = self.result(model, kind, max(GPUS))
        total = sum(r.front.values())
        chained = kind in ("quantized", "ladder")
        if not chained and total < 0.8 * r.seconds:
            return "fewer modules than GPUs"
        largest = sorted(r.front.items(), key=lambda p: -p[1])[:3]
        shares = ", ".join(f"{name} {100 * s / total:.0f} %" for name, s in largest)
        return f"{'each module' if chained else 'the way through the model'}: {shares}"

    def table(self, gpus: Sequence[int] = GPUS) -> str:
        """Markdown: seconds on one GPU, speed-up on several, how many are enough, and why."""
        head = " | ".join(map(str, gpus[1:]))
        lines = [f"Costs: {self.costs.source}.", "", f"| model | pass | 1 GPU | {head} | enough | what limits it |"]
        lines.append("|---|---|" + "---:|" * (len(gpus) + 1) + "---|")
        for model in self.costs.models:
            for kind in PASSES:
                ups = " | ".join(f"{self.speed_up(model, kind, n):.1f}x" for n in gpus[1:])
                cells = [model, kind, f"{self.result(model, kind, 1).seconds:.0f} s", ups]
                cells += [str(self.enough(model, kind)), self.limit(model, kind)]
                lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", *self.whole(gpus)]) + "\n"

    def whole(self, gpus: Sequence[int] = GPUS) -> list[str]:
        """Lines of a table: whole commands that make one bitrate: start, measuring, and writing as far as quantising does not
        cover it.
        """
        c = self.costs
        ends = f"{gpus[0]} and {gpus[-1]}"
        lines = [f"| model | whole command | share of start and writing on {ends} | {' | '.join(map(str, gpus))} |"]
        lines.append("|---|---|---:|" + "---:|" * len(gpus))
        for model, made in c.models.items():
            written = sum(sum(m.packed_gb.values()) for m in made.chain()) / c.write_gb_s
            for kind in ("reference", "quantized"):
                uncovered = [max(0.0, written - self.result(model, kind, n).seconds) for n in gpus]
                starts = [c.start_s if n == 1 else c.group_start_s for n in gpus]
                besides = [sum(both) for both in zip(uncovered, starts, strict=True)]
                passes = [sum(self.result(model, k, n).seconds for k in ("measure", kind)) for n in gpus]
                took = [sum(both) for both in zip(besides, passes, strict=True)]
                shares = f"{100 * besides[0] / took[0]:.0f} %, {100 * besides[-1] / took[-1]:.0f} %"
                lines.append(f"| {model} | {kind} | {shares} | {' | '.join(f'{t:.0f} s' for t in took)} |")
        return lines


def with_table(page: str, content: str) -> str:
    """The page with its table replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + content + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, default=COSTS)
    parser.add_argument("--write-docs", action="store_true", help=f"put the table into {DOCS.relative_to(ROOT)}")
    args = parser.parse_args()
    content = Simulation(Costs.load(args.costs)).table()
    if args.write_docs:
        DOCS.write_text(with_table(DOCS.read_text(encoding="utf-8"), content), encoding="utf-8")
    else:
        print(content, end="")


if __name__ == "__main__":
    main()
