"""How much of each text a model is tuned on, and the rows of it (docs/quality.md, "Tuning on the end loss")."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from exl2ray.tune.documents import Ids

PASSES = 4  # over a kind with little text, where others have more


def shares(sources: Sequence[Sequence[int]], passes: Sequence[int], most: int) -> list[int]:
    """How many rows of each kind, ``most`` in all: as even as can be among sources, and all text of one equally often.

    sources: the rows that the kinds of each have. passes: how often those of each source may come, or `PASSES` times where
    that is not enough: what the source model writes is asked for as much as is wanted, and repeated it would only take the
    place of other text. Where neither is enough all come so many times: fewer rows than ``most``, to be gone through again.
    """
    sizes = [sum(kinds) for kinds in sources]
    for times in (passes, [PASSES] * len(sources)):
        limits = [n * size for n, size in zip(times, sizes, strict=True)]
        if sum(limits) >= most:
            break
    counts = _evenly(limits, min(most, sum(limits)))
    return [n for kinds, count in zip(sources, counts, strict=True) for n in _in_proportion(kinds, count)]


def _evenly(limits: Sequence[int], most: int) -> list[int]:
    """``most`` in all, which is no more than there is."""
    counts, room = [0] * len(limits), most
    for n, k in enumerate(sorted(range(len(limits)), key=lambda k: limits[k])):
        counts[k] = min(limits[k], -(-room // (len(limits) - n)))
        room -= counts[k]
    return counts


def _in_proportion(sizes: Sequence[int], count: int) -> list[int]:
    total = max(1, sum(sizes))
    return [count * end // total - count * (end - size) // total for size, end in zip(sizes, accumulate(sizes), strict=True)]


def cut(documents: Sequence[Ids], length: int, at: int = 0) -> Ids:
    """(R, ``length``): one document after the other, cut every ``length`` tokens from number ``at`` on; what is in front of
    that comes last, and what is left over is dropped."""
    ids = np.roll(np.concatenate([np.empty(0, np.int64), *documents]), -at)
    count = len(ids) // length
    return ids[: count * length].reshape(count, length)


def passes_of(documents: Sequence[Ids], count: int, length: int, seed: str) -> Ids:
    """``count`` rows of documents that have at least one. Each pass over them has them in another order, cut elsewhere;
    of the last one rows are drawn at random."""
    rng, order = random.Random(seed), list(documents)
    parts, at = [np.empty((0, length), np.int64)], 0
    while count > 0:
        rows = cut(order, length, at)
        parts.append(rows if len(rows) <= count else rows[sorted(rng.sample(range(len(rows)), count))])
        count -= len(parts[-1])
        rng.shuffle(order)
        at = rng.randrange(length)
    return np.concatenate(parts)
