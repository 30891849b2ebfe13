"""Shares of texts, and rows that are cut anew each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exl2ray.tune.mixture import PASSES, cut, passes_of, shares

SIZES = st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=4).filter(lambda x: sum(map(sum, x)) > 0)


@pytest.mark.parametrize(
    ("sources", "passes", "most", "expected"),
    [
        ([[1000], [100, 100]], [4, 4], 400, [200, 100, 100]),  # a half for each source
        ([[1000], [100, 400]], [4, 4], 300, [150, 50, 100]),  # in which four times as much text comes twice as often
        ([[1000], [4, 400]], [4, 4], 400, [200, 16, 184]),  # no kind more than four times
        ([[1000], [10, 10]], [4, 4], 400, [320, 40, 40]),  # no source either; the others have the rest
        ([[1000], [30], [30]], [4, 4, 1], 400, [250, 120, 30]),  # one that comes once
        ([[50], [30]], [4, 1], 300, [180, 120]),  # again where there is not enough
        ([[10], [20, 0]], [4, 1], 10**12, [40, 80, 0]),  # four times all of it, to be gone through again
        ([[7, 9]], [4], 3, [2, 1]),
        ([[], [5]], [4, 4], 5, [5]),
    ],
)
def test_shares(sources: list[list[int]], passes: list[int], most: int, expected: list[int]) -> None:
    assert shares(sources, passes, most) == expected


@given(SIZES, st.integers(1, 2000), st.data())
def test_shares_are_what_is_asked_for(sources: list[list[int]], most: int, data: st.DataObject) -> None:
    passes = data.draw(st.lists(st.sampled_from([1, PASSES]), min_size=len(sources), max_size=len(sources)))
    found, sizes = shares(sources, passes, most), [size for group in sources for size in group]
    assert sum(found) == min(most, PASSES * sum(sizes))
    assert all(n <= PASSES * size for size, n in zip(sizes, found, strict=True))


def test_every_pass_has_all_of_the_text_cut_elsewhere() -> None:
    documents = [np.arange(n) + 1000 * d for d, n in enumerate((70, 5, 33, 20))]
    rows = passes_of(documents, 48, 8, "seed")
    assert rows.shape == (48, 8)
    assert (rows[:16] == cut(documents, 8)).all(), "the first as the documents are"
    for i in range(3):
        once = rows[16 * i :][:16].ravel()
        assert len(set(once.tolist())) == 128, "nothing twice, nothing left out"
    assert len({tuple(row) for row in rows.tolist()}) > 32
    assert (rows == passes_of(documents, 48, 8, "seed")).all()
    assert (rows != passes_of(documents, 48, 8, "other")).any()


def test_a_part_of_a_text_is_from_all_of_it() -> None:
    rows = passes_of([np.arange(8000)], 100, 8, "seed")
    assert rows.shape == (100, 8)
    assert 3000 < rows.mean() < 5000, "not its beginning"
    assert (np.diff(rows, axis=1) == 1).all()


def test_text_of_less_than_a_row() -> None:
    assert passes_of([np.arange(5)], 0, 8, "seed").shape == (0, 8)
    assert passes_of([], 0, 8, "seed").shape == (0, 8)
    assert passes_of([np.arange(9)], 5, 8, "seed").shape == (5, 8)
