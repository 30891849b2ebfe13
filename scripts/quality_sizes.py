"""Files as large as another one, for `quality.py`: bitrates are chosen by solving the allocation, without quantising."""

from __future__ import annotations

from collections.abc import Callable

from exl2ray.allocation.planning import Plan
from exl2ray.errors import BudgetError

MATCH_STEPS, MATCHED = 14, 1e-4  # solutions of the allocation at most; relative difference that ends the search


def matched(allocated: Callable[[float], Plan], plan: Plan, target: int) -> Plan:
    """The plan whose quantised tensors come closest to ``target`` bytes, by bisection on the bitrate."""
    best, low, high = plan, 0.0, 0.0
    bits = plan.bits
    for _ in range(MATCH_STEPS):
        if abs(best.predicted_bytes - target) <= MATCHED * target:
            break
        if plan.predicted_bytes > target:
            high = bits
        else:
            low = bits
        bits = (low + high) / 2 if low and high else bits * (target / plan.predicted_bytes)
        try:
            plan = allocated(bits)
        except BudgetError:
            low = bits
            if not high:
                break
            continue
        if abs(plan.predicted_bytes - target) < abs(best.predicted_bytes - target):
            best = plan
    return best
