"""What a state of the model is worth, on rows that it is not trained on.

The score is the mean over kinds of text of the logarithm of their mean divergence, so that every kind counts alike; exp of a
difference of two scores is the geometric mean of the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

VARIANTS: Mapping[str, tuple[bool, bool]] = {  # name -> (integers, norms and biases)
    "integers and norms": (True, True),
    "integers": (True, False),
    "norms": (False, True),
}
NOTHING = "nothing"


def by_kind(rows: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Mean of the divergences (R,) of the rows of each kind, in order of appearance."""
    return {kind: float(rows[_where(kinds, kind)].mean()) for kind in dict.fromkeys(kinds)}


def score(rows: Tensor, kinds: Sequence[str]) -> float:
    """Not finite where a divergence is not, minus infinity where one is 0."""
    means = by_kind(rows, kinds).values()
    return sum(math.log(m) if m > 0 else (-math.inf if m <= 0 else math.nan) for m in means) / len(means)


@dataclass(frozen=True)
class Verdict:
    """kept: a name of `VARIANTS` or `NOTHING`. ratio: of its divergence to that of the start, as `score` counts. worse: kinds
    of text that it says worse, beyond two standard errors."""

    kept: str
    ratio: float
    worse: tuple[str, ...]


def decide(start: Tensor, variants: Mapping[str, Tensor], kinds: Sequence[str]) -> Verdict:
    """Which variant is kept. start, variants: divergences (R,) of the same rows.

    One that gains no more than one standard error of the difference does not count; those that are worse on no kind of text
    come first.
    """
    before = score(start, kinds)
    found = []
    for name, rows in variants.items():
        gain = before - score(rows, kinds)
        if not math.isfinite(gain) or gain <= _error(start, rows, kinds):
            continue
        worse = tuple(kind for kind in dict.fromkeys(kinds) if _is_worse(start, rows, _where(kinds, kind)))
        found.append((bool(worse), -gain, Verdict(name, math.exp(-gain), worse)))
    return min(found, key=lambda f: f[:2])[2] if found else Verdict(NOTHING, 1.0, ())


def _error(start: Tensor, rows: Tensor, kinds: Sequence[str]) -> float:
    """Standard error of the difference of the scores, to first order.

    Rows are independent texts, and those of every kind are taken to vary alike, since there may be one of a kind.
    """
    counts, squares = [], 0.0
    for kind in dict.fromkeys(kinds):
        where = _where(kinds, kind)
        difference = rows[where] / rows[where].mean() - start[where] / start[where].mean()
        squares += float(difference.square().sum())
        counts.append(len(where))
    free = len(kinds) - len(counts)
    return math.sqrt(squares / free * sum(1 / n for n in counts)) / len(counts) if free else math.inf


def _is_worse(start: Tensor, rows: Tensor, where: Tensor) -> bool:
    difference = rows[where] - start[where]
    if len(where) < 2:
        return False
    return float(difference.mean()) > 2 * float(difference.std()) / math.sqrt(len(where))


def _where(kinds: Sequence[str], kind: str) -> Tensor:
    return torch.tensor([i for i, k in enumerate(kinds) if k == kind])
