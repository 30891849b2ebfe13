import numpy as np
from scipy.optimize import brentq, least_squares

"""Stretch tuning of an upright piano from a recording of single notes.

Strings are stiff, so partial k of a note is not at k*f0 but at

    f_k = k * f0 * sqrt(1 + B * k**2)

A tuner therefore widens the octaves until the partials that the ear compares
agree.  The functions below find B for each note and then the frequencies.
"""

A4_KEY = 49


def partials(f0, B, n=10):
    k = np.arange(1, n + 1)
    return k * f0 * np.sqrt(1.0 + B * k * k)


def refine_peak(spectrum, i):
    """Parabola through the log magnitudes of three bins; returns a fractional bin."""
    a, b, c = np.log(spectrum[i - 1:i + 2] + 1e-20)
    return i + 0.5 * (a - c) / (a - 2 * b + c)


def find_partials(x, rate, f0_guess, n=10, B_guess=4e-4):
    N = len(x)
    window = np.blackman(N)
    spec = np.abs(np.fft.rfft(x * window))
    found = []
    for k, f in enumerate(partials(f0_guess, B_guess, n), start=1):
        # search 2 % around the guess, but never so wide that the neighbour falls in
        half = min(0.02 * f, 0.4 * f0_guess)
        lo = max(1, int((f - half) * N / rate))
        hi = min(len(spec) - 2, int((f + half) * N / rate) + 1)
        if hi - lo < 3:
            break
        i = lo + int(np.argmax(spec[lo:hi]))
        floor = np.median(spec[lo:hi])
        if spec[i] > 8 * floor and lo < i < hi - 1:
            found.append((k, refine_peak(spec, i) * rate / N))
    return found


def fit_string(found):
    """(f0, B) from a list of (k, frequency).  Needs at least three partials."""
    if len(found) < 3:
        raise ValueError("only %d partials stand out of the noise" % len(found))
    k, f = np.array(found, dtype=float).T

    def residual(p):
        f0, logB = p
        return 1200 * np.log2(k * f0 * np.sqrt(1 + np.exp(logB) * k**2) / f)

    sol = least_squares(residual, [f[0] / k[0], np.log(4e-4)], loss="soft_l1", f_scale=1.0)
    return sol.x[0], np.exp(sol.x[1])


def inharmonicity_curve(keys, Bs):
    """log B is close to two straight lines, one for the wound strings and one for the plain ones.

    The break is not known in advance: try each and keep the best.
    """
    keys, y = np.asarray(keys, float), np.log(Bs)
    best = None
    for brk in range(int(keys.min()) + 4, int(keys.max()) - 4):
        bass, treble = keys < brk, keys >= brk
        if bass.sum() < 3 or treble.sum() < 3:
            continue
        p = np.polyfit(keys[bass], y[bass], 1)
        q = np.polyfit(keys[treble], y[treble], 1)
        err = np.sum((np.polyval(p, keys[bass]) - y[bass])**2) + np.sum((np.polyval(q, keys[treble]) - y[treble])**2)
        if best is None or err < best[0]:
            best = err, brk, p, q
    if best is None:
        raise ValueError("too few notes on either side of the bridge break")
    _, brk, p, q = best
    return lambda key: np.exp(np.where(np.asarray(key) < brk, np.polyval(p, key), np.polyval(q, key)))


def octave_above(f_low, B_low, B_high, ratio=(4, 2)):
    """f0 of the upper note such that partial ratio[0] of the lower meets ratio[1] of the upper."""
    m, n = ratio
    target = m * f_low * np.sqrt(1 + B_low * m * m)
    return brentq(lambda f: n * f * np.sqrt(1 + B_high * n * n) - target, 1.8 * f_low, 2.4 * f_low)


def tune(B_of, a4=440.0):
    """Cents of stretch for keys 1..88, 6:3 octaves in the bass, 4:2 in the middle, 2:1 on top."""
    f = {A4_KEY: a4}
    for key in range(A4_KEY + 12, 89, 12):
        f[key] = octave_above(f[key - 12], B_of(key - 12), B_of(key), (2, 1) if key > 64 else (4, 2))
    for key in range(A4_KEY - 12, 0, -12):
        ratio = (6, 3) if key < 30 else (4, 2)
        f[key] = brentq(lambda g: octave_above(g, B_of(key), B_of(key + 12), ratio) - f[key + 12],
                        f[key + 12] / 2.3, f[key + 12] / 1.9)
    anchors = sorted(f)
    cents = [1200 * np.log2(f[k] / a4) - 100 * (k - A4_KEY) for k in anchors]
    every = np.arange(1, 89)
    curve = np.interp(every, anchors, cents)
    top = every > anchors[-1]
    slope = (cents[-1] - cents[-2]) / 12
    curve[top] = cents[-1] + slope * (every[top] - anchors[-1])
    return curve


def test_synthetic_string():
    rate, t = 44100, np.arange(3 * 44100) / 44100
    x = sum(np.exp(-t * k) / k * np.sin(2 * np.pi * f * t) for k, f in enumerate(partials(220.0, 5e-4), 1))
    f0, B = fit_string(find_partials(x, rate, 219.0))
    assert abs(f0 - 220.0) < 0.02
    assert abs(B / 5e-4 - 1) < 0.05


def test_stretch_has_the_right_sign():
    curve = tune(lambda key: 3e-4 * np.exp(0.05 * abs(key - 35)))
    assert curve[0] < -3 < 3 < curve[-1]
    assert abs(curve[A4_KEY - 1]) < 1e-9
