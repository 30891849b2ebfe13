"""
Aperture photometry with exact pixel overlaps.
"""

import numpy as np

from ..table import Table
from ..utils.decorators import deprecated_renamed_argument
from ._overlap import circular_overlap_grid

__all__ = ["CircularAnnulus", "aperture_sum", "estimate_background"]


class CircularAnnulus:
    """
    A ring around a position, used to measure the sky.

    Parameters
    ----------
    position : (2,) array_like
        Centre as ``(x, y)`` in pixels; the centre of the first pixel is
        ``(0, 0)``.
    r_in, r_out : float
        Inner and outer radius in pixels.

    Raises
    ------
    ValueError
        If not ``0 < r_in < r_out``.
    """

    def __init__(self, position, r_in, r_out):
        if not 0 < r_in < r_out:
            raise ValueError(f"need 0 < r_in < r_out, got {r_in} and {r_out}")
        self.position = np.asarray(position, dtype=float)
        self.r_in = float(r_in)
        self.r_out = float(r_out)

    def __repr__(self):
        x, y = self.position
        return f"<{type(self).__name__}(({x:g}, {y:g}), r_in={self.r_in:g}, r_out={self.r_out:g})>"

    @property
    def area(self):
        """Exact area of the ring in square pixels."""
        return np.pi * (self.r_out**2 - self.r_in**2)

    def pixels(self, data, mask=None):
        """
        Values of the pixels whose centres lie in the ring.

        Pixels outside the image, masked and non-finite ones are left out.
        """
        ny, nx = data.shape
        x, y = self.position
        x0, x1 = max(0, int(np.floor(x - self.r_out))), min(nx, int(np.ceil(x + self.r_out)) + 1)
        y0, y1 = max(0, int(np.floor(y - self.r_out))), min(ny, int(np.ceil(y + self.r_out)) + 1)
        yy, xx = np.mgrid[y0:y1, x0:x1]
        r = np.hypot(xx - x, yy - y)
        cutout = data[y0:y1, x0:x1]
        use = (r >= self.r_in) & (r < self.r_out) & np.isfinite(cutout)
        if mask is not None:
            use &= ~mask[y0:y1, x0:x1]
        return cutout[use]


def estimate_background(values, sigma=3.0, maxiters=10):
    """
    Sky level and its scatter by clipping around the median.

    Parameters
    ----------
    values : array_like
        Pixel values of an empty patch of sky, faint stars and all.
    sigma : float, optional
        Values further than this many standard deviations from the median are
        dropped in each round.
    maxiters : int, optional
        Rounds at most. Fewer are done once nothing more is dropped.

    Returns
    -------
    level : float
        ``3 * median - 2 * mean`` if the distribution is only mildly skewed,
        otherwise the median. NaN for an empty input.
    scatter : float
        Standard deviation of what is left.
    n : int
        How many values are left.

    Notes
    -----
    The switch to the plain median happens where mean and median differ by
    more than 0.3 standard deviations, which in practice means a bright
    neighbour inside the ring.
    """
    v = np.asarray(values, dtype=float).ravel()
    for _ in range(maxiters):
        if v.size < 2:
            break
        median, std = np.median(v), v.std()
        keep = np.abs(v - median) <= sigma * std
        if keep.all():
            break
        v = v[keep]

    if v.size == 0:
        return np.nan, np.nan, 0
    mean, median, std = v.mean(), np.median(v), v.std()
    if std > 0 and abs(mean - median) / std > 0.3:
        return median, std, v.size
    return 3 * median - 2 * mean, std, v.size


@deprecated_renamed_argument("radii", "r", since="2.1")
def aperture_sum(data, positions, r, *, annulus=None, mask=None, gain=1.0, readnoise=0.0):
    """
    Sum the light inside circles.

    Parameters
    ----------
    data : (ny, nx) ndarray
        Image in ADU.
    positions : (n, 2) array_like
        Centres as ``(x, y)``.
    r : float
        Radius of all the circles.
    annulus : (float, float), optional
        Inner and outer radius of a ring from which a local background is
        estimated and subtracted.
    mask : (ny, nx) ndarray of bool, optional
        `True` marks bad pixels. A star with a bad pixel inside its circle
        gets ``flag`` bit 1; the pixel counts as background.
    gain : float, optional
        Electrons per ADU.
    readnoise : float, optional
        In electrons per pixel.

    Returns
    -------
    Table
        Columns ``x``, ``y``, ``flux``, ``flux_err``, ``sky``, ``flag``.
        Flag bits: 1 bad pixel, 2 circle cut off by the edge, 4 no sky.

    Examples
    --------
    >>> image = np.ones((40, 40))
    >>> t = aperture_sum(image, [(20, 20)], 3.0)
    >>> print(f"{t['flux'][0]:.4f}")
    28.2743
    """
    data = np.asarray(data, dtype=float)
    ny, nx = data.shape
    rows = []
    for x, y in np.atleast_2d(positions):
        flag = 0
        if not (r <= x + 0.5 <= nx - r and r <= y + 0.5 <= ny - r):
            flag |= 2
        weights = circular_overlap_grid(-0.5 - x, nx - 0.5 - x, -0.5 - y, ny - 0.5 - y, nx, ny, r)

        sky, sky_std, n_sky = 0.0, 0.0, 0
        if annulus is not None:
            ring = CircularAnnulus((x, y), *annulus)
            sky, sky_std, n_sky = estimate_background(ring.pixels(data, mask))
            if n_sky < 10:
                flag |= 4
                sky = sky_std = 0.0

        image = data
        if mask is not None and (mask & (weights > 0)).any():
            flag |= 1
            image = np.where(mask, sky, data)

        area = weights.sum()
        flux = (image * weights).sum() - sky * area
        variance = max(flux, 0) / gain + area * (sky_std**2 + (readnoise / gain) ** 2)
        if n_sky:
            variance += (area * sky_std) ** 2 / n_sky
        rows.append((x, y, flux, np.sqrt(variance), sky, flag))
    return Table(rows=rows, names=("x", "y", "flux", "flux_err", "sky", "flag"))
