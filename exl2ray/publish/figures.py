"""Results of ``exl2ray eval`` on a card."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2ray.errors import FormatError
from exl2ray.formats.json_file import parse_json_object, read_bounded

MAX_BYTES = 64 << 20
HINT = "write it with: exl2ray eval ... --json > FILE; or take evaluation.json of a work directory"
START, END = "<!-- exl2ray: evaluation -->", "<!-- exl2ray: end of evaluation -->"


@dataclass(frozen=True)
class Figure:
    value: float
    error: float | None  # standard error over rows

    def text(self, form: str, error_form: str = "") -> str:
        return format(self.value, form) + ("" if self.error is None else f" ± {format(self.error, error_form or form)}")


@dataclass(frozen=True)
class Evaluation:
    """One model on ``rows`` rows of ``length`` tokens; the figures with None need the source model beside it."""

    perplexity: Figure
    reference_perplexity: Figure | None
    kl: Figure | None  # KL(source || model), nats per token
    top1: Figure | None  # share of positions where the most probable token is the source's
    rows: int
    length: int
    predictions: int


def parse_evaluation(result: Mapping[str, Any], where: str) -> Evaluation:
    """From an entry of "results" as ``exl2ray eval --json`` prints it. Raises FormatError naming ``where`` and the field."""

    def figure(name: str) -> Figure | None:
        found = result.get(name)
        if found is None:
            return None
        value = _number(found.get("value")) if isinstance(found, Mapping) else None
        if value is None:
            raise FormatError(f"{where}: {name!r} has no finite 'value'", HINT)
        return Figure(value, _number(found.get("standard_error")))

    def count(name: str) -> int:
        found = result.get(name)
        if type(found) is not int or found < 0:
            raise FormatError(f"{where}: {name!r} is {str(found)[:40]}, not a count", HINT)
        return found

    perplexity = figure("perplexity")
    if perplexity is None:
        raise FormatError(f"{where}: 'perplexity' is missing", HINT)
    return Evaluation(
        perplexity, figure("reference_perplexity"), figure("kl"), figure("top1_agreement"),
        count("rows"), count("length"), count("predictions"),
    )  # fmt: skip


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def read_evaluations(path: str | Path) -> list[tuple[str, Evaluation]]:
    """(model directory as it was given to eval, result) for every entry of a file. Raises FormatError."""
    path = Path(path)
    raw = read_bounded(path, MAX_BYTES, FormatError, HINT)
    results = parse_json_object(raw, str(path), FormatError, unique=True).get("results")
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise FormatError(f"{path}: 'results' is missing or not a list of objects", HINT)
    return [(str(r.get("model", "")), parse_evaluation(r, f"{path}: results[{i}]")) for i, r in enumerate(results)]


# ---- on the card ----------------------------------------------------------------------------------------------------


def evaluation_section(evaluation: Evaluation | None) -> str:
    """Markdown between two comments, by which ``with_evaluation`` finds it again; empty between them for None."""
    if evaluation is None:
        return f"{START}\n{END}"
    e, before = evaluation, evaluation.reference_perplexity
    source = "-" if before is None else before.text("#.4g", ".2g")
    rows = [f"| perplexity | {e.perplexity.text('#.4g', '.2g')} | {source} |"]
    if e.kl is not None:
        rows.append(f"| KL divergence from the source (nats per token) | {e.kl.text('.4f')} | 0 |")
    if e.top1 is not None:
        rows.append(f"| top-1 agreement with the source | {e.top1.text('.2%')} | 100% |")
    table = "\n".join(["| | this model | source model |", "|---|---|---|", *rows])
    what = f"Evaluated on {e.predictions} predictions in {e.rows} rows of {e.length} tokens, ± standard error over rows."
    return f"{START}\n## Evaluation\n\n{what}\n\n{table}\n{END}"


def with_evaluation(card: str, evaluation: Evaluation) -> str:
    """``card`` with its evaluation replaced; below everything else on a card that has no place for one."""
    section = evaluation_section(evaluation)
    before, start, rest = card.partition(START)
    _, end, after = rest.partition(END)
    if start and end:
        return f"{before}{section}{after}"
    return f"{card.rstrip()}\n\n{section}\n"
