"""Results of ``exl2ray eval`` for the report: the JSON line that it prints with ``--json``, kept in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2ray.errors import FormatError
from exl2ray.formats.json_file import parse_json_object, read_bounded
from exl2ray.report.ladder import LadderRow
from exl2ray.report.values import mapping, number, texts
from exl2ray.store.fs import Store

EVALUATION = "evaluation.json"  # in the work directory
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Evaluation:
    """One model directory on one set of tokens. ``row``: its figures; ``top5``: agreement, 0 .. 1."""

    model: str
    reference: str
    row: LadderRow
    top5: float | None
    reference_perplexity: float | None
    predictions: int
    warnings: tuple[str, ...]


def read_evaluations(store: Store, files: Sequence[str], problems: list[str]) -> list[Evaluation]:
    """From ``files``, else from evaluation.json of the work directory.

    Raises FormatError for a file that was named and is no result of an evaluation; the other becomes a problem.
    """
    if files:
        named = [(name, read_bounded(Path(name), MAX_BYTES, FormatError, _HINT)) for name in files]
        return [e for name, raw in named for e in parse_evaluations(raw, name)]
    if not store.exists(EVALUATION) or store.size(EVALUATION) > MAX_BYTES:
        return []
    try:
        return parse_evaluations(store.get(EVALUATION), store.full_name(EVALUATION))
    except FormatError as e:
        problems.append(e.message)
        return []


_HINT = "write it with: exl2ray eval ... --json > FILE"


def parse_evaluations(raw: bytes, where: str) -> list[Evaluation]:
    """The results of one file, in their order; FormatError naming the file and the field."""
    results = parse_json_object(raw, where, FormatError, unique=True).get("results")
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise FormatError(f"{where}: 'results' is missing or not a list of objects", _HINT)
    return [_evaluation(r, f"{where}: results[{i}]") for i, r in enumerate(results)]


def _evaluation(result: Mapping[str, Any], where: str) -> Evaluation:
    perplexity, perplexity_error = _figure(result, "perplexity", where)
    _, paired = _figure(result, "nll_increase", where)
    if paired is not None and perplexity is not None:
        perplexity_error = perplexity * paired  # rows differ in difficulty for all models alike
    kl, kl_error = _figure(result, "kl", where)
    top1, top1_error = _figure(result, "top1_agreement", where)
    size, bpw = number(result.get("file_bytes")), number(result.get("linears_bpw"))
    if perplexity is None or perplexity <= 0:
        raise FormatError(f"{where}: 'perplexity' is missing", _HINT)
    if size is None or size <= 0 or bpw is None:
        raise FormatError(f"{where}: 'file_bytes' or 'linears_bpw' is not a number", _HINT)
    if top1 is not None and not 0 <= top1 <= 1:
        raise FormatError(f"{where}: 'top1_agreement' is {top1:g}, not a share from 0 to 1")
    return Evaluation(
        model=str(result.get("model", "?")),
        reference=str(result.get("reference") or ""),
        row=LadderRow(bpw, int(size), perplexity, kl, top1, perplexity_error, kl_error, top1_error),
        top5=_figure(result, "top5_agreement", where)[0],
        reference_perplexity=_figure(result, "reference_perplexity", where)[0],
        predictions=int(number(result.get("predictions")) or 0),
        warnings=texts(result.get("warnings")),
    )


def _figure(result: Mapping[str, Any], name: str, where: str) -> tuple[float | None, float | None]:
    """(value, standard error) of {"value", "standard_error"}; None where there is none."""
    figure = result.get(name)
    if figure is None:
        return None, None
    value, error = number(mapping(figure).get("value")), number(mapping(figure).get("standard_error"))
    if value is None:
        raise FormatError(f"{where}: {name!r} has no finite 'value'", _HINT)
    return value, None if error is None else abs(error)
