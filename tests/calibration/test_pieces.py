"""The row constructions on token streams that can be checked by eye: text i has the ids i*1000, i*1000 + 1, ..."""

from __future__ import annotations

import random
from collections import Counter
from itertools import count

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.calibration.cutting import (
    GENERATED,
    SECOND_PASS,
    WRITTEN,
    Ids,
    Pieces,
    consecutive_rows,
    document_rows,
    interleave,
    shuffled_rows,
    uniform_rows,
)

BOS, EOS = -7, -9
CTX = 128


def encode(text: str) -> Ids:
    start, length = (int(part) for part in text.split("+"))
    return np.arange(start, start + length)


def supply(lengths: list[int], repeat: bool = False, limit: int = CTX) -> Pieces:
    texts = [f"{1000 * (i + 1)}+{n}" for i, n in enumerate(lengths)]
    return Pieces(texts, repeat, (f"{10**6 + 1000 * i}+100" for i in count()), encode, limit)


def test_pieces_order() -> None:
    """Heads of all texts, then what was cut off, then the second pass from the last text on, then generated text."""
    pieces = supply([300, 90], repeat=True)
    taken = [(origin, int(ids[0]), len(ids)) for origin, ids in (pieces.take() for _ in range(8))]
    assert taken == [
        (WRITTEN, 1000, 128), (WRITTEN, 2000, 90), (WRITTEN, 1128, 128), (WRITTEN, 1256, 44),
        (SECOND_PASS, 2045, 45), (SECOND_PASS, 1064, 128), (SECOND_PASS, 1192, 108), (GENERATED, 10**6, 100),
    ]  # fmt: skip
    assert pieces.used == {WRITTEN: 390, SECOND_PASS: 281, GENERATED: 100}


def test_empty_texts_are_passed_over() -> None:
    assert supply([0, 0, 5]).take()[1].tolist() == [3000, 3001, 3002, 3003, 3004]


def test_consecutive_rows() -> None:
    pieces = supply([100, 100, 100])
    rows = consecutive_rows(pieces, 2, CTX)
    assert rows.shape == (2, CTX)
    assert rows.ravel().tolist() == [*range(1000, 1100), *range(2000, 2100), *range(3000, 3056)]
    assert pieces.used == {WRITTEN: 256}


def test_document_rows_halves() -> None:
    """First half: the leading BOS is gone and one more token follows; second half: BOS first. Tails come back late."""
    rows = document_rows(supply([100] * 8), 4, CTX, BOS, EOS).tolist()
    for i, row in enumerate(rows):
        a, b = 2000 * i + 1000, 2000 * i + 2000
        whole = [BOS, *range(a, a + 100), EOS, BOS, *range(b, b + 100)]
        assert row == (whole[1 : CTX + 1] if i < 2 else whole[:CTX])


def test_document_rows_use_tails_before_generated_text() -> None:
    pieces = supply([228, 228], limit=228)
    rows = document_rows(pieces, 3, CTX, BOS, EOS)
    assert rows[2].tolist() == [BOS, *range(1128, 1228), EOS, BOS, *range(2127, 2152)]
    assert pieces.used[GENERATED] == 0
    assert document_rows(pieces, 1, CTX, BOS, EOS)[0, :78].tolist() == [BOS, *range(2152, 2228), EOS]
    assert pieces.used[GENERATED] > 0


def test_short_tails_are_dropped() -> None:
    rows = document_rows(supply([128 + 50, 100], limit=500), 2, CTX, BOS, EOS)
    assert rows[1, :103].tolist() == [BOS, *range(2000, 2100), EOS, BOS]
    assert (rows[1, 103:] >= 10**6).all()


def test_odd_row_counts_give_the_second_half_more() -> None:
    rows = document_rows(supply([500] * 3, limit=500), 3, CTX, BOS, EOS)
    assert (rows[:, 0] == BOS).tolist() == [False, True, True]


def test_document_rows_without_bos_or_eos() -> None:
    rows = document_rows(supply([100] * 4), 2, CTX, None, None)
    assert rows[0].tolist() == [*range(1000, 1100), *range(2000, 2028)]
    assert BOS not in rows
    assert EOS not in rows


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 400), min_size=1, max_size=8),
    rows=st.integers(1, 6),
    repeat=st.booleans(),
    documents=st.booleans(),
    bos=st.sampled_from([None, BOS]),
    eos=st.sampled_from([None, EOS]),
)
def test_rows_are_whole_and_no_token_comes_more_than_twice(
    lengths: list[int], rows: int, repeat: bool, documents: bool, bos: int | None, eos: int | None
) -> None:
    pieces = supply(lengths, repeat)
    ids = document_rows(pieces, rows, CTX, bos, eos) if documents else consecutive_rows(pieces, rows, CTX)
    assert ids.shape == (rows, CTX)
    counts = Counter(int(x) for x in ids.ravel() if x >= 0)
    assert max(counts.values()) <= (2 if repeat else 1)
    if pieces.used[GENERATED] and not documents:  # all text is in the rows before any generated text is
        assert sum(1 for x in counts if x < 10**6) == sum(lengths)
    if documents and bos is not None:
        assert (ids[rows // 2 :, 0] == bos).all()
        assert (ids[: rows // 2, 0] != bos).all()


def test_shuffled_rows() -> None:
    tokens = np.arange(6 * 256).reshape(6, 256)
    rows = shuffled_rows(tokens, 2, random.Random(1))
    pieces = rows.reshape(-1, 128)
    assert (pieces == pieces[:, :1] + np.arange(128)).all()
    assert (pieces[:, 0] % 128 == 0).all()
    assert len(set(pieces[:, 0].tolist())) == 4
    assert pieces[:, 0].tolist() != sorted(pieces[:, 0].tolist())


def test_uniform_rows() -> None:
    ids = uniform_rows(4, 2048, 300, random.Random(0))
    counts = np.bincount(ids.ravel(), minlength=300)
    assert ids.min() == 0
    assert ids.max() == 299
    # 8192 draws: 27.3 expected per id, standard deviation 5.2.
    assert np.abs(counts - 8192 / 300).max() < 6 * 5.2
    assert (ids == uniform_rows(4, 2048, 300, random.Random(0))).all()


def test_interleave_takes_turns() -> None:
    families = {"a": [f"a{i}" for i in range(5)], "b": [f"b{i}" for i in range(2)], "c": ["c0"]}
    order = interleave(families, random.Random(3))
    assert sorted(order) == sorted(t for family in families.values() for t in family)
    assert {t[0] for t in order[:3]} == {"a", "b", "c"}
    assert {t[0] for t in order[3:5]} == {"a", "b"}
    assert interleave({}, random.Random(3)) == []
