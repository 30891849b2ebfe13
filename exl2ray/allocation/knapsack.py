"""Which option each module gets: a multiple-choice knapsack, solved to proven near-optimality.

Minimise sum_i f(error_i[choice_i]) subject to sum_i bits_i[choice_i] <= budget. The Lagrangian relaxation
min_x sum f + lambda (sum bits - budget) separates by slot; its maximum over lambda is a lower bound, and its solution just
below the budget is a feasible start. What is left of the budget is spent by single moves of best gain per bit and then by
exchanges between two slots. Where that leaves a visible gap (few slots), a dynamic program over the undominated partial
sums, pruned by the bound, finishes the proof. The remaining distance to the bound is reported as the gap.

The budget counts the decoder linears that are allocated, padded, with all overhead. In the reference the head pays into it
for decoders whose halves run in parallel; that flaw is not repeated.

Source: Sinha and Zoltners, The Multiple-Choice Knapsack Problem (1979), for the bound; objectives: ExLlamaV2 minimises sum
err^p by annealing, p found by trial.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exl2ray.errors import BudgetError, UsageError

OBJECTIVES = ("squared", "norm", "product")
MUCH_LEFT = 0.03  # of a budget; the steps between options leave less, but for models of one or two layers
_GAP_GOAL = 1e-5  # nothing is tried to come nearer to the bound
_FEW, _GAP_ENOUGH = 64, 1e-4  # with more slots than few, the dynamic program takes too long for less than this distance
_SWEEPS = 12  # of exchanges, unless one finds none
_MAX_PAIRS = 1_000_000  # pairs of moves looked at in one step of an exchange
_MAX_STATES = 30_000  # of the dynamic program; beyond it the bound of the relaxation stands


@dataclass(frozen=True)
class Slot:
    """One module (or half of a parallel block). ``errors`` are 1 - accuracy of the options, ``bits`` their storage."""

    key: str
    bits: tuple[int, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True)
class Allocation:
    """The chosen options, and how far from the best they can be at most."""
    choice: tuple[int, ...]  # option per slot
    total_bits: int
    budget_bits: int
    objective: float  # sum of f(error)
    bound: float  # proven lower bound of the objective
    gap: float  # (objective - bound) / objective; for "product" the mean excess of log error per slot
    unspent: float = 0.0  # share of the budget that is left although an option with more bits would fit


def solve(slots: Sequence[Slot], budget_bits: int, objective: str = "squared", power: float = 2.0) -> Allocation:
    """Best options within the budget.

    objective: "squared" (sum of squared relative errors, the default), "norm" (sum of err^power, the reference's family)
    or "product" (sum of log errors). Raises BudgetError naming the reachable range if even the smallest options do not
    fit, UsageError for an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise UsageError(f"objective {objective!r}", f"known: {', '.join(OBJECTIVES)}")
    width = max(len(s.bits) for s in slots)
    bits = np.full((len(slots), width), np.iinfo(np.int64).max // (4 * len(slots)), dtype=np.int64)
    cost = np.full((len(slots), width), np.inf)
    for i, s in enumerate(slots):
        bits[i, : len(s.bits)] = s.bits
        cost[i, : len(s.errors)] = _terms(np.array(s.errors), objective, power)
    floor = int(bits.min(1).sum())
    if floor > budget_bits:
        raise BudgetError(
            f"the budget is {budget_bits} bits, the smallest options of all modules need {floor}",
            f"ask for at least {floor / budget_bits:.4f} times this bitrate",
        )
    choice, bound, lam = _approach(bits, cost, budget_bits, objective)
    if _gap(_value(cost, choice), bound, objective, len(slots)) >= _GAP_ENOUGH:
        choice, bound = _branch(bits, cost, budget_bits, objective, choice, bound, lam)
    if _gap(_value(cost, choice), bound, objective, len(slots)) >= (_GAP_GOAL if len(slots) <= _FEW else _GAP_ENOUGH):
        exact = _complete(bits, cost, budget_bits, lam, _value(cost, choice))
        if exact is not None:
            choice = exact if _value(cost, exact) < _value(cost, choice) else choice
            bound = _value(cost, choice)
    value = _value(cost, choice)
    rows = np.arange(len(slots))
    total = int(bits[rows, choice].sum())
    return Allocation(
        tuple(int(c) for c in choice),
        total,
        budget_bits,
        value,
        bound,
        _gap(value, bound, objective, len(slots)),
        _unspent(slots, choice, budget_bits, total),
    )


def _approach(
    bits: NDArray[np.int64], cost: NDArray[np.float64], budget_bits: int, objective: str
) -> tuple[NDArray[np.int64], float, float]:
    """(a choice that fits, proven lower bound of the objective, the bound's multiplier). bits, cost: (S, O)."""
    bound, lam, choice = _relax(bits, cost, budget_bits)
    choice = _spend(bits, cost, budget_bits, choice)
    for _ in range(_SWEEPS):
        if bits.size * bits.shape[1] > _MAX_PAIRS or _gap(_value(cost, choice), bound, objective, len(bits)) < _GAP_GOAL:
            break  # so many slots leave no gap to speak of
        if not _exchange(bits, cost, budget_bits, choice):
            break
        choice = _spend(bits, cost, budget_bits, choice)
    return choice, bound, lam


def _branch(
    bits: NDArray[np.int64],
    cost: NDArray[np.float64],
    budget_bits: int,
    objective: str,
    choice: NDArray[np.int64],
    bound: float,
    lam: float,
) -> tuple[NDArray[np.int64], float]:
    """`_approach`, over every option of the slot with the largest steps in turn.

    A head holds a fifth of a small model's weights: its options lie so far apart that the relaxation mixes two of them, and
    no allocation comes near that bound. With its option given, the others leave no gap to speak of. Options whose own bound
    is not below what has been found already are not solved; most are ruled out by the bound that the multiplier of the
    whole, ``lam``, gives.
    """
    found = bits < np.iinfo(np.int64).max // (4 * len(bits))
    wide = int(np.where(found, bits, 0).max(1).argmax())
    others = np.arange(len(bits)) != wide
    own_bits, own_cost, bits, cost_of_all, cost = bits[wide], cost[wide], bits[others], cost, cost[others]
    smallest, known = int(bits.min(1).sum()), _value(cost_of_all, choice)
    least = own_cost + lam * (own_bits - float(budget_bits)) + (cost + lam * bits).min(1).sum()
    worse = least > known + 1e-9 * (abs(known) + lam * budget_bits)
    options = [j for j in np.flatnonzero(found[wide] & ~worse) if smallest + own_bits[j] <= budget_bits]
    limits = {j: own_cost[j] + _relax(bits, cost, budget_bits - int(own_bits[j]))[0] for j in options}
    best = choice
    for j in sorted(options, key=limits.__getitem__):
        if limits[j] >= _value(cost_of_all, best):
            break
        rest, limit, _ = _approach(bits, cost, budget_bits - int(own_bits[j]), objective)
        limits[j] = max(limits[j], own_cost[j] + limit)
        tried = np.insert(rest, wide, j)
        if _value(cost_of_all, tried) < _value(cost_of_all, best):
            best = tried
    known = _value(cost_of_all, best)
    return best, min(known, max(bound, min(limits.values(), default=known)))


def _unspent(slots: Sequence[Slot], choice: NDArray[np.int64], budget_bits: int, total_bits: int) -> float:
    """See `Allocation`; 0 for little. The optimum leaves bits only where they lower no error. Measured errors fall with bits
    nearly everywhere, so much that is left means errors that were not measured, or not on this model."""
    left = budget_bits - total_bits
    if left < MUCH_LEFT * budget_bits:
        return 0.0
    fits = any(0 < more - s.bits[int(c)] <= left for s, c in zip(slots, choice, strict=True) for more in s.bits)
    return left / budget_bits if fits else 0.0


def budget(weights: int, bits_per_weight: float) -> int:
    """Bits for ``weights`` weights (padded counts of all modules being solved) at the requested bitrate."""
    return int(weights * bits_per_weight)


def reachable_range(slots: Sequence[tuple[Sequence[int], int]]) -> tuple[float, float]:
    """(lowest, highest) bits per weight of the option tables; each slot is (total bits of its options, weights)."""
    weights = sum(w for _, w in slots)
    return sum(min(b) for b, _ in slots) / weights, sum(max(b) for b, _ in slots) / weights


def nearest_reachable(bits_per_weight: float, slots: Sequence[tuple[Sequence[int], int]]) -> float:
    """The bitrate itself if the options reach it, else the nearest thousandth of a bit that they do."""
    low, high = reachable_range(slots)
    if bits_per_weight < low:
        return math.ceil(low * 1000) / 1000
    return min(bits_per_weight, math.ceil(high * 1000) / 1000)


def check_reachable(bits_per_weight: float, slots: Sequence[tuple[Sequence[int], int]]) -> None:
    """Raises BudgetError with the reachable range, and the nearest bitrate in it, if a bitrate lies outside of it."""
    low, high = reachable_range(slots)
    nearest = nearest_reachable(bits_per_weight, slots)
    if nearest != bits_per_weight:
        raise BudgetError(
            f"-b {bits_per_weight:g}: this model can be quantised to {low:.4f} .. {high:.4f} bits per weight, which counts "
            "scales and permutations of the decoder layers",
            f"the nearest that works is -b {nearest:g}, which a conversion with --nearest takes",
        )


def _terms(errors: NDArray[np.float64], objective: str, power: float) -> NDArray[np.float64]:
    if objective == "product":
        return np.log(np.maximum(errors, 1e-12))
    return np.maximum(errors, 0.0) ** (2.0 if objective == "squared" else power)


def _value(cost: NDArray[np.float64], choice: NDArray[np.int64]) -> float:
    return float(cost[np.arange(len(choice)), choice].sum())


def _gap(value: float, bound: float, objective: str, slots: int) -> float:
    if objective == "product":
        return (value - bound) / slots
    return (value - bound) / value if value > 0 else 0.0


def _relax(
    bits: NDArray[np.int64], cost: NDArray[np.float64], budget_bits: int
) -> tuple[float, float, NDArray[np.int64]]:
    """(dual bound, its multiplier, feasible choice) by bisection on the multiplier lambda (objective per bit)."""
    # With options by rising bits, the first of those that tie is the cheapest: so a large lambda reaches the floor.
    by_bits = bits.argsort(1, kind="stable")
    bits, cost = np.take_along_axis(bits, by_bits, 1), np.take_along_axis(cost, by_bits, 1)
    first, width = np.arange(len(bits)) * bits.shape[1], bits.astype(np.float64)
    penalised = np.empty_like(cost)

    def pick(lam: float) -> tuple[NDArray[np.int64], int]:
        """The best options as places in the arrays, and the bits that they take."""
        np.multiply(width, lam, out=penalised)
        np.add(cost, penalised, out=penalised)
        places: NDArray[np.int64] = first + penalised.argmin(1)
        return places, int(bits.take(places).sum())

    def objective(places: NDArray[np.int64]) -> float:
        return float(cost.take(places).sum())

    def chosen(places: NDArray[np.int64]) -> NDArray[np.int64]:
        return by_bits.take(places)

    low, high = 0.0, 1e-12
    places, used = pick(low)
    if used <= budget_bits:
        return objective(places), 0.0, chosen(places)
    feasible, used = pick(high)
    while used > budget_bits:
        high *= 4
        feasible, used = pick(high)
        if high > 1e12:  # only the cheapest options fit; lambda may grow without bound
            break
    if used > budget_bits:
        feasible = first + bits.argmin(1)
    bound, best_lam = -math.inf, high
    for _ in range(200):
        lam = (low + high) / 2
        places, used = pick(lam)
        dual = objective(places) + lam * (used - budget_bits)
        if dual > bound:
            bound, best_lam = dual, lam
        if used <= budget_bits:
            high, feasible = lam, places
        else:
            low = lam
        if high - low <= 1e-15 * high:
            break
    return bound, best_lam, chosen(feasible)


def _spend(
    bits: NDArray[np.int64], cost: NDArray[np.float64], budget_bits: int, choice: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Single moves that lower the objective and fit, best gain per bit first."""
    choice, rows = choice.copy(), np.arange(len(bits))
    left = budget_bits - int(bits[rows, choice].sum())
    extra, gain = _moves(bits, cost, choice)
    rate = np.where(gain > 0, gain / np.maximum(extra, 1), 0.0)
    while True:
        score = np.where(extra <= left, rate, 0.0)
        i, j = divmod(int(score.argmax()), bits.shape[1])
        if score[i, j] <= 0:
            return choice
        left -= int(extra[i, j])
        choice[i] = j
        extra[i], gain[i] = bits[i] - bits[i, j], cost[i, j] - cost[i]
        rate[i] = np.where(gain[i] > 0, gain[i] / np.maximum(extra[i], 1), 0.0)


def _moves(
    bits: NDArray[np.int64], cost: NDArray[np.float64], choice: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """(bits that every option takes beyond the one chosen, what it lowers the objective by), each (S, O)."""
    rows = np.arange(len(bits))
    return bits - bits[rows, choice][:, None], cost[rows, choice][:, None] - cost


def _exchange(
    bits: NDArray[np.int64], cost: NDArray[np.float64], budget_bits: int, choice: NDArray[np.int64]
) -> bool:
    """For each slot in turn the best pair of moves (this slot and one other); changes ``choice``, True if any helped.

    With all moves by the bits they take, the best that fits beside a move of this slot is a running maximum.
    """
    rows, options = np.arange(len(bits)), bits.shape[1]
    left = budget_bits - int(bits[rows, choice].sum())
    extra, gain = _moves(bits, cost, choice)
    real = np.flatnonzero(np.isfinite(cost))
    order = real[extra.take(real).argsort(kind="stable")]
    owner, by_extra, gains = order // options, extra.take(order), gain.take(order)
    improved = False
    for i in range(len(bits)):
        best = np.maximum.accumulate(np.where(owner == i, -np.inf, gains))
        room = left - extra[i]  # (O,) bits left after slot i takes each option
        fitting = by_extra.searchsorted(room, "right")
        total = np.where(fitting > 0, best[fitting - 1] + gain[i], -np.inf)
        a = int(total.argmax())
        if not np.isfinite(total[a]) or total[a] <= 1e-15 * max(1.0, abs(_value(cost, choice))):
            continue
        both = np.where(extra <= room[a], gain + gain[i, a], -np.inf)
        both[i] = -np.inf
        j, b = divmod(int(both.argmax()), options)
        left -= int(extra[i, a] + extra[j, b])
        choice[i], choice[j] = a, b
        improved = True
        moved = np.array([i, j])
        extra[moved], gain[moved] = _moves(bits[moved], cost[moved], choice[moved])
        order = order[(owner != i) & (owner != j)]
        own = real[np.isin(real // options, moved)]
        own = own[extra.take(own).argsort(kind="stable")]
        order = np.insert(order, extra.take(order).searchsorted(extra.take(own)), own)
        owner, by_extra, gains = order // options, extra.take(order), gain.take(order)
    return improved


def _complete(
    bits: NDArray[np.int64], cost: NDArray[np.float64], budget_bits: int, lam: float, best: float
) -> NDArray[np.int64] | None:
    """The optimum, or None if more than ``_MAX_STATES`` undominated partial sums stay within reach of ``best``.

    A partial sum survives only if its cost plus the relaxation's bound of the remaining slots is below ``best``.
    """
    penalised = cost + lam * bits
    cheapest = penalised.min(1)
    slack = best - (cheapest.sum() - lam * budget_bits)  # how much above the bound a solution may lie in all
    slack += 1e-12 * max(1.0, abs(best))
    smallest_rest = np.concatenate([np.cumsum(bits.min(1)[::-1])[::-1][1:], [0]])
    used, spent, excess = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    history: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for i in range(len(bits)):
        options = np.flatnonzero(penalised[i] - cheapest[i] <= slack)
        new_used = (used[:, None] + bits[i, options]).ravel()
        new_spent = (spent[:, None] + cost[i, options]).ravel()
        new_excess = (excess[:, None] + (penalised[i, options] - cheapest[i])).ravel()
        alive = np.flatnonzero((new_used + smallest_rest[i] <= budget_bits) & (new_excess <= slack))
        keep = alive[_undominated(new_used[alive], new_spent[alive])]
        if len(keep) > _MAX_STATES or not len(keep):
            return None
        used, spent, excess = new_used[keep], new_spent[keep], new_excess[keep]
        history.append((keep // len(options), options[keep % len(options)]))
    state = int(spent.argmin())
    choice = np.zeros(len(bits), dtype=np.int64)
    for i in range(len(bits) - 1, -1, -1):
        parents, options = history[i]
        choice[i], state = options[state], int(parents[state])
    return choice


def _undominated(used: NDArray[np.int64], spent: NDArray[np.float64]) -> NDArray[np.int64]:
    """Those that cost less than all which use as little, by rising ``used``; of equal ones the first."""
    if not len(used):
        return np.zeros(0, np.int64)
    order = used.argsort(kind="stable")  # of some sorted lists in one, which takes a sort of this kind little
    used, spent = used[order], spent[order]
    starts = np.flatnonzero(np.concatenate([[True], used[1:] != used[:-1]]))  # of those that use as much as each other
    least = np.minimum.reduceat(spent, starts)
    lowest = np.minimum.accumulate(least)
    better = np.concatenate([[True], lowest[1:] < lowest[:-1]])
    is_least = spent == np.repeat(least, np.diff(starts, append=len(used)))
    first = np.minimum.reduceat(np.where(is_least, order, len(order)), starts)
    kept: NDArray[np.int64] = first[better]
    return kept
