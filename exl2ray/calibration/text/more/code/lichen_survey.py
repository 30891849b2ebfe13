"""Estimate lichen cover from quadrat photographs that were scored at random points.

Field protocol (Gannet Head, since 2009): each 50 x 50 cm quadrat is photographed square on, 64 points are
thrown on the photograph and an observer names what is under each of them. So the raw data are counts out of
64, several quadrats per transect, several transects per site. Points in one quadrat are correlated, quadrats
in one transect a little less; treating all points as independent makes the error bars far too short.

The functions take arrays shaped (transect, quadrat, species) of point counts and resample whole transects.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

POINTS = 64

Counts = NDArray[np.integer]


@dataclass(frozen=True)
class Cover:
    species: tuple[str, ...]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    def __str__(self) -> str:
        width = max(map(len, self.species))
        order = np.argsort(-self.mean)
        return "\n".join(
            f"{self.species[i]:<{width}}  {100 * self.mean[i]:5.1f} %  ({100 * self.low[i]:.1f} to {100 * self.high[i]:.1f})"
            for i in order
        )


def check(counts: Counts) -> None:
    if counts.ndim != 3:
        raise ValueError(f"expected (transect, quadrat, species), got {counts.ndim} dimensions")
    if (counts < 0).any():
        raise ValueError("negative counts")
    too_many = np.argwhere(counts.sum(axis=2) > POINTS)
    if too_many.size:
        t, q = too_many[0]
        raise ValueError(f"transect {t}, quadrat {q}: {counts[t, q].sum()} points scored out of {POINTS}")


def cover(
    counts: Counts,
    species: tuple[str, ...],
    *,
    level: float = 0.95,
    draws: int = 4000,
    rng: np.random.Generator | None = None,
) -> Cover:
    """Mean cover per species with a percentile interval from a two-stage bootstrap."""
    check(counts)
    if counts.shape[2] != len(species):
        raise ValueError("one name per species, please")
    rng = np.random.default_rng() if rng is None else rng
    n_transects, n_quadrats, _ = counts.shape

    # Stage 1 picks transects, stage 2 picks quadrats inside each picked transect. Fancy indexing does both
    # at once: t has shape (draws, T, 1) and q has shape (draws, T, Q), and they broadcast against each other.
    t = rng.integers(n_transects, size=(draws, n_transects, 1))
    q = rng.integers(n_quadrats, size=(draws, n_transects, n_quadrats))
    resampled = counts[t, q].mean(axis=(1, 2)) / POINTS

    tail = (1 - level) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
    return Cover(species, counts.mean(axis=(0, 1)) / POINTS, low, high)


def design_effect(counts: Counts) -> NDArray[np.float64]:
    """How many times larger the variance of the mean is than independent points would give.

    A value of 6 says that the 64 points of a quadrat are worth about as much as ten independent ones.
    Species that were never seen come out as nan, not as 1: nothing is known about how they clump.
    """
    check(counts)
    n_transects, n_quadrats, _ = counts.shape
    p = counts.mean(axis=(0, 1)) / POINTS
    between = (counts.mean(axis=1) / POINTS).var(axis=0, ddof=1) / n_transects
    binomial = p * (1 - p) / (n_transects * n_quadrats * POINTS)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(binomial > 0, between / binomial, np.nan)


def shannon(counts: Counts) -> NDArray[np.float64]:
    """Shannon diversity of each transect, in nats, ignoring points that hit bare rock."""
    check(counts)
    hits = counts.sum(axis=1).astype(float)
    total = hits.sum(axis=1, keepdims=True)
    p = np.divide(hits, total, out=np.zeros_like(hits), where=total > 0)
    logs = np.log(p, out=np.zeros_like(p), where=p > 0)
    return -(p * logs).sum(axis=1)


def changed(before: Counts, after: Counts, *, draws: int = 10_000, rng: np.random.Generator | None = None) -> NDArray[np.float64]:
    """Two-sided p value per species for "same cover in both years" on the same, permanently marked transects.

    Under the null hypothesis the two years of a transect are exchangeable, so the sign of each transect's
    difference is flipped at random. With five transects the smallest possible p value is 1/16: if that is not
    small enough, walk more transects, do not raise `draws`.
    """
    check(before)
    check(after)
    if before.shape[0] != after.shape[0] or before.shape[2] != after.shape[2]:
        raise ValueError("the two surveys do not have the same transects and species")
    rng = np.random.default_rng() if rng is None else rng

    diff = (after.mean(axis=1) - before.mean(axis=1)) / POINTS
    observed = np.abs(diff.mean(axis=0))
    n = diff.shape[0]
    if 2**n <= draws:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
    else:
        signs = rng.choice([-1.0, 1.0], size=(draws, n))
    null = np.abs(signs @ diff) / n
    return (null >= observed - 1e-12).mean(axis=0)
