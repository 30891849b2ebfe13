"""What a state of the model is worth, on rows that it is not trained on; and what is kept of it.

The score is the mean over kinds of text of the logarithm of their mean divergence, so that every kind counts alike; exp of a
difference of two scores is the geometric mean of the ratios. A state that makes any kind of text worse, beyond what may be
noise, comes after all that make none worse, and is not kept. Kinds that are only watched (`WATCHED`: built-in text beside the
user's) have that say, and no part in the score: who tunes on one kind of text wants the gain there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

import torch
from torch import Tensor

PARTS = ("norms", "attention", "MLP", "head")  # kept or rolled back, each for itself; biases go with the norms
NOTHING = "nothing"
WATCHED = "built-in "  # begins the names of kinds that may not become worse, and count for nothing else
MEAN = "mean"  # stands among the kinds in `figures`: no kind of text may have this name
RISES = 4  # evaluations in a row, each worse than the one before, that end a training
HOPELESS = math.log(2)  # so does a score that is worse than the best one by this
RISK = 0.05  # that some kind of text seems worse, where none is


def counted(kinds: Sequence[str]) -> list[int]:
    """The rows of kinds that are not only watched; all, if there are none."""
    return [i for i, kind in enumerate(kinds) if not kind.startswith(WATCHED)] or list(range(len(kinds)))


def by_kind(rows: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """Mean of the divergences (R,) of the rows of each kind, in order of appearance."""
    return {kind: float(rows[_where(kinds, kind)].mean()) for kind in dict.fromkeys(kinds)}


def figures(rows: Tensor, kinds: Sequence[str]) -> dict[str, float]:
    """What results say of divergences (R,): the mean of each kind, and as `MEAN` that of all rows that are counted."""
    return {**by_kind(rows, kinds), MEAN: float(rows[counted(kinds)].mean())}


def score(rows: Tensor, kinds: Sequence[str]) -> float:
    """Not finite where a divergence is not, minus infinity where one is 0."""
    own = counted(kinds)
    means = by_kind(rows[own], [kinds[i] for i in own]).values()
    return sum(math.log(m) if m > 0 else (-math.inf if m <= 0 else math.nan) for m in means) / len(means)


@dataclass(frozen=True, eq=False)
class Verdict:
    """kept: some of `PARTS`. ratio: of its divergence to that of the start, as `score` counts. rows: its divergences, (R,).
    worse: kinds of text for the sake of which everything was rolled back."""

    kept: tuple[str, ...]
    ratio: float
    rows: Tensor
    worse: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        *others, last = self.kept or (NOTHING,)
        return f"{', '.join(others)} and {last}" if others else last


def decide(
    start: Tensor, parts: Sequence[str], evaluate: Callable[[frozenset[str]], Tensor], kinds: Sequence[str]
) -> Verdict:
    """Which of ``parts`` are kept. evaluate: some of them -> divergences (R,) of the rows of ``start``, with those tuned.

    From all of them one after another is rolled back, as long as that helps: a kind of text that is no longer worse, or a
    better score. What gains no more than one standard error of the difference in the end is not kept.
    """
    before, found = score(start, kinds), {}

    def of(kept: frozenset[str]) -> tuple[bool, float]:
        if kept not in found:
            found[kept] = start if not kept else evaluate(kept)
        return standing(start, found[kept], kinds)

    kept = frozenset(parts)
    while kept:
        best = min((kept, *(kept - {p} for p in parts if p in kept)), key=of)
        if best == kept:
            break
        kept = best
    fails, after = of(kept)
    gain = before - after
    if kept and not fails and math.isfinite(gain) and gain > _error(start, found[kept], kinds):
        return Verdict(tuple(p for p in PARTS if p in kept), math.exp(-gain), found[kept])
    return Verdict((), 1.0, start, worse(start, found[frozenset(parts)], kinds) if parts else ())


def standing(start: Tensor, rows: Tensor, kinds: Sequence[str]) -> tuple[bool, float]:
    """The less the better: whether any kind of text is worse than at the start, then the score; infinity for what is none."""
    found = score(rows, kinds)
    return bool(worse(start, rows, kinds)), found if math.isfinite(found) or found < 0 else math.inf


def is_over(scores: Sequence[float]) -> bool:
    """Whether training only makes it worse. scores: so far, in order. One that is worse than an earlier one is no reason:
    while the rate is high scores wander, and the gain comes at the end, when it has fallen (docs/log.md, 2026-11-30)."""
    rises = 0
    for before, after in pairwise(scores):
        rises = rises + 1 if after > before else 0
    return rises >= RISES or scores[-1] > min(scores) + HOPELESS


def worse(start: Tensor, rows: Tensor, kinds: Sequence[str]) -> tuple[str, ...]:
    """The kinds of text with more divergence than at the start, beyond noise. Changes of rows relative to the mean of their
    kind are taken to vary alike in all kinds. Those that are only watched count together, too: there are few rows of each."""
    names = list(dict.fromkeys(kinds))
    deviation, changes = _changes(start, rows, kinds)
    limit = NormalDist().inv_cdf(1 - RISK / len(names)) * deviation
    watched = [found for k, found in zip(names, changes, strict=True) if k.startswith(WATCHED)]
    count = sum(n for _, n in watched)
    together = [(WATCHED + "text", (sum(c * n for c, n in watched) / count, count))] if len(watched) > 1 else []
    found = [*zip(names, changes, strict=True), *together]
    return tuple(name for name, (change, n) in found if change > limit / math.sqrt(n))


def _changes(start: Tensor, rows: Tensor, kinds: Sequence[str]) -> tuple[float, list[tuple[float, int]]]:
    """Standard deviation of the relative changes of rows, infinite if there is one row of each kind; (mean, rows) by kind."""
    squares, found = 0.0, []
    for kind in dict.fromkeys(kinds):
        where = _where(kinds, kind)
        mean = start[where].mean()
        change = (rows[where] - start[where]) / mean if mean > 0 else rows[where]
        squares += float((change - change.mean()).square().sum())
        found.append((float(change.mean()), len(where)))
    free = len(kinds) - len(found)
    return math.sqrt(squares / free) if free else math.inf, found


def _error(start: Tensor, rows: Tensor, kinds: Sequence[str]) -> float:
    """Standard error of the difference of the scores, to first order.

    Rows are independent texts, and those of every kind are taken to vary alike, since there may be one of a kind.
    """
    own = counted(kinds)
    start, rows, kinds = start[own], rows[own], [kinds[i] for i in own]
    counts, squares = [], 0.0
    for kind in dict.fromkeys(kinds):
        where = _where(kinds, kind)
        difference = rows[where] / rows[where].mean() - start[where] / start[where].mean()
        squares += float(difference.square().sum())
        counts.append(len(where))
    free = len(kinds) - len(counts)
    return math.sqrt(squares / free * sum(1 / n for n in counts)) / len(counts) if free else math.inf


def _where(kinds: Sequence[str], kind: str) -> Tensor:
    return torch.tensor([i for i, k in enumerate(kinds) if k == kind])
