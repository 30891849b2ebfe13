"""The allocation: optimal on small tables, provably close on large ones, fast, and clear about what cannot be."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import knapsack_plain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.allocation import knapsack
from exl2ray.allocation.knapsack import Slot, budget, check_reachable, reachable_range, solve
from exl2ray.errors import BudgetError, UsageError
from exl2ray.formats.measurement import Measurement, read_measurement

OBJECTIVES = [("squared", 2.0), ("norm", 1.5), ("norm", 3.5), ("product", 2.0)]


def term(error: float, objective: str, power: float) -> float:
    if objective == "product":
        return math.log(max(error, 1e-12))
    return error ** (2.0 if objective == "squared" else power)


def random_slots(count: int, options: int, seed: int, noisy: bool = True) -> list[Slot]:
    """Tables like measured ones: error falls by about a factor of four per two bits, with dents; sizes differ."""
    rng = np.random.default_rng(seed)
    slots = []
    for i in range(count):
        size = int(rng.choice([1, 2, 3, 5])) * 1_048_576
        bpw = np.sort(rng.uniform(2.1, 8.3, options))
        errors = rng.uniform(0.05, 2) * 4.0 ** (-bpw / 2) * (rng.lognormal(0, 0.15, options) if noisy else 1)
        slots.append(Slot(f"s{i}", tuple(int(b * size) for b in bpw), tuple(float(e) for e in errors)))
    return slots


def value(slots: list[Slot], choice: tuple[int, ...], objective: str, power: float) -> float:
    return sum(term(s.errors[c], objective, power) for s, c in zip(slots, choice, strict=True))


def brute_force(slots: list[Slot], limit: int, objective: str, power: float) -> float:
    best = math.inf
    for choice in itertools.product(*(range(len(s.bits)) for s in slots)):
        if sum(s.bits[c] for s, c in zip(slots, choice, strict=True)) <= limit:
            best = min(best, value(slots, choice, objective, power))
    return best


def limits(slots: list[Slot]) -> tuple[int, int]:
    return sum(min(s.bits) for s in slots), sum(max(s.bits) for s in slots)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 60), st.floats(1e-6, 1)), min_size=1, max_size=5), min_size=1, max_size=4
    ),
    st.floats(0, 1),
    st.sampled_from(OBJECTIVES),
)
def test_small_tables_against_brute_force(
    table: list[list[tuple[int, float]]], share: float, objective: tuple[str, float]
) -> None:
    slots = [Slot(f"s{i}", tuple(b for b, _ in o), tuple(e for _, e in o)) for i, o in enumerate(table)]
    low, high = limits(slots)
    limit = low + int(share * (high - low))
    found = solve(slots, limit, *objective)
    assert found.total_bits == sum(s.bits[c] for s, c in zip(slots, found.choice, strict=True)) <= limit
    assert found.objective == pytest.approx(value(slots, found.choice, *objective), rel=1e-9, abs=1e-15)
    best = brute_force(slots, limit, *objective)
    assert found.objective == pytest.approx(best, rel=2e-5, abs=1e-12)
    assert found.bound <= best + 1e-9 * max(1, abs(best))


@pytest.mark.parametrize("bpw", [2.4, 3.0, 4.0, 5.5, 7.9])
@pytest.mark.parametrize("count", [64, 160])
def test_large_tables_are_near_optimal_and_quick(count: int, bpw: float) -> None:
    for seed in range(3):
        slots = random_slots(count, 19, seed)
        low, high = limits(slots)
        limit = min(max(low, int((high / 8.2) * bpw)), high)
        for objective in OBJECTIVES:
            start = time.process_time()
            found = solve(slots, limit, *objective)
            seconds = time.process_time() - start
            assert found.total_bits <= limit
            assert found.bound <= found.objective + 1e-12
            assert found.gap < 1e-3
            assert seconds < 10, f"{seconds:.2f} s for {count} slots, {objective}"
            assert found.objective == pytest.approx(value(slots, found.choice, *objective), rel=1e-9)


def test_a_slot_that_holds_a_fifth_of_the_weights_leaves_no_gap() -> None:
    """The head of a small model: its options lie further apart than all others can make up for."""
    for count, scale, share in ((200, 60, 0.4), (200, 100, 0.61), (300, 100, 0.4)):
        slots = random_slots(count, 19, 0)
        large = slots[0]
        slots[0] = Slot("head", tuple(scale * b for b in large.bits[::4]), tuple(scale / 8 * e for e in large.errors[::4]))
        low, high = limits(slots)
        found = solve(slots, int(low + (high - low) * share))
        assert found.total_bits <= found.budget_bits
        assert found.bound <= found.objective + 1e-12
        assert found.gap < 1e-3


STEPS = ("relax", "spend", "exchange", "branch", "undominated")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 2, 12, 90])
def test_the_steps_come_to_the_same_as_their_plain_forms(
    count: int, ties: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, with options that are equal, slots that have few, and one that holds a third of all."""
    rng = np.random.default_rng(count)
    instances = []
    for seed in range(8):
        slots = random_slots(count, 13, seed)
        if ties:
            slots = [Slot(s.key, tuple(b >> 19 << 14 for b in s.bits), tuple(round(e, 2) for e in s.errors)) for s in slots]
        slots = [Slot(s.key, s.bits[:n], s.errors[:n]) for s, n in zip(slots, rng.integers(1, 14, count), strict=True)]
        if seed % 2:
            slots[-1] = Slot("head", tuple(count // 2 * b + 1 for b in slots[-1].bits), slots[-1].errors)
        low, high = limits(slots)
        instances += [(slots, int(low + (high - low) * share), o) for share in (0.0, 0.3, 0.6) for o in OBJECTIVES[::3]]
    found = [solve(slots, limit, *o) for slots, limit, o in instances]
    for step in STEPS:
        monkeypatch.setattr(knapsack, f"_{step}", getattr(knapsack_plain, step))
    assert found == [solve(slots, limit, *o) for slots, limit, o in instances]


def test_more_budget_is_never_worse() -> None:
    slots = random_slots(40, 17, 3)
    low, high = limits(slots)
    values = [solve(slots, int(low + (high - low) * t / 20)).objective for t in range(21)]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(values))


def test_extremes() -> None:
    slots = random_slots(10, 19, 4, noisy=False)
    low, high = limits(slots)
    assert solve(slots, low).total_bits == low
    best = solve(slots, 10 * high)
    assert best.choice == tuple(int(np.argmin(s.errors)) for s in slots)
    assert best.gap == pytest.approx(0, abs=1e-12)


def test_a_larger_option_that_is_worse_is_not_taken() -> None:
    slots = [Slot("a", (10, 20, 30), (0.5, 0.1, 0.2)), Slot("b", (10, 20), (0.5, 0.4))]
    assert solve(slots, 1000).choice == (1, 1)


def test_errors_of_zero_and_equal_options() -> None:
    slots = [Slot("a", (10, 10, 20), (0.0, 0.0, 0.0)), Slot("b", (5, 5), (0.3, 0.3))]
    found = solve(slots, 15)
    assert found.total_bits == 15
    assert found.objective == pytest.approx(0.09)


def test_infeasible_budget_is_refused_with_the_numbers() -> None:
    slots = [Slot("a", (100, 200), (0.5, 0.1)), Slot("b", (300, 400), (0.5, 0.1))]
    with pytest.raises(BudgetError, match=r"399 bits.*400"):
        solve(slots, 399)


def test_unreachable_bitrates_name_the_range() -> None:
    tables = [([200, 800], 100), ([250, 810], 100)]
    assert reachable_range(tables) == (2.25, 8.05)
    for bits in (2.25, 4.0, 8.05):
        check_reachable(bits, tables)
    for bits in (2.2, 8.1):
        with pytest.raises(BudgetError, match=rf"-b {bits:g}: .*2\.2500 \.\. 8\.0500"):
            check_reachable(bits, tables)


def test_unknown_objective() -> None:
    with pytest.raises(UsageError, match="objective 'cubed'"):
        solve([Slot("a", (1,), (0.1,))], 1, "cubed")


@pytest.fixture(scope="module")
def golden(shared_dir: Path) -> Measurement:
    return read_measurement(shared_dir / "golden" / "tiny-llama-7m-measurement.json")


@pytest.mark.parametrize("bpw", [2.52, 3.0, 4.5, 6.0])
def test_the_measurement_of_the_reference_drives_it(golden: Measurement, bpw: float) -> None:
    """12 slots of tiny-llama-7m, which has 2 KV heads of 4."""
    lists = [options for p in golden.profiles for options in p.slots()]
    assert len(lists) == 12
    slots = [
        Slot(str(i), tuple(o.total_bits for o in options), tuple(1 - o.accuracy for o in options))
        for i, options in enumerate(lists)
    ]
    weights = 6 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 704)
    limit = budget(weights, bpw)
    found = solve(slots, limit)
    assert found.gap < 1e-3
    assert limit * 0.995 < found.total_bits <= limit
    uniform = [tuple(min(j, len(s.bits) - 1) for s in slots) for j in range(19)]
    fitting = [c for c in uniform if sum(s.bits[i] for s, i in zip(slots, c, strict=True)) <= limit]
    assert found.objective <= min(value(slots, c, "squared", 2) for c in fitting)
