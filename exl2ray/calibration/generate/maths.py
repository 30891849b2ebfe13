"""Generated arithmetic and algebra with the working shown. Every result is computed, so every line is true."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction

from exl2ray.calibration.generate import words


def long_multiplication(rng: random.Random) -> tuple[str, str]:
    a, b = rng.randint(103, 9999), rng.randint(12, 989)
    parts = [int(d) * 10**i for i, d in enumerate(reversed(str(b))) if d != "0"]
    lines = [f"{a} x {p} = {a * p}" for p in parts]
    total = " + ".join(str(a * p) for p in parts)
    return f"{a} x {b}", "\n".join([*lines, f"{total} = {a * b}"])


def division(rng: random.Random) -> tuple[str, str]:
    d, n = rng.randint(3, 97), rng.randint(1000, 99999)
    q, r = divmod(n, d)
    return f"{n} / {d}", f"{d} x {q} = {d * q}; {n} - {d * q} = {r}. Quotient {q}, remainder {r}, or {n / d:.4f}."


def gcd_steps(rng: random.Random) -> tuple[str, str]:
    f = rng.randint(2, 60)
    a, b = f * rng.randint(20, 400), f * rng.randint(10, 300)
    lines, x, y = [], max(a, b), min(a, b)
    while y:
        lines.append(f"{x} = {x // y} * {y} + {x % y}")
        x, y = y, x % y
    return f"gcd({a}, {b})", "\n".join([*lines, f"gcd = {x}, lcm = {a * b // math.gcd(a, b)}"])


def linear_equation(rng: random.Random) -> tuple[str, str]:
    a, x, b = rng.randint(2, 19), Fraction(rng.randint(-60, 60), rng.randint(1, 6)), rng.randint(-50, 50)
    c = rng.choice([k for k in range(-9, 10) if k != a])
    right = a * x + b - c * x
    v = rng.choice("xyztuvkn")
    return (
        f"{a}{v} {b:+} = {c}{v} + ({right})",
        f"({a} - ({c})){v} = {right} - ({b})\n{a - c}{v} = {right - b}\n{v} = {x} (about {float(x):.3f})",
    )


def quadratic(rng: random.Random) -> tuple[str, str]:
    r, s, a = rng.randint(-15, 15), rng.randint(-15, 15), rng.randint(1, 6)
    b, c = -a * (r + s), a * r * s
    disc = b * b - 4 * a * c
    root = math.isqrt(disc)
    first, second = f"({-b} + {root})/{2 * a} = {max(r, s)}", f"({-b} - {root})/{2 * a} = {min(r, s)}"
    return f"{a}x^2 {b:+}x {c:+} = 0", f"D = ({b})^2 - 4*{a}*({c}) = {disc}\nx = {first} or x = {second}"


def fraction_sum(rng: random.Random) -> tuple[str, str]:
    p, q = (Fraction(rng.randint(1, 40), rng.randint(3, 48)) for _ in range(2))
    m = math.lcm(p.denominator, q.denominator)
    op, total = rng.choice((("+", p + q), ("-", p - q)))
    left, right = p * m, q * m
    return f"{p} {op} {q}", f"Over {m}: {left}/{m} {op} {right}/{m} = {total * m}/{m} = {total}."


def factorisation(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(300, 99999)
    left, factors, p = n, [], 2
    while p * p <= left:
        while left % p == 0:
            factors.append(p)
            left //= p
        p += 1
    if left > 1:
        factors.append(left)
    return f"the prime factors of {n}", f"{n} = {' * '.join(map(str, factors))}"


def number_bases(rng: random.Random) -> tuple[str, str]:
    n = rng.randint(50, 70000)
    return f"{n} in base 2, 8 and 16", f"{n:b} (binary), {n:o} (octal), {n:X} (hexadecimal)"


def derivative(rng: random.Random) -> tuple[str, str]:
    coeffs = [rng.randint(-12, 12) for _ in range(rng.randint(3, 6))]
    f = _polynomial(coeffs)
    d = _polynomial([k * c for k, c in enumerate(coeffs)][1:])
    x = rng.randint(-5, 5)
    at = sum(k * c * x ** (k - 1) for k, c in enumerate(coeffs) if k)
    return f"the slope of f(x) = {f} at x = {x}", f"f'(x) = {d}\nf'({x}) = {at}"


def matrix_product(rng: random.Random) -> tuple[str, str]:
    a, b = ([[rng.randint(-9, 12) for _ in range(2)] for _ in range(2)] for _ in range(2))
    c = [[sum(a[i][k] * b[k][j] for k in range(2)) for j in range(2)] for i in range(2)]
    det = c[0][0] * c[1][1] - c[0][1] * c[1][0]
    return f"{a} times {b}", f"{c}, with determinant {det}"


def mean_and_spread(rng: random.Random) -> tuple[str, str]:
    xs = sorted(rng.randint(1, 400) for _ in range(rng.randint(4, 9)))
    mean = Fraction(sum(xs), len(xs))
    spread = math.sqrt(float(sum((x - mean) ** 2 for x in xs) / (len(xs) - 1)))
    return f"mean and deviation of {xs}", f"sum {sum(xs)}, mean {float(mean):.3f}, sample deviation {spread:.3f}"


def word_problem(rng: random.Random) -> tuple[str, str]:
    who, things = words.person(rng).split()[0], words.plural(rng.choice(words.NOUNS))
    n, price, discount = rng.randint(3, 48), rng.randint(120, 9900), rng.choice((5, 8, 10, 12, 15, 20, 25))
    total = Fraction(n * price * (100 - discount), 10000)
    return (
        f"{who} buys {n} {things} at {price / 100:.2f} each, {discount} % off. The bill?",
        f"{n} x {price / 100:.2f} = {n * price / 100:.2f}; {discount} % of it is {n * price * discount / 10000:.2f}; "
        f"{who} pays {float(total):.2f}.",
    )


TASKS: tuple[Callable[[random.Random], tuple[str, str]], ...] = (
    long_multiplication,
    division,
    gcd_steps,
    linear_equation,
    quadratic,
    fraction_sum,
    factorisation,
    number_bases,
    derivative,
    matrix_product,
    mean_and_spread,
    word_problem,
)


def exercises(rng: random.Random) -> str:
    """A page of exercises with their solutions."""
    style = rng.choice(("{i}. {q}\n{a}\n", "Exercise {i}: {q}.\nSolution. {a}\n", "Q{i} {q}\nA{i} {a}\n"))
    tasks = [rng.choice(TASKS)(rng) for _ in range(rng.randint(5, 10))]
    return "\n".join(style.format(i=i, q=q, a=a) for i, (q, a) in enumerate(tasks, 1))


def _polynomial(coeffs: list[int]) -> str:
    """Text of sum c_k x^k, highest power first."""
    terms = []
    for k in range(len(coeffs) - 1, -1, -1):
        if coeffs[k]:
            power = "" if k == 0 else "x" if k == 1 else f"x^{k}"
            terms.append(f"{coeffs[k]}{power}")
    return " + ".join(terms).replace("+ -", "- ") or "0"
