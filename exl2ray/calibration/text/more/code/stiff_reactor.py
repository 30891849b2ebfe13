r"""A two-stage Rosenbrock method for small stiff autonomous systems, with dense Jacobians by complex steps.

Example: Robertson's reactions, three species whose rates differ by nine powers of ten.

    >>> k1, k2, k3 = 0.04, 3e7, 1e4
    >>> def robertson(t, y):
    ...     a = -k1 * y[0] + k3 * y[1] * y[2]
    ...     c = k2 * y[1] ** 2
    ...     return np.array([a, -a - c, c])
    >>> sol = solve(robertson, (0, 1e4), [1, 0, 0], rtol=1e-6, atol=1e-10)
    >>> bool(abs(sol.y[-1].sum() - 1) < 1e-9)
    True
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lu_factor, lu_solve

Rhs = Callable[[float, NDArray], NDArray]

# Second order and L-stable: two stages that share one LU factorisation. The other root, 1 + 1/sqrt(2), is L-stable as
# well but its error constant is ten times as large.
GAMMA = 1 - 2 ** -0.5


@dataclass
class Solution:
    t: NDArray
    y: NDArray
    rejected: int
    evaluations: int


class StepTooSmall(ArithmeticError):
    def __init__(self, t: float, h: float, y: NDArray):
        super().__init__(f"step {h:.2g} at t = {t:.6g}; worst component {int(np.argmax(np.abs(y)))}")
        self.t, self.h, self.y = t, h, y


def jacobian(f: Rhs, t: float, y: NDArray, eps: float = 1e-30) -> NDArray:
    """Exact to rounding, but `f` must be analytic: no abs(), no comparisons, no table look-ups."""
    n = len(y)
    out = np.empty((n, n))
    z = y.astype(complex)
    for j in range(n):
        z[j] += 1j * eps
        out[:, j] = np.imag(f(t, z)) / eps
        z[j] = y[j]
    return out


def _norm(e: NDArray, y0: NDArray, y1: NDArray, rtol: float, atol: float | NDArray) -> float:
    scale = atol + rtol * np.maximum(np.abs(y0), np.abs(y1))
    return float(np.sqrt(np.mean((e / scale) ** 2)))


def solve(f: Rhs, span: tuple[float, float], y0: ArrayLike, *, rtol: float = 1e-5, atol: float | Sequence[float] = 1e-8,
          h0: float | None = None, max_steps: int = 100_000,
          event: Callable[[float, NDArray], float] | None = None) -> Solution:
    """Integrates until the end of the span, or until `event` changes its sign, whichever comes first."""
    t, end = map(float, span)
    y = np.array(y0, dtype=float)
    atol = np.asarray(atol, dtype=float)
    evals, rejected = 1, 0
    fy = f(t, y)
    h = h0 or 0.01 * np.linalg.norm(y + atol) / (np.linalg.norm(fy) + 1e-300)
    ts, ys = [t], [y.copy()]
    g0 = event(t, y) if event else 0.0
    eye = np.eye(len(y))

    for _ in range(max_steps):
        if t >= end:
            break
        h = min(h, end - t)
        J = jacobian(f, t, y)
        lu = lu_factor(eye - h * GAMMA * J)
        k1 = lu_solve(lu, fy)
        k2 = lu_solve(lu, f(t + h, y + h * k1) - 2 * k1)
        evals += 1 + len(y)
        y_new = y + h / 2 * (3 * k1 + k2)
        # The first stage alone is a poorer solution that only serves to judge the better one.
        error = _norm(h / 2 * (k1 + k2), y, y_new, rtol, atol)
        if not np.isfinite(error):
            error = 1e6
        factor = min(5.0, max(0.15, 0.85 * error ** -0.5 if error else 5.0))
        if error > 1:
            rejected += 1
            h *= factor
            if t + h == t:
                raise StepTooSmall(t, h, y)
            continue
        t_old, y_old = t, y
        t, y = t + h, y_new
        fy = f(t, y)
        evals += 1
        if event and (g := event(t, y)) * g0 < 0:
            # A straight line between the ends is good enough: the step was small where things move.
            s = g0 / (g0 - g)
            t, y = t_old + s * (t - t_old), y_old + s * (y - y_old)
            ts.append(t)
            ys.append(y)
            break
        ts.append(t)
        ys.append(y.copy())
        h *= factor
    else:
        raise RuntimeError(f"gave up at t = {t:.6g} after {max_steps} steps")
    return Solution(np.array(ts), np.array(ys), rejected, evals)


def runaway_time(heat: float = 25.0, cooling: float = 1.0) -> float:
    """Time until a stirred tank of 300 K passes 420 K; inf when the jacket keeps up with it."""
    def tank(t, y):
        conversion, temperature = y
        rate = 2.4e9 * np.exp(-8750 / temperature) * (1 - conversion)
        return np.array([rate, heat * 12 * rate - cooling * 0.02 * (temperature - 300)])

    sol = solve(tank, (0, 5000), [0, 300], atol=[1e-9, 1e-4], event=lambda t, y: y[1] - 420)
    return float(sol.t[-1]) if sol.t[-1] < 5000 else float("inf")
