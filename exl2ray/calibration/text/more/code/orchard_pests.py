"""
Degree-day forecasts for codling moth in apple orchards.

An insect's development is driven by warmth above a threshold.  Daily minimum and
maximum are turned into degree-days with the single sine method; cumulated from
the biofix (first sustained flight in the traps), they tell when eggs hatch and
hence when a spray is worth its diesel.

Example
-------
>>> season = Season.from_rows([("2023-04-30", 4.0, 21.0), ("2023-05-01", 6.5, 24.5)])
>>> round(season.total(), 2)
10.24
"""

from __future__ import annotations

import bisect
import csv
import itertools
import math
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Iterable, Mapping, Sequence

LOWER = 10.0
UPPER = 31.1

#: Degree-days (°C) after biofix.
EVENTS: Mapping[str, float] = {
    "first eggs hatch": 139,
    "half of the eggs hatched": 317,
    "end of the first generation": 589,
    "second flight": 611,
    "second hatch": 722,
}


def degree_days(low: float, high: float, lower: float = LOWER, upper: float = UPPER) -> float:
    """Area between the lower threshold and a sine curve through ``low`` and ``high``.

    A horizontal cut-off is used: above ``upper`` development goes on, but no faster.

    Parameters
    ----------
    low, high
        Minimum and maximum of the day in °C.
    lower, upper
        Thresholds.

    Returns
    -------
    float
        Degree-days gained; never negative.

    Raises
    ------
    ValueError
        If ``low`` exceeds ``high``, usually because two columns were swapped.
    """
    if low > high:
        raise ValueError(f"minimum {low} above maximum {high}")
    return max(0.0, _above(low, high, lower) - _above(low, high, upper))


def _above(low: float, high: float, threshold: float) -> float:
    mean, amplitude = (low + high) / 2, (high - low) / 2
    if high <= threshold:
        return 0.0
    if low >= threshold:
        return mean - threshold
    theta = math.asin((threshold - mean) / amplitude)
    return ((mean - threshold) * (math.pi / 2 - theta) + amplitude * math.cos(theta)) / math.pi


@dataclass(frozen=True, order=True)
class Day:
    when: date
    low: float = field(compare=False)
    high: float = field(compare=False)
    source: str = field(default="measured", compare=False)

    @cached_property
    def dd(self) -> float:
        return degree_days(self.low, self.high)


class GapError(ValueError):
    """Days are missing that nobody may invent."""


class Season:
    """An unbroken run of days."""

    #: gaps up to this length are filled by interpolation
    PATIENCE = 3

    def __init__(self, days: Iterable[Day]) -> None:
        self.days: list[Day] = list(self._without_gaps(sorted(days)))

    @classmethod
    def from_rows(cls, rows: Iterable[tuple[str, float, float]]) -> Season:
        return cls(Day(date.fromisoformat(d), float(lo), float(hi)) for d, lo, hi in rows)

    @classmethod
    def from_csv(cls, path: Path, *, date_col: str = "date", low_col: str = "tmin", high_col: str = "tmax") -> Season:
        with path.open(newline="") as handle:
            return cls.from_rows(
                (row[date_col], row[low_col], row[high_col])
                for row in csv.DictReader(handle)
                if row[low_col] and row[high_col]
            )

    @classmethod
    def _without_gaps(cls, days: Sequence[Day]) -> Iterable[Day]:
        yield from days[:1]
        for before, after in itertools.pairwise(days):
            missing = (after.when - before.when).days - 1
            if missing < 0:
                raise ValueError(f"{after.when} is there twice")
            if missing > cls.PATIENCE:
                raise GapError(f"{missing} days missing after {before.when}")
            for k in range(1, missing + 1):
                w = k / (missing + 1)
                yield Day(
                    before.when + timedelta(days=k),
                    before.low + w * (after.low - before.low),
                    before.high + w * (after.high - before.high),
                    source="interpolated",
                )
            yield after

    def __len__(self) -> int:
        return len(self.days)

    def total(self) -> float:
        return math.fsum(day.dd for day in self.days)

    def cumulated(self, biofix: date) -> list[tuple[date, float]]:
        start = bisect.bisect_left(self.days, biofix, key=lambda d: d.when)
        if start == len(self.days) or self.days[start].when != biofix:
            raise LookupError(f"no weather for the biofix {biofix}")
        rest = self.days[start:]
        return list(zip((d.when for d in rest), itertools.accumulate(d.dd for d in rest)))

    def extended(self, normals: Mapping[tuple[int, int], tuple[float, float]], until: date) -> Season:
        """This season, followed by long-term means for the days to come."""
        last = self.days[-1].when
        future = (last + timedelta(days=k) for k in itertools.count(1))
        extra = [
            Day(d, *normals[d.month, d.day], source="normal")
            for d in itertools.takewhile(lambda d: d <= until, future)
        ]
        return Season([*self.days, *extra])


def biofix(catches: Mapping[date, int], traps: int, sustained: int = 2) -> date | None:
    """First of ``sustained`` consecutive trap readings with moths in them.

    A single moth in April is a moth that hitched a lift with a crate.
    """
    if traps <= 0:
        raise ValueError("no traps, no biofix")
    run: list[date] = []
    for when in sorted(catches):
        run = [*run, when] if catches[when] > 0 else []
        if len(run) == sustained:
            return run[0]
    return None


def forecast(season: Season, fix: date) -> dict[str, tuple[date, bool] | None]:
    """For each event its date and whether it rests on measured weather only."""
    sums = season.cumulated(fix)
    sources = {d.when: d.source for d in season.days}
    result: dict[str, tuple[date, bool] | None] = {}
    for name, need in EVENTS.items():
        hit = next((when for when, total in sums if total >= need), None)
        if hit is None:
            result[name] = None
        else:
            certain = all(sources[w] == "measured" for w, _ in sums if w <= hit)
            result[name] = (hit, certain)
    return result
