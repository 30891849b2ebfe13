"""What a running conversion tells: events with a fixed vocabulary, the interface of whoever shows them, and what it has made.

Names are start, stage, item, end, note, warning, done, and error where a program ends; ``docs/events.md`` explains their
fields, ``events.schema.json`` has them for programs. `--json` prints each event as one line {"event": name, ...fields}.
Reporters for people also take table (title, columns, rows), which is no part of a conversion.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


class Reporter(Protocol):
    """Receives events as they happen; implementations show them."""

    def event(self, name: str, **fields: Any) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing; keeps the events for whoever asks (tests)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    def close(self) -> None:
        pass


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
