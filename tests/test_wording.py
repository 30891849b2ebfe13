"""Sizes, times, counts and names as messages have them."""

from __future__ import annotations

import pytest

from exl2ray.wording import duration, file_size, nats, perplexity, plural, shown, some, some_lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(4e-6, "0 s"), (0.04, "0.04 s"), (0.4, "0.4 s"), (9.96, "10.0 s"), (12.4, "12 s"), (59.6, "1 min 00 s"),
     (62, "1 min 02 s"), (3599.7, "1 h 00 min"), (11240, "3 h 07 min")],
)  # fmt: skip
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size", "text"),
    [(812, "812 B"), (4_703_000, "4.7 MB"), (13_100_000_000, "13.1 GB"), (999_900_000, "1 GB"), (140e9, "140 GB")],
)
def test_file_sizes(size, text):
    assert file_size(size) == text


def test_counts():
    assert [plural(n, "file") for n in (0, 1, 3)] == ["0 files", "1 file", "3 files"]


def test_some_of_many():
    assert some("abc") == "a, b, c"
    assert some("abcdefg") == "a, b, c and 4 more"
    assert some(["one"], 1) == "one"
    assert some(["long name", "b", "c"], 2, longest=4) == "long..., b and 1 more"
    assert some([]) == ""
    assert some_lines(["a", "b", "c"], 2) == ["a", "b", "and 1 more"]
    assert some_lines(["a", "b"], 2) == ["a", "b"]


def test_perplexities():
    assert [perplexity(v) for v in (7.5, 12345.6, None, float("nan"))] == ["7.5", "1.235e+04", "not finite", "not finite"]


def test_values_are_cut():
    assert shown("a\n") == r"'a\n'"
    assert len(shown("x" * 1000)) == 80


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.24537, "0.2454"), (0.2, "0.2000"), (0.0027184, "0.002718"), (1.0, "1.000"), (1234.5, "1234"), (0.0, "0.000")],
)
def test_small_divergences_keep_their_digits(value: float, text: str) -> None:
    assert nats(value) == text
