"""What checks before a conversion find: each problem as the error that a conversion raises, and what is known besides."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TypeVar

import torch

from exl2ray.allocation.overrides import Override
from exl2ray.calibration.rows import Rows
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import Exl2RayError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.measurement import Measurement
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.disk import DiskNeed

T = TypeVar("T")
MANY = ("tensors", "values")  # topics whose problems come in numbers: a checkpoint without a layer lacks a dozen
SHOWN_TENSORS = 5  # in the message of an error; `plan` lists more


@dataclass(frozen=True)
class Problem:
    """Something that would stop a conversion. ``topic``: what to look at, e.g. "tensors", "disk"."""

    topic: str
    error: Exl2RayError  # as a conversion raises it


@dataclass
class Examination:
    """What the checks found. Without problems everything is there; with some, what they leave to be known."""

    device: torch.device | None = None
    source: SourceModel | None = None
    spec: ModelSpec | None = None
    overrides: tuple[Override, ...] = ()  # of --set
    measurement: Measurement | None = None  # of -m
    tokenizer: ModelTokenizer | None = None  # closed
    rows: dict[str, Rows] = field(default_factory=dict)  # "measure", "quantize"
    data: tuple[str, ...] = ()  # every -c, absolute
    disks: list[DiskNeed] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # of what spoils a run without stopping it
    doubts: list[str] = field(default_factory=list)  # warnings that concern the result
    notes: list[str] = field(default_factory=list)

    def attempt(self, topic: str, check: Callable[[], T]) -> T | None:
        """The result of a check, or None and a problem more."""
        try:
            return check()
        except Exl2RayError as e:
            self.add(topic, [e])
            return None

    def add(self, topic: str, errors: Sequence[Exl2RayError]) -> None:
        """Notes problems; the same one found twice is one (a file that both passes read)."""
        known = {p.error.message for p in self.problems}
        self.problems += [Problem(topic, e) for e in errors if e.message not in known]

    def has(self, *topics: str) -> bool:
        return any(p.topic in topics for p in self.problems)

    def raise_any(self) -> None:
        """Raises the problem, or all of them as one error of the first one's kind. Of many tensors some are named."""
        errors: list[Exl2RayError] = []
        for topic, group in groupby(self.problems, key=lambda p: p.topic):
            some = [p.error for p in group]
            errors += [_joined(some, f"{self.source.path}: ")] if topic in MANY and self.source is not None else some
        if len(errors) == 1:
            raise errors[0]
        if errors:
            lines = []
            for i, e in enumerate(errors, 1):
                first, *rest = [*e.lines, *([e.hint] if e.hint else [])]
                lines += [f"{i}. {first}", *(f"   {x}" for x in rest)]
            count = f"{len(errors)} problems would stop this conversion:"
            raise type(errors[0])(count, "`exl2ray plan` with the same flags lists them again", lines)


def _joined(errors: Sequence[Exl2RayError], prefix: str) -> Exl2RayError:
    texts = [e.message if i == 0 else e.message.removeprefix(prefix) for i, e in enumerate(errors[:SHOWN_TENSORS])]
    more = f"; and {len(errors) - SHOWN_TENSORS} more" if len(errors) > SHOWN_TENSORS else ""
    return type(errors[0])("; ".join(texts) + more, errors[0].hint)
