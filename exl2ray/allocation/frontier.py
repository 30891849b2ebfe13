"""What any option would cost a linear, told from the options that were measured; and the options worth choosing from.

The squared error of GPTQ's output factors: a linear's level, times how much a row of each part of the act-order contributes
(the shape), times a number that depends on width and group size alone. These numbers agree to 2-4 % between linears of the
trained models that they were taken from (docs/log.md); what a linear has of its own is a correction, interpolated between its
measured options. Options that were never solved come out within 3 %.

Mixtures are held to the sets of widths that ExLlamaV2 has kernels for; others decode with a slower general one.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exl2ray.errors import FormatError, UsageError
from exl2ray.formats.layout import WIDTHS, QParams, Sized
from exl2ray.formats.measurement_rules import AGAIN, MOST, is_amount
from exl2ray.quant.measure import USELESS, piece_rows
from exl2ray.quant.qparams import attention_options, head_option, low_options, mlp_options, parse
from exl2ray.wording import shown

# Squared error with this width and group size, relative to 4 bits in groups of 128.
RELATIVE = {
    (2, 32): 15.02, (2, 64): 15.48, (2, 128): 15.98, (2, 256): 17.7, (2, 512): 19.7,
    (3, 32): 3.333, (3, 64): 3.645, (3, 128): 3.897,
    (4, 32): 0.7697, (4, 64): 0.8943, (4, 128): 1.0,
    (5, 32): 0.1883, (5, 64): 0.2229, (5, 128): 0.2553,
    (6, 32): 0.04684, (6, 64): 0.05585, (6, 128): 0.06503,
    (8, 32): 0.002971, (8, 64): 0.003555, (8, 128): 0.004171,
}  # fmt: skip
GROUP_SIZES = (32, 64, 128)
KERNEL_SETS = {
    frozenset(s)
    for s in (
        (2,), (3,), (4,), (5,), (6,), (8,), (2, 3), (2, 4), (3, 4), (3, 5), (4, 5), (4, 6), (5, 6), (6, 8),
        (2, 3, 4), (2, 3, 6), (3, 4, 8), (4, 5, 8), (5, 6, 8), (3, 4, 6, 8),
    )
}  # fmt: skip
PAIRS = ((3, 2), (4, 2), (4, 3), (5, 3), (5, 4), (6, 4), (6, 5), (8, 6))
SHARES = (0.1, 0.25, 0.5, 0.75)  # of the rows, in the first width of a pair
NEAR = 0.03  # an option so near to the hull of all of them (relative) is worth choosing, too
MAX_LOSSES = 512  # options of one linear whose losses are kept; measuring leaves some tens
ALL = 1e6  # in its place: whatever no other option beats in both


@dataclass(frozen=True)
class Candidate:
    """An option of one linear (of all experts of a role): storage in bits, and predicted squared error per token."""

    params: QParams
    bits: int
    loss: float


class LossCurve:
    """Losses of one linear of ``in_features`` rows, from its entry in measurement.json (`exl2ray.quant.measure`)."""

    def __init__(self, entry: Mapping[str, Any], in_features: int, where: str) -> None:
        self.in_features = in_features
        self.losses, shape = _checked(entry, where)
        self._step = piece_rows(in_features)
        pieces = -(-in_features // self._step)
        if shape is not None and len(shape) != pieces:
            raise FormatError(f"{where}: a shape of {len(shape)} pieces, expected {pieces}", "measure again without -m")
        bounds = np.minimum(np.arange(pieces + 1) * self._step, in_features).astype(np.float64)
        mass = np.diff(bounds) * (1.0 if shape is None else np.array(shape))
        self._bounds, self._mass = bounds, np.concatenate([[0.0], np.cumsum(mass / max(mass.sum(), 1e-300))])
        usable = {d: v for d, v in self.losses.items() if 0 < v < USELESS / 10}
        general = np.log(self._general(tuple(map(_option, usable)))) if usable else np.zeros(0)
        known = sorted(zip(general.tolist(), map(math.log, usable.values()), strict=True))
        self._x = np.array([x for x, _ in known])
        self._y = np.array([y - x for x, y in known])

    def loss(self, option: QParams) -> float:
        """Squared output error per token: measured, or predicted from what was."""
        measured = self.losses.get(option.desc)
        return self.all_losses((option,))[0] if measured is None else measured

    def all_losses(self, options: Sequence[QParams]) -> list[float]:
        """`loss` of each option, all at once."""
        if len(self._x) and len(options):
            general = np.log(self._general(tuple(options)))
            predicted = np.exp(general + np.interp(general, self._x, self._y)).tolist()
        else:
            predicted = [0.0] * len(options)  # no option does any harm: a linear that is all zeros
        return [self.losses.get(q.desc, loss) for q, loss in zip(options, predicted, strict=True)]

    def _general(self, options: tuple[QParams, ...]) -> NDArray[np.float64]:
        """The predictions for a linear of level 1."""
        edges, losses, first = _all_parts(options, self.in_features)
        mass = np.interp(edges, self._bounds, self._mass)
        return np.add.reduceat((mass[1:] - mass[:-1]) * losses, first)


@cache
def _problem(name: str) -> str:
    """What is wrong with a name of an option; "" for one that the format can hold."""
    try:
        option = _option(name)
    except UsageError:
        return f"{shown(name)}, which is no option"
    widths = all(b in WIDTHS for b in option.bits) and len(set(option.bits)) == len(option.bits)
    shares = all(0 < p <= 1 for p in option.props) and abs(sum(option.props) - 1) < 1e-3
    if not widths or not shares or not all(0 < size < 1 << 31 and size % 32 == 0 for size in option.group_sizes):
        return f"the option {shown(name)}, which the format does not have"
    return ""


@cache
def _option(text: str) -> QParams:
    return parse(text)


@cache
def _parts(option: QParams, in_features: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows where parts of one width begin and end, and the relative loss of each part."""
    layout = option.layout(in_features)
    sizes = dict(zip(option.bits, option.group_sizes, strict=True))
    rows: dict[int, int] = {}
    for b, n in zip(layout.bits, layout.rows, strict=True):
        rows[b] = rows.get(b, 0) + n
    return np.cumsum([0.0, *rows.values()]), np.array([relative(b, sizes[b]) for b in rows])


@lru_cache(maxsize=256)
def _all_parts(
    options: tuple[QParams, ...], in_features: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.intp]]:
    """`_parts` of all options behind each other, and where each begins; what lies between two of them counts 0."""
    parts = [_parts(q, in_features) for q in options]
    edges = np.concatenate([e for e, _ in parts])
    losses = np.concatenate([np.append(rates, 0.0) for _, rates in parts])[:-1]
    return edges, losses, np.cumsum([0, *(len(e) for e, _ in parts[:-1])])


def flat_loss(option: QParams, in_features: int) -> float:
    """Squared error of an option, relative to 4 bits in groups of 128, for a linear whose rows all count alike."""
    edges, losses = _parts(option, in_features)
    return float(np.diff(edges) @ losses) / in_features


def relative(bits: int, group_size: int) -> float:
    """`RELATIVE` for any group size: the nearest one below, or the smallest."""
    sizes = [size for width, size in RELATIVE if width == bits]
    return RELATIVE[bits, sizes[max(0, bisect(sizes, group_size) - 1)]]


@cache
def all_options(low: bool = False) -> tuple[QParams, ...]:
    """Every option that a linear may get: those of the tables, and single widths and pairs in a few shares.

    ``low``: also those that are kept for bitrates below the tables.
    """
    if low:
        return tuple(dict.fromkeys((*all_options(), *low_options())))
    found = [q for row in (*attention_options(), *mlp_options()) for q in row]
    found += [head_option(b) for b in WIDTHS]
    found += [parse(f"1:{b}b_{g}g") for b in WIDTHS for g in GROUP_SIZES]
    for high, rest in PAIRS:
        found += [parse(f"{p}:{high}b_{g}g/{1 - p:g}:{rest}b_{g}g") for p in SHARES for g in GROUP_SIZES]
    return tuple(q for q in dict.fromkeys(found) if frozenset(q.bits) in KERNEL_SETS)


def held_options(held: QParams, linear: Sized, low: bool = False) -> tuple[QParams, ...]:
    """What a head that is held at some bits may get: as many in every row as ``held`` has in its narrowest, no more in all.

    ``held`` itself gives some rows more than its name says: of ``-hb 6`` 15 % of the rows, rounded up to groups, have 8
    bits. What these rows do not need is worth more in the decoder of a small model.
    """
    least, most = min(held.bits), held.bits_of(linear)
    return tuple(q for q in dict.fromkeys((held, *all_options(low))) if min(q.bits) >= least and q.bits_of(linear) <= most)


def frontier(
    curve: LossCurve, sizes: Sequence[int], options: Sequence[QParams] | None = None, near: float = NEAR
) -> list[Candidate]:
    """The options worth choosing from, smallest first; ``sizes``: storage of each of ``options`` (all of them) in bits.

    Those on the lower convex hull of loss over bits, and those that lie within ``near`` of it (relative): with few linears
    the hull alone leaves steps that are too large to use a budget up.
    """
    options = all_options() if options is None else options
    if not options:
        return []
    bits, losses = np.array(sizes, dtype=np.int64), np.array(curve.all_losses(options))
    order = np.lexsort((losses, bits))
    least = np.minimum.accumulate(losses[order])
    better = order[np.concatenate([[True], losses[order][1:] < least[:-1]])]  # each larger one has a lower loss
    points = list(zip(bits[better].tolist(), losses[better].tolist(), strict=True))
    hull, slopes = points[:1], list[float]()  # slopes: between a point of the hull and the next
    for point in points[1:]:
        while slopes and _slope(hull[-2], point) <= slopes[-1]:
            hull.pop()
            slopes.pop()
        slopes.append(_slope(hull[-1], point))
        hull.append(point)
    at_most = (1 + near) * np.interp(bits[better], [b for b, _ in hull], [v for _, v in hull])
    found = zip(better.tolist(), points, (losses[better] <= at_most).tolist(), strict=True)
    return [Candidate(options[i], *point) for i, point, worth in found if worth]


def _slope(a: tuple[int, float], b: tuple[int, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _checked(entry: Any, where: str) -> tuple[dict[str, float], NDArray[np.float64] | None]:
    losses, shape = (entry.get("losses"), entry.get("shape")) if isinstance(entry, Mapping) else (None, None)
    if not isinstance(losses, Mapping) or not losses:
        raise FormatError(f"{where}: no losses of options", "measure again without -m")
    numbers = [*losses.values(), *(shape if isinstance(shape, list) else [])]
    if not all(map(is_amount, numbers)):
        raise FormatError(f"{where}: a loss or shape is not a number from 0 to {MOST:g}", AGAIN)
    if shape is not None and not (isinstance(shape, list) and any(shape)):
        raise FormatError(f"{where}: the shape is no list, or all of it is 0", AGAIN)
    if len(losses) > MAX_LOSSES:
        raise FormatError(f"{where}: losses of {len(losses)} options; there are at most {MAX_LOSSES}", AGAIN)
    if problem := next(filter(None, map(_problem, losses)), ""):
        raise FormatError(f"{where}: a loss of {problem}", AGAIN)
    return {str(k): float(v) for k, v in losses.items()}, None if shape is None else np.array(shape, dtype=np.float64)
