"""Cutting calibration rows into shares and batches.

Matrix products of a GPU depend in their last bits on how many rows go into one. So forward passes whose results travel
between workers cut the rows in one way, whoever holds which of them: into SHARES ranges, and these into batches.
"""

from __future__ import annotations

from collections.abc import Iterator

SHARES = 8  # a power of two; the largest group of workers


def share_rows(rows: int) -> list[range]:
    """The calibration rows of each share; empty ranges where there are fewer rows than shares."""
    return [range(s * rows // SHARES, (s + 1) * rows // SHARES) for s in range(SHARES)]


def batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` calibration rows."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def shared_batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` calibration rows, none of which lies in two shares."""
    for share in share_rows(rows):
        for part in batches(len(share), size):
            yield slice(share.start + part.start, share.start + part.stop)
