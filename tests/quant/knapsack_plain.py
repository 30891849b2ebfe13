"""The steps of `exl2ray.allocation.knapsack` as they are defined, without what makes them quick."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from exl2ray.allocation import knapsack

Bits, Costs = NDArray[np.int64], NDArray[np.float64]


def relax(bits: Bits, cost: Costs, budget_bits: int) -> tuple[float, float, NDArray[np.int64]]:
    rows = np.arange(len(bits))

    def pick(lam: float) -> NDArray[np.int64]:
        penalised = cost + lam * bits
        tied = np.where(penalised <= penalised.min(1, keepdims=True), bits, np.iinfo(np.int64).max)
        choice: NDArray[np.int64] = tied.argmin(1)
        return choice

    low, high = 0.0, 1e-12
    choice = pick(low)
    if bits[rows, choice].sum() <= budget_bits:
        return float(cost[rows, choice].sum()), 0.0, choice
    while bits[rows, pick(high)].sum() > budget_bits:
        high *= 4
        if high > 1e12:
            break
    feasible = pick(high)
    if bits[rows, feasible].sum() > budget_bits:
        feasible = bits.argmin(1)
    bound, best_lam = -math.inf, high
    for _ in range(200):
        lam = (low + high) / 2
        choice = pick(lam)
        used = int(bits[rows, choice].sum())
        dual = float(cost[rows, choice].sum()) + lam * (used - budget_bits)
        if dual > bound:
            bound, best_lam = dual, lam
        if used <= budget_bits:
            high, feasible = lam, choice
        else:
            low = lam
        if high - low <= 1e-15 * high:
            break
    return bound, best_lam, feasible


def spend(bits: Bits, cost: Costs, budget_bits: int, choice: NDArray[np.int64]) -> NDArray[np.int64]:
    choice, rows = choice.copy(), np.arange(len(bits))
    while True:
        left = budget_bits - int(bits[rows, choice].sum())
        extra = bits - bits[rows, choice][:, None]
        gain = cost[rows, choice][:, None] - cost
        score = np.where((extra <= left) & (gain > 0), gain / np.maximum(extra, 1), 0.0)
        i, j = np.unravel_index(int(score.argmax()), score.shape)
        if score[i, j] <= 0:
            return choice
        choice[i] = j


def exchange(bits: Bits, cost: Costs, budget_bits: int, choice: NDArray[np.int64]) -> bool:
    rows = np.arange(len(bits))
    improved = False
    for i in range(len(bits)):
        left = budget_bits - int(bits[rows, choice].sum())
        extra = bits - bits[rows, choice][:, None]  # (S, O)
        gain = cost[rows, choice][:, None] - cost
        fits = extra[None] <= (left - extra[i])[:, None, None]  # (O, S, O)
        total = np.where(fits, gain[None] + gain[i][:, None, None], -np.inf)
        total[:, i] = -np.inf
        a, j, b = np.unravel_index(int(total.argmax()), total.shape)
        value = float(cost[rows, choice].sum())
        if total[a, j, b] > 1e-15 * max(1.0, abs(value)) and np.isfinite(total[a, j, b]):
            choice[i], choice[j] = a, b
            improved = True
    return improved


def branch(
    bits: Bits, cost: Costs, budget_bits: int, objective: str, choice: NDArray[np.int64], bound: float, lam: float
) -> tuple[NDArray[np.int64], float]:
    """Every option of the widest slot has its own bound."""
    found = bits < np.iinfo(np.int64).max // (4 * len(bits))
    wide = int(np.where(found, bits, 0).max(1).argmax())
    others, rows = np.arange(len(bits)) != wide, np.arange(len(bits))
    smallest = int(bits[others].min(1).sum())
    options = [j for j in np.flatnonzero(found[wide]) if smallest + bits[wide, j] <= budget_bits]
    limits = {j: cost[wide, j] + relax(bits[others], cost[others], budget_bits - int(bits[wide, j]))[0] for j in options}
    best = choice
    for j in sorted(options, key=limits.__getitem__):
        if limits[j] >= cost[rows, best].sum():
            break
        rest, limit, _ = knapsack._approach(bits[others], cost[others], budget_bits - int(bits[wide, j]), objective)
        limits[j] = max(limits[j], cost[wide, j] + limit)
        tried = np.insert(rest, wide, j)
        if cost[rows, tried].sum() < cost[rows, best].sum():
            best = tried
    return best, min(float(cost[rows, best].sum()), max(bound, min(limits.values(), default=bound)))


def undominated(used: NDArray[np.int64], spent: NDArray[np.float64]) -> NDArray[np.int64]:
    order = np.lexsort((spent, used))
    lowest = np.minimum.accumulate(spent[order])
    return order[np.concatenate([[True], lowest[1:] < lowest[:-1]])] if len(order) else order
