"""Results of evaluations as JSON, read back: from ``exl2ray eval --json``, a work directory or a published repository.

The form is `results.schema.json` in this folder. Loads no torch: reports, cards and plots of results need none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl2ray.errors import FormatError
from exl2ray.formats.json_file import as_number, parse_json_object, read_bounded

EVALUATION = "evaluation.json"  # in work directories and published repositories
MAX_BYTES = 64 << 20
HINT = "write it with: exl2ray eval ... --json > FILE; or take evaluation.json of a work directory"
TAIL = ("p95", "p99", "p99.9", "max")  # figures of the tail of KL, in the order of tables
TAIL_NAMES = {"p95": "95 %", "p99": "99 %", "p99.9": "99.9 %", "max": "maximum"}


@dataclass(frozen=True)
class Figure:
    """error: standard error over rows. low, high: 95 % interval. None where not known."""

    value: float
    error: float | None = None
    low: float | None = None
    high: float | None = None

    def text(self, form: str, error_form: str = "", pm: str = " ± ") -> str:
        """``1.23 ± 0.04``, or ``1.23 (1.1 to 1.4)`` where only the interval is known."""
        text = format(self.value, form)
        if self.error is not None:
            return f"{text}{pm}{format(self.error, error_form or form)}"
        return text if self.low is None or self.high is None else f"{text} ({self.low:{form}} to {self.high:{form}})"


@dataclass(frozen=True)
class Kind:
    """One kind of text within an evaluation. predictions: tokens that count."""

    predictions: int
    perplexity: Figure
    kl: Figure | None
    top1: Figure | None


@dataclass(frozen=True)
class Evaluation:
    """One model on ``rows`` rows of ``length`` tokens; the figures with None need the source model beside it.

    kl: KL(source || model), nats per token; top1, top5: agreement with the source, 0 to 1. kl_tail: percentiles of the KL of
    single predictions by the names of ``TAIL``. decoder_bpw, head_bpw: stored bits per weight of linears and head; file_bpw:
    of the files, per parameter. kinds: by kind of text, where the text has kinds. weights: hash of the model's tensors, ""
    from earlier versions and for GGUF files.
    """

    model: str
    reference: str
    rows: int
    length: int
    predictions: int
    perplexity: Figure
    reference_perplexity: Figure | None = None
    nll_increase: Figure | None = None
    kl: Figure | None = None
    top1: Figure | None = None
    top5: Figure | None = None
    kl_tail: Mapping[str, Figure] = field(default_factory=dict)
    kinds: Mapping[str, Kind] = field(default_factory=dict)
    file_bytes: int = 0
    decoder_bpw: float | None = None
    head_bpw: float | None = None
    file_bpw: float | None = None
    warnings: tuple[str, ...] = ()
    weights: str = ""
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # as it was read

    @property
    def is_gguf(self) -> bool:
        """Whether the model is a GGUF file."""
        return self.model.lower().endswith(".gguf")

    @property
    def paired_error(self) -> float | None:
        """Standard error of the perplexity's distance from the source's: rows differ in difficulty for all models alike."""
        paired = self.nll_increase.error if self.nll_increase is not None else None
        return self.perplexity.error if paired is None else self.perplexity.value * paired


def read_evaluations(path: str | Path) -> list[Evaluation]:
    """All results of a file. Raises FormatError."""
    return parse_evaluations(read_bounded(Path(path), MAX_BYTES, FormatError, HINT), str(path))


def parse_evaluations(raw: bytes, where: str) -> list[Evaluation]:
    """All results of a file, in their order; FormatError naming the file and the field."""
    results = parse_json_object(raw, where, FormatError, unique=True).get("results")
    if not isinstance(results, list) or not all(isinstance(r, dict) for r in results):
        raise FormatError(f"{where}: 'results' is missing or not a list of objects", HINT)
    return [parse_evaluation(r, f"{where}: results[{i}]") for i, r in enumerate(results)]


def parse_evaluation(result: Mapping[str, Any], where: str) -> Evaluation:
    """One entry of "results". Raises FormatError naming ``where`` and the field."""
    perplexity = _figure(result, "perplexity", where)
    if perplexity is None or perplexity.value <= 0:
        raise FormatError(f"{where}: 'perplexity' is missing", HINT)
    top1 = _figure(result, "top1_agreement", where)
    if top1 is not None and not 0 <= top1.value <= 1:
        raise FormatError(f"{where}: 'top1_agreement' is {top1.value:g}, not a share from 0 to 1", HINT)
    tail = result.get("kl_tail")
    tail = {n: f for n in TAIL if isinstance(tail, Mapping) and (f := _figure(tail, n, where)) is not None}
    kinds = result.get("kinds")
    counts = (_count(result, n, where) for n in ("rows", "length", "predictions", "file_bytes"))
    rows, length, predictions, file_bytes = counts
    warnings = result.get("warnings")
    return Evaluation(
        str(result.get("model", "?")), str(result.get("reference") or ""), rows, length, predictions, perplexity,
        _figure(result, "reference_perplexity", where), _figure(result, "nll_increase", where), _figure(result, "kl", where),
        top1, _figure(result, "top5_agreement", where), tail,
        {str(k): _kind(v, f"{where}: {k}") for k, v in kinds.items()} if isinstance(kinds, Mapping) else {},
        file_bytes, as_number(result.get("linears_bpw")), as_number(result.get("head_bpw")),
        as_number(result.get("file_bpw")),
        tuple(w for w in warnings if isinstance(w, str)) if isinstance(warnings, list) else (),
        _text(result, "weights"), result,
    )  # fmt: skip


def _kind(value: Any, where: str) -> Kind:
    result = value if isinstance(value, Mapping) else {}
    perplexity = _figure(result, "perplexity", where)
    if perplexity is None:
        raise FormatError(f"{where}: 'perplexity' is missing", HINT)
    kl, top1 = _figure(result, "kl", where), _figure(result, "top1_agreement", where)
    return Kind(_count(result, "predictions", where), perplexity, kl, top1)


def _figure(result: Mapping[str, Any], name: str, where: str) -> Figure | None:
    found = result.get(name)
    if found is None:
        return None
    fields = found if isinstance(found, Mapping) else {}
    value, error = as_number(fields.get("value")), as_number(fields.get("standard_error"))
    if value is None:
        raise FormatError(f"{where}: {name!r} has no finite 'value'", HINT)
    return Figure(value, None if error is None else abs(error), as_number(fields.get("low")), as_number(fields.get("high")))


def _text(result: Mapping[str, Any], name: str) -> str:
    found = result.get(name)
    return found if isinstance(found, str) else ""


def _count(result: Mapping[str, Any], name: str, where: str) -> int:
    found = result.get(name, 0)
    if type(found) is not int or found < 0:
        raise FormatError(f"{where}: {name!r} is {str(found)[:40]}, not a count", HINT)
    return found


# ---- what it means ----------------------------------------------------------------------------------------------------

# (KL below which, in a word, in words). Mean KL in nats per token; a convention, for models that work: as a rule 6 bits and
# more are in the first class, 5 and 4 in the second, 3 in the third and fourth, 2 in the last two; larger models do better.
CLASSES = (
    (0.01, "excellent", "hardly to be told from the source model"),
    (0.05, "good", "close to the source model"),
    (0.15, "fair", "noticeably different from the source model now and then"),
    (0.5, "poor", "clearly worse than the source model; more bits would help"),
    (math.inf, "bad", "not much like the source model any more; use more bits"),
)


def verdict(kl: float) -> tuple[str, str]:
    """(class in a word, what it means) of a mean KL divergence from the source, nats per token."""
    return next((word, meaning) for limit, word, meaning in CLASSES if kl < limit or limit == math.inf)


def judged(perplexity: float, reference: float | None, kl: float | None, top1: float | None = None) -> tuple[str, str]:
    """(class, one sentence) of a model: whether it is good, by which figures, and what they mean.

    Without a KL divergence that of the perplexities, ln(perplexity / reference), stands in: what the average token lost.
    """
    if reference is None or reference <= 0 or perplexity <= 0:
        return "", f"Perplexity {perplexity:.4g}; there is nothing to compare it with."
    word, meaning = verdict(kl if kl is not None else max(0.0, math.log(perplexity / reference)))
    figures = [] if kl is None else [f"KL divergence {kl:.2g} nats per token"]
    figures.append(f"perplexity {perplexity:.4g} against {reference:.4g} of the source ({perplexity / reference - 1:+.1%})")
    if top1 is not None:
        figures.append(f"the most probable token is another one in {1 - top1:.1%} of places")
    return word, f"{meaning[0].upper()}{meaning[1:]}: {', '.join(figures)}."
