"""Losses of options that were not measured, and the options worth choosing from."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quant_helpers import hessian, weights

from exl2ray.allocation.frontier import KERNEL_SETS, NEAR, RELATIVE, LossCurve, all_options, frontier, relative
from exl2ray.allocation.knapsack import Slot, solve
from exl2ray.errors import FormatError
from exl2ray.formats.layout import QParams
from exl2ray.quant.hessian import prepare
from exl2ray.quant.measure import LossTable, piece_rows
from exl2ray.quant.qparams import mlp_options, parse, unique
from exl2ray.quant.solve import solve_options

TABLE = unique([row[0] for row in mlp_options()])[0]


def entry(k: int, level: float = 2.0, shape: list[float] | None = None) -> dict[str, object]:
    """Losses that are exactly as the general numbers say."""
    flat = LossCurve({"losses": {"1:4b_128g s4": level}, **({"shape": shape} if shape else {})}, k, "x")
    return {"losses": {q.desc: flat.loss(q) for q in TABLE}, **({"shape": shape} if shape else {})}


def test_options_are_those_with_kernels() -> None:
    options = all_options()
    assert len(set(options)) == len(options) > 100
    assert all(frozenset(q.bits) in KERNEL_SETS for q in options)
    assert {b for q in options for b in q.bits} == {2, 3, 4, 5, 6, 8}
    assert relative(4, 96) == RELATIVE[4, 64]
    assert (relative(2, 512), relative(3, 512)) == (RELATIVE[2, 512], RELATIVE[3, 128])
    assert [q.desc for q in all_options(low=True)[len(options) :]] == ["1:2b_256g s4", "1:2b_512g s4"], "the others are there"


def test_general_numbers_are_reproduced() -> None:
    curve = LossCurve(entry(512), 512, "x")
    assert curve.loss(parse("1:4b_128g")) == pytest.approx(2.0)
    assert curve.loss(parse("1:2b_64g")) == pytest.approx(2.0 * RELATIVE[2, 64])
    mixed = curve.loss(parse("0.25:3b_64g/0.75:2b_64g"))
    assert mixed == pytest.approx(2.0 * (0.25 * RELATIVE[3, 64] + 0.75 * RELATIVE[2, 64]))


def test_the_shape_says_what_the_first_rows_are_worth() -> None:
    shape = [4.0] + [11 / 15 + 0.0666666] * 15  # K = 512: 16 pieces of 32 rows
    curve = LossCurve(entry(512, shape=shape), 512, "x")
    total = sum(shape)
    share = sum(shape[:4]) / total
    expected = 2.0 * (share * RELATIVE[3, 64] + (1 - share) * RELATIVE[2, 64])
    assert curve.loss(parse("0.25:3b_64g/0.75:2b_64g")) == pytest.approx(expected)


def test_a_linear_of_random_weights_is_predicted() -> None:
    """Inputs of very different size, far from the models that the numbers are from."""
    k, n = 512, 64
    factor = prepare(hessian(k, 2, tokens=2 * k))
    w = weights(k, n, 5)
    wanted = [parse(t) for t in ("1:2b_64g", "1:3b_32g", "1:3b_128g", "0.5:5b_32g/0.5:4b_32g", "1:5b_64g", "1:6b_64g")]
    options = [*TABLE, *wanted]
    table, known = LossTable(), LossTable()
    solved = solve_options(factor, {"w": w}, {"w": options})["w"]
    table.add("w", options, solved, factor, 1.0)
    known.add("w", TABLE, {j: solved[j] for j in range(len(TABLE))}, factor, 1.0)
    true = table.extra()["linears"]["w"]["losses"]
    curve = LossCurve(known.extra()["linears"]["w"], k, "w")
    for option in TABLE:
        assert curve.loss(option) == true[option.desc]
    for option in wanted:
        assert curve.loss(option) == pytest.approx(true[option.desc], rel=0.12), option.desc


def sizes(k: int, options: Sequence[QParams] | None = None, n: int = 256) -> list[int]:
    return [q.layout(k).total_bits(n) for q in options or all_options()]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([256, 704, 1408]),
    st.lists(st.floats(0.2, 5), min_size=44, max_size=44),
    st.floats(-3, 3),
)
def test_the_frontier_has_every_best_option(k: int, numbers: list[float], level: float) -> None:
    """For any price of a bit the cheapest option is among them; and none is beaten by a smaller one."""
    pieces = -(-k // piece_rows(k))
    curve = LossCurve(entry(k, 10**level, numbers[:pieces]), k, "x")
    found = frontier(curve, sizes(k))
    assert all(a.bits < b.bits and a.loss > b.loss for a, b in itertools.pairwise(found))
    every = [(q.layout(k).total_bits(256), curve.loss(q)) for q in all_options()]
    for exponent in range(-12, 2):
        price = 10.0**exponent
        assert min(c.loss + price * c.bits for c in found) == pytest.approx(min(v + price * b for b, v in every), rel=1e-12)
    for c in found:
        cheaper, dearer = [(b, v) for b, v in every if b <= c.bits], [(b, v) for b, v in every if b >= c.bits]
        low = min(
            v1 if b1 == b2 else v1 + (v2 - v1) * (c.bits - b1) / (b2 - b1) for b1, v1 in cheaper for b2, v2 in dearer
        )
        assert c.loss <= (1 + NEAR) * low * (1 + 1e-9)


def test_the_frontier_is_what_going_through_the_options_finds() -> None:
    """One after another by size, to the last bit; also where several have one size."""
    rng = np.random.default_rng(5)
    for seed in range(12):
        k = (256, 704, 4096)[seed % 3]
        shape = [float(v) for v in np.exp(rng.normal(0, 0.8, -(-k // piece_rows(k))))]
        curve = LossCurve(entry(k, float(np.exp(rng.normal(0, 4))), shape), k, "x")
        bits = [b >> 12 << 12 if seed % 2 else b for b in sizes(k)]
        tried = sorted(zip(bits, map(curve.loss, all_options()), range(len(bits)), strict=True), key=lambda c: c[:2])
        better = [c for i, c in enumerate(tried) if all(c[1] < other[1] for other in tried[:i])]
        hull: list[tuple[int, float, int]] = []
        for c in better:
            while len(hull) > 1 and slope(hull[-2], c) <= slope(hull[-2], hull[-1]):
                hull.pop()
            hull.append(c)
        most = 1.01 * np.interp([c[0] for c in better], [c[0] for c in hull], [c[1] for c in hull])
        wanted = [(all_options()[i], b, v) for (b, v, i), at_most in zip(better, most, strict=True) if v <= at_most]
        assert [(c.params, c.bits, c.loss) for c in frontier(curve, bits, near=0.01)] == wanted


def slope(a: tuple[int, float, int], b: tuple[int, float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def test_a_large_model_is_solved_closely_and_quickly() -> None:
    """560 linears, as a 70B model has them."""
    rng = np.random.default_rng(0)
    slots, weights = [], 0
    start = time.process_time()
    for _ in range(80):
        for k, n in [(8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), (8192, 28672), (8192, 28672), (28672, 8192)]:
            shape = [float(v) for v in np.exp(rng.normal(0, 0.4, -(-k // piece_rows(k))))]
            curve = LossCurve(entry(k, float(np.exp(rng.normal(0, 1.5))) * k * n, shape), k, "x")
            found = frontier(curve, sizes(k, n=n))
            slots.append(Slot("x", tuple(c.bits for c in found), tuple(c.loss**0.5 for c in found)))
            weights += k * n
    for bits in (2.5, 3.0, 4.25, 6.0):
        assert solve(slots, int(weights * bits)).gap < 1e-4
    assert time.process_time() - start < 60  # 4 s on an idle core


def test_given_options_only() -> None:
    curve = LossCurve(entry(256), 256, "x")
    exact = parse("1:5b_64g")
    assert [c.params for c in frontier(curve, sizes(256, [exact]), [exact])] == [exact]
    wide = [q for q in all_options() if min(q.bits) >= 5]
    found = frontier(curve, sizes(256, wide), wide)
    assert found
    assert all(min(c.params.bits) >= 5 for c in found)


def test_a_linear_of_zeros_costs_nothing_wherever_it_is_stored() -> None:
    curve = LossCurve({"losses": {"1:4b_128g s4": 0.0}}, 256, "x")
    (only,) = frontier(curve, sizes(256))
    assert only.loss == 0.0
    assert only.bits == min(sizes(256))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({}, "no losses"),
        ({"losses": {}}, "no losses"),
        ({"losses": {"1:4b_128g s4": "1"}}, "not a number"),
        ({"losses": {"1:4b_128g s4": float("inf")}}, "not a number"),
        ({"losses": {"1:4b_128g s4": 1.0}, "shape": [1.0]}, "1 pieces, expected 8"),
        ({"losses": {"1:4b_128g s4": 1.0}, "shape": {"a": 1}}, "no list"),
        ({"losses": {"1:4b_128g s4": 1.0}, "shape": [-1.0] * 8}, "not a number"),
    ],
)
def test_broken_entries_are_named(broken: dict[str, object], message: str) -> None:
    with pytest.raises(FormatError, match=rf"place: .*{message}"):
        LossCurve(broken, 256, "place")


def test_parameters_of_the_frontier_are_plain_options() -> None:
    """What is chosen can be written into measurement files and read back."""
    for q in all_options():
        assert QParams.from_json(q.to_json()) == q
