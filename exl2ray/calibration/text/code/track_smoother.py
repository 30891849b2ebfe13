r"""Smoothing of noisy two-dimensional tracks with a constant-velocity Kalman filter.

The state of a walker is x = (px, py, vx, vy). Between fixes dt seconds apart

    x[k+1] = F x[k] + w,    w ~ N(0, Q),     F = [[I, dt*I], [0, I]]

and the receiver reports z = H x + v with v ~ N(0, R). Acceleration is modelled as white noise of
spectral density q, which gives the textbook block matrix

    Q = q * [[dt^3/3 * I, dt^2/2 * I], [dt^2/2 * I, dt * I]].

The forward pass is the ordinary filter; the backward pass is the Rauch-Tung-Striebel recursion,
so every estimate uses the whole recording. Missing fixes are NaN rows: the filter predicts
through them and the smoother fills the gap with a plausible curve.
"""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

H = np.hstack([np.eye(2), np.zeros((2, 2))])


def transition(dt: float, q: float) -> tuple[Array, Array]:
    """Return (F, Q) for one step of ``dt`` seconds."""
    eye = np.eye(2)
    F = np.block([[eye, dt * eye], [np.zeros((2, 2)), eye]])
    Q = q * np.block([[dt**3 / 3 * eye, dt**2 / 2 * eye], [dt**2 / 2 * eye, dt * eye]])
    return F, Q


def smooth(times: Array, fixes: Array, *, sigma: float = 4.0, q: float = 0.3) -> tuple[Array, Array]:
    """Estimate positions and velocities at every time stamp.

    times  (n,)    seconds, strictly increasing
    fixes  (n, 2)  metres in a local plane; NaN where the receiver had no fix
    sigma          standard deviation of one coordinate of a fix, metres
    q              acceleration noise, m^2/s^3: 0.3 suits walking, 3 cycling

    Returns the smoothed states (n, 4) and their covariances (n, 4, 4).
    """
    n = len(times)
    if fixes.shape != (n, 2):
        raise ValueError(f"expected fixes of shape ({n}, 2), got {fixes.shape}")
    if np.any(np.diff(times) <= 0):
        bad = int(np.argmax(np.diff(times) <= 0))
        raise ValueError(f"time stamps must increase; {times[bad]} is followed by {times[bad + 1]}")
    valid = ~np.isnan(fixes).any(axis=1)
    if not valid.any():
        raise ValueError("the recording has no fix at all")

    R = sigma**2 * np.eye(2)
    first = fixes[valid][0]
    x = np.array([first[0], first[1], 0.0, 0.0])
    # A vague prior: we know roughly where the track starts and nothing about the speed.
    P = np.diag([1e3, 1e3, 25.0, 25.0])

    filtered = np.empty((n, 4))
    filtered_cov = np.empty((n, 4, 4))
    predicted = np.empty((n, 4))
    predicted_cov = np.empty((n, 4, 4))
    steps = np.diff(times, prepend=times[0])

    for k in range(n):
        if k > 0:
            F, Q = transition(steps[k], q)
            x = F @ x
            P = F @ P @ F.T + Q
        predicted[k], predicted_cov[k] = x, P
        if valid[k]:
            S = H @ P @ H.T + R
            # Solve instead of inverting: S is small, but the habit is cheap and the result
            # stays accurate when R is nearly singular.
            K = np.linalg.solve(S, H @ P).T
            x = x + K @ (fixes[k] - H @ x)
            # Joseph form keeps P symmetric and positive definite under rounding.
            A = np.eye(4) - K @ H
            P = A @ P @ A.T + K @ R @ K.T
        filtered[k], filtered_cov[k] = x, P

    states, covs = filtered.copy(), filtered_cov.copy()
    for k in range(n - 2, -1, -1):
        F, _ = transition(steps[k + 1], q)
        G = np.linalg.solve(predicted_cov[k + 1], F @ filtered_cov[k]).T
        states[k] += G @ (states[k + 1] - predicted[k + 1])
        covs[k] += G @ (covs[k + 1] - predicted_cov[k + 1]) @ G.T
    return states, covs


def path_length(states: Array) -> float:
    """Length of the smoothed polyline in metres."""
    return float(np.linalg.norm(np.diff(states[:, :2], axis=0), axis=1).sum())


def rms(errors: Array) -> float:
    """Root mean square distance; rows without a fix do not count."""
    return float(np.sqrt(np.nanmean(np.sum(errors**2, axis=1))))


def _demo() -> None:
    rng = np.random.default_rng(11)
    t = np.arange(0.0, 600.0, 5.0)
    # A lap around an elliptical pond at about 1.3 m/s.
    angle = 2 * np.pi * t / t[-1]
    truth = np.column_stack([150 * np.cos(angle), 95 * np.sin(angle)])
    fixes = truth + rng.normal(0.0, 4.0, truth.shape)
    fixes[40:46] = np.nan  # thirty seconds under the trees

    states, _ = smooth(t, fixes)
    print(f"error of raw fixes       {rms(fixes - truth):6.2f} m")
    print(f"error after smoothing    {rms(states[:, :2] - truth):6.2f} m")
    gap = slice(40, 46)
    print(f"error inside the gap     {rms(states[gap, :2] - truth[gap]):6.2f} m")
    print(f"length true / smoothed   {path_length(truth):.0f} / {path_length(states):.0f} m")


if __name__ == "__main__":
    _demo()
