"""What a conversion has made: the summary of each finished model, and of the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OutputSummary:
    """One converted model, as the event "done" and a program that calls `exl2ray.convert` get it."""

    bits: float  # requested
    achieved_bpw: float  # of the decoder layers, overheads included
    directory: str | None  # complete model, None without -cf
    files: tuple[str, ...]
    file_bytes: int
    calibration_perplexity: float | None  # None: not a finite number
    reference_perplexity: float | None  # of the source model, on the same rows
    heldout_perplexity: float | None = None  # on held-out text, with the next two, where it was evaluated
    kl: float | None = None  # mean KL(source || model), nats per token
    top1: float | None = None  # share of positions where the most probable token is the source's
    head_bpw: float | None = None  # bits per weight of the output head, overheads included
    tuned: Mapping[str, Any] | None = None  # by --tune: kept, steps, before, after, ... (`exl2ray.tune.run.Tuned`)


@dataclass(frozen=True)
class Summary:
    """What a whole run has made."""
    outputs: tuple[OutputSummary, ...]
    measurement: str  # path of measurement.json
    seconds: float
    warnings: tuple[str, ...] = ()  # those that concern the result, each told before
