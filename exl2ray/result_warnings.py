"""What concerns the result of a conversion without stopping it, found from figures; and who has been told.

Every warning of this kind is repeated at the end, and stands on the model card and in the report. All are found again by a
resume, from the same inputs and records, so none depends on which run of a job is the last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exl2ray.calibration.soundness import FEW_EFFECTIVE, Baseline
from exl2ray.events import Reporter
from exl2ray.formats.measurement import Measurement
from exl2ray.quant.measure_moe import starved_experts
from exl2ray.store.records import Record
from exl2ray.store.workdir import WorkDir
from exl2ray.wording import perplexity, some

HIGH_PERPLEXITY, BROKEN_PERPLEXITY, BROKEN_RATIO = 30.0, 1000.0, 10.0
# Of the perplexity that frequencies of tokens have on the built-in rows, a language model that works has 2 to 4 %
# (SmolLM2-135M), models of 2 to 8 M parameters that were trained for minutes have 9 to 15 %. Without two of six layers, with
# RoPE scaled by 8 or 1000, or with twice as many heads it becomes 18 to 70 %.
WEAK_SHARE = 1 / 6
ENOUGH_TOKENS = 4096  # for frequencies to be known well
LIKELY_CAUSES = "tokenizer, config.json (RoPE, heads, eps), -rs, -ra and weights must belong together"


def source_warnings(perplexity: float | None, baseline: Baseline) -> list[str]:
    """What the source model's perplexity on calibration rows says of it; nothing for a model that works."""
    if perplexity is None:
        return []  # the quantised model is judged
    p, unigram = perplexity, baseline.unigram
    start = f"the source model has perplexity {p:.4g} on its calibration rows"
    if p >= 0.98 * baseline.vocabulary:
        return [f"{start}, no better than guessing among {baseline.vocabulary} tokens: as it is read here it is no working "
                f"model; {LIKELY_CAUSES}"]  # fmt: skip
    if unigram is None or unigram < FEW_EFFECTIVE:
        return []  # rows without variety, which have a warning of their own
    if p >= unigram:
        return [f"{start}, no better than the frequencies of the tokens alone ({unigram:.4g}): as it is read here it is no "
                f"working model; {LIKELY_CAUSES}"]  # fmt: skip
    if p > HIGH_PERPLEXITY and p > WEAK_SHARE * unigram and baseline.tokens >= ENOUGH_TOKENS:
        return [f"{start}, not much better than the frequencies of the tokens alone ({unigram:.4g}): it was hardly trained, "
                f"not on such text, or something is wrong with it; {LIKELY_CAUSES}"]  # fmt: skip
    return []


def output_warnings(after: float | None, before: float | None, baseline: Baseline) -> list[str]:
    """What the perplexity of a quantised model says, where it does not show that the model is broken."""
    if after is None:
        return []
    both = f"calibration perplexity {perplexity(after)}, of the source model {perplexity(before)}"
    if after > HIGH_PERPLEXITY and (before is None or before <= HIGH_PERPLEXITY):
        return [f"{both}: above {HIGH_PERPLEXITY:g} is suspicious"]
    limit = min(baseline.vocabulary, baseline.unigram or baseline.vocabulary)
    if after >= limit and before is not None and before < limit:
        return [f"{both}: no better than the frequencies of the tokens alone ({limit:.4g})"]
    return []


def is_broken(after: float | None, before: float | None) -> bool:
    """Whether perplexities show a quantised model that is of no use. Where the source itself is above a limit, only the ratio
    to it counts."""
    if after is None:
        return True
    source_is_fine = before is not None and before <= BROKEN_PERPLEXITY
    return (before is not None and after > BROKEN_RATIO * before) or (after > BROKEN_PERPLEXITY and source_is_fine)


def unspent_warning(bits: float, achieved: float, unspent: float, overridden: bool) -> list[str]:
    """``unspent``: share of the budget that is left although richer options would fit (`exl2ray.allocation.knapsack`)."""
    if not unspent:
        return []
    cause = "--set holds the rest back, or " if overridden else ""
    return [
        f"{bits:g} bpw: the allocation leaves {unspent:.1%} of its budget unused ({achieved:.4f} bits per weight in the "
        f"decoder), because the measurement says that more bits would not help: {cause}it is wrong (sensitivities "
        "of 0, accuracies of 1); measure again without -m"
    ]


def few_scores_warning(scores: Mapping[str, Any] | None) -> list[str]:
    """``scores``: what a measurement says of the rows behind the accuracies by which options are chosen."""
    if scores is None:
        return []
    rows = scores.get("rows")
    shown = rows if type(rows) is int and 0 < rows < 1 << 31 else "some"
    return [
        f"options are chosen by accuracies on {shown} calibration rows: the measurement was made for a choice per linear; "
        "measure again with --allocation module, in another work directory or with -nr, for accuracies on all rows"
    ]


def insensitive_warning(names: Sequence[str], count: int) -> list[str]:
    """``names``: linears, of ``count``, whose error has no effect on the model by the measurement."""
    if not names:
        return []
    return [
        f"the measurement says that {len(names)} of {count} linears have no effect on the model (sensitivity 0), so they get "
        f"the fewest bits: {some(names, 5)}; unless they are empty, it is wrong: measure again without -m"
    ]


def expert_warnings(found: Iterable[tuple[str, Sequence[Mapping[str, float]]]], what: str) -> list[str]:
    """One line for all modules with experts that got few tokens: (module, tokens per expert)."""
    texts = [(key, text) for key, experts in found if (text := starved_experts(experts))]
    if not texts:
        return []
    more = f" and {len(texts) - 1} more modules" if len(texts) > 1 else ""
    return [f"{what}: {texts[0][0]}{more}: {texts[0][1]}"]


def measured_experts(measurement: Measurement) -> list[str]:
    """What a measurement says of experts that got few tokens."""
    found = ((p.entry_key, p.extra.get("experts") or ()) for p in measurement.profiles)
    return expert_warnings(found, "measurement")


@dataclass
class ResultWarnings:
    """The warnings of a job that concern its result, in the order in which they were found, each told once."""

    reporter: Reporter
    work: WorkDir | None = None  # once it is open; what came before is logged then
    of_all: dict[str, None] = field(default_factory=dict)  # of every bitrate; an ordered set
    of_bits: dict[float, dict[str, None]] = field(default_factory=dict)
    _told: set[str] = field(default_factory=set)

    def add(self, texts: Iterable[str], bits: float | None = None, tell: bool = True) -> None:
        """``bits``: the bitrate that they are about; None: all. ``tell``: not, where single events have told it already."""
        known = self.of_all if bits is None else self.of_bits.setdefault(bits, {})
        for text in texts:
            if text in known:
                continue
            known[text] = None
            if tell and text not in self._told:
                self._told.add(text)
                self.reporter.event("warning", message=text)
            if self.work is not None:
                self.work.event("warning", message=text, bits=bits)

    def add_records(self, bits: float, records: Mapping[int, Record], head: int, baseline: Baseline) -> None:
        """What the records of a finished bitrate say. ``head``: index of the module whose record has the perplexities."""
        payload = records[head].payload
        before, after = payload["reference_perplexity"], payload["perplexity"]
        self.add(source_warnings(before, baseline), bits)  # the same for all; by bitrate, so that a card depends on no other
        self.add([f"{bits:g} bpw: {text}" for text in output_warnings(after, before, baseline)], bits)
        experts = ((records[i].key, records[i].payload.get("experts") or ()) for i in sorted(records))
        self.add(expert_warnings(experts, f"{bits:g} bpw"), bits, tell=False)  # each module has

    def opened(self, work: WorkDir) -> None:
        """Everything found before there was a work directory goes into its log."""
        self.work = work
        for text in self.of_all:
            work.event("warning", message=text, bits=None)

    def of(self, bits: float) -> tuple[str, ...]:
        """The warnings of the model of one bitrate, those of every model first."""
        return (*self.of_all, *self.of_bits.get(bits, ()))

    def all(self, bits: Iterable[float]) -> list[str]:
        """All warnings of these bitrates, each once."""
        return list(dict.fromkeys([*self.of_all, *(text for b in bits for text in self.of_bits.get(b, ()))]))
