"""Shallow-ice model of a valley glacier along its centre line.

One horizontal dimension, explicit time stepping, staggered flux.  The ice
thickness H(x, t) obeys

    dH/dt = b(z) - dq/dx,      q = -D ds/dx,      D = 2A/(n+2) (rho g)^n H^(n+2) |ds/dx|^(n-1)

with s = bed + H and b the mass balance in metres of ice per year, which rises
linearly with altitude up to a cap.
"""
from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

RHO = 917.0                      # kg m^-3
G = 9.81                         # m s^-2
YEAR = 365.25 * 86400.0          # s
A = 2.4e-24 * YEAR               # Pa^-3 a^-1, temperate ice
N = 3
GAMMA = 2.0 * A / (N + 2) * (RHO * G) ** N


def mass_balance(surface: Array, ela: float, gradient: float = 0.007, cap: float = 2.5) -> Array:
    """Annual balance at ``surface``; zero at the equilibrium line ``ela``."""
    return np.minimum(gradient * (surface - ela), cap)


class FlowLine:
    """State of one glacier.

    Parameters
    ----------
    bed : array
        Altitude of the rock at the grid points, metres.
    dx : float
        Grid spacing, metres.
    """

    def __init__(self, bed: Array, dx: float) -> None:
        self.bed = np.asarray(bed, dtype=float)
        self.dx = float(dx)
        self.H = np.zeros_like(self.bed)
        self.t = 0.0

    @property
    def surface(self) -> Array:
        return self.bed + self.H

    def diffusivity(self) -> Array:
        """Diffusivity at the midpoints, one fewer than there are points."""
        h_mid = 0.5 * (self.H[1:] + self.H[:-1])
        slope = np.diff(self.surface) / self.dx
        return GAMMA * h_mid ** (N + 2) * np.abs(slope) ** (N - 1)

    def step(self, ela: float, dt_max: float = 0.5) -> float:
        """Advance by one stable step and return its length in years."""
        d = self.diffusivity()
        d_top = d.max()
        # 0.15 rather than the textbook 0.5: the diffusivity itself depends on H
        dt = dt_max if d_top == 0.0 else min(dt_max, 0.15 * self.dx**2 / d_top)
        q = -d * np.diff(self.surface) / self.dx
        divergence = np.zeros_like(self.H)
        divergence[1:-1] = np.diff(q) / self.dx
        divergence[0] = q[0] / self.dx          # closed at the headwall
        divergence[-1] = -q[-1] / self.dx
        self.H += dt * (mass_balance(self.surface, ela) - divergence)
        np.maximum(self.H, 0.0, out=self.H)
        self.t += dt
        return dt

    def run(self, years: float, ela: float | None = None, *, forcing=None) -> None:
        """Integrate for ``years``; ``forcing(t)`` gives the equilibrium line when it moves."""
        if (ela is None) == (forcing is None):
            raise TypeError("give either ela or forcing")
        end = self.t + years
        while self.t < end:
            line = ela if forcing is None else forcing(self.t)
            self.step(line, dt_max=min(0.5, max(end - self.t, 1e-9)))

    def length(self, threshold: float = 5.0) -> float:
        """Distance from the headwall to the last point with more than ``threshold`` metres."""
        icy = np.flatnonzero(self.H > threshold)
        return 0.0 if icy.size == 0 else (icy[-1] + 1) * self.dx

    def volume_per_width(self) -> float:
        return float(np.trapezoid(self.H, dx=self.dx))


def e_folding_time(times: Array, lengths: Array) -> float:
    """Response time: when the change of length has reached 1 - 1/e of its final value."""
    change = np.abs(lengths - lengths[0])
    target = change[-1] * (1.0 - np.exp(-1.0))
    k = int(np.argmax(change >= target))
    if k == 0:
        return float("nan")
    f = (target - change[k - 1]) / (change[k] - change[k - 1])
    return float(times[k - 1] + f * (times[k] - times[k - 1]) - times[0])


if __name__ == "__main__":
    x = np.arange(0.0, 12_000.0, 100.0)
    rock = 3400.0 - 0.12 * x + 60.0 * np.exp(-(((x - 4000.0) / 900.0) ** 2))
    glacier = FlowLine(rock, dx=100.0)
    glacier.run(600.0, ela=2900.0)
    print(f"steady state: {glacier.length() / 1000:.1f} km, {glacier.H.max():.0f} m thick")

    record = []
    for _ in range(200):
        glacier.run(1.0, ela=3000.0)
        record.append((glacier.t, glacier.length()))
    t, L = np.array(record).T
    print(f"after a rise of 100 m: {L[-1] / 1000:.1f} km, e-folding after {e_folding_time(t, L):.0f} a")
