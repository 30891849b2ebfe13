"""How much of each text a model is tuned on, and the rows of it (docs/quality.md, "Tuning on the end loss")."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np

from exl2ray.tune.documents import Ids

PASSES = 4  # over a kind with little text, where others have more


def shares(sources: Sequence[Sequence[int]], passes: Sequence[int], most: int) -> list[int]:
    """How many rows of each kind, ``most`` in all: as even as can be among sources, and among the kinds of one in proportion
    to the square root of their size, between as much of each and all of it equally often (so mixed are languages: Arivazhagan
    et al. 2019, with a temperature of 2).

    sources: the rows that the kinds of each have. passes: how often those of each source may come, or `PASSES` times where
    that is not enough: what the source model writes is asked for as much as is wanted, and repeated it would only take the
    place of other text. Where neither is enough all come so many times: fewer rows than ``most``, to be gone through again.
    """
    for times in (passes, [PASSES] * len(sources)):
        limits = [[n * size for size in sizes] for n, sizes in zip(times, sources, strict=True)]
        if sum(map(sum, limits)) >= most:
            break
    counts = _shared([sum(group) for group in limits], [1.0] * len(limits), min(most, sum(map(sum, limits))))
    roots = [[math.sqrt(limit) for limit in group] for group in limits]
    return [n for group, w, count in zip(limits, roots, counts, strict=True) for n in _shared(group, w, count)]


def _shared(limits: Sequence[int], weights: Sequence[float], count: int) -> list[int]:
    """``count`` in all, which is no more than there is, in proportion to weights as far as limits allow."""
    found, room, weight = [0] * len(limits), count, math.fsum(weights)
    for k in sorted(range(len(limits)), key=lambda k: limits[k] / weights[k] if weights[k] else 0.0):
        found[k] = min(limits[k], math.ceil(room * min(1.0, weights[k] / weight))) if weight > 0 else 0
        room, weight = room - found[k], weight - weights[k]
    return found


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
