"""What is believed of the time that is left, from the items of workers side by side and of groups."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.store.pace import Pace, WorkerPace


def test_workers_side_by_side_are_judged_from_the_second_item_on() -> None:
    """Eight workers, 40 s an item, a second apart: 5 s an item once all have answered, and about that before."""
    pace = Pace(80, 0, 1, 0.0)
    rates = []
    for i in range(8):
        pace.finished(i + 1, 40.0 + i, f"w{i}", 40.0, 8)
        rates.append(pace.seconds_per_item())
    assert rates[0] is None
    assert rates[1:7] == [5.0] * 6
    assert rates[7] == pytest.approx(47 / 8)


def test_a_chain_is_not_taken_for_workers_side_by_side() -> None:
    for name in ("w0", "w0 + w1 + w2 + w3"):
        pace = Pace(20, 0, 1, 0.0)
        pace.finished(1, 10.0, name, 10.0, 4)
        assert pace.eta_seconds(10.0) is None
        pace.finished(2, 20.0, name, 10.0, 4)
        assert pace.seconds_per_item() == 10.0
        assert pace.eta_seconds(20.0) == 180.0


def test_a_group_that_was_formed_anew_is_still_one() -> None:
    pace = Pace(20, 0, 1, 0.0)
    pace.finished(1, 10.0, "w0 + w1", 10.0, 2)
    pace.finished(2, 30.0, "w0 + w2", 10.0, 2)
    assert pace.seconds_per_item() == 15.0


def test_each_worker_has_its_own_figures() -> None:
    pace = Pace(9, 3, 1, 0.0)
    for i, (worker, seconds) in enumerate([("b", 2.0), ("a", 5.0), ("b", 4.0)]):
        pace.finished(4 + i, 1.0 + i, worker, seconds, 2)
    assert pace.workers() == [WorkerPace("a", 1, 5.0), WorkerPace("b", 2, 3.0)]
    assert (pace.done, pace.left, pace.finished_here) == (6, 3, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(2, 60), st.floats(0.5, 100), st.randoms(use_true_random=False))
def test_even_work_is_foretold(workers: int, items: int, seconds: float, random: object) -> None:
    """Workers that take equally long: from the second item on the forecast is the truth, but for a round of items."""
    pace, total = Pace(items, 0, 1, 0.0), -(-items // workers) * seconds
    for i in range(items):
        now = (i // workers + 1) * seconds
        pace.finished(i + 1, now, f"w{i % workers}", seconds, workers)
        eta = pace.eta_seconds(now)
        assert (eta is None) == (i == 0)
        if eta is not None and i % workers == workers - 1:
            assert abs(now + eta - total) <= seconds * 1.001
