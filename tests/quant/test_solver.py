"""The batched solver on the CPU kernels, against the plain loop, one problem after another."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from output_error import relative_error
from quant_helpers import hessian, reference, weights
from torch import Tensor

from exl2ray.cuda import solver
from exl2ray.cuda.backend import REFINED_BITS
from exl2ray.cuda.solver import Segment, Solution, panels, solve_segments
from exl2ray.formats.layout import GroupLayout
from exl2ray.quality import PLAIN, Numerics
from exl2ray.quant import gptq, solve
from exl2ray.quant.gptq import Quantized, descend, feedback_factor, quantize_reference
from exl2ray.quant.hessian import Factor, prepare, round_to_nearest
from exl2ray.quant.qparams import attention_options, mlp_options, parse
from exl2ray.quant.solve import Problem, quantize_linears, solve_options, solve_problems

FEEDBACK = Numerics(scale_search="feedback")

TEXTS = [
    "1:2b_32g",
    "1:3b_64g",
    "1:4b_128g",
    "1:8b_128g",
    "0.05:3b_64g/0.95:2b_64g",
    "0.1:6b_32g/0.9:5b_32g",
    "0.05:8b_32g/0.1:4b_128g/0.85:3b_128g",
    "0.05:6b_32g/0.2:3b_64g/0.75:2b_64g",
]


def same(a: Tensor, b: Tensor) -> float:
    return float((a == b).double().mean())


def ordered(solved: Any) -> list[Any]:
    """Results by number, in order."""
    return [solved[i] for i in range(len(solved))]


def assert_close(found: Solution, expected: Quantized, h: Tensor, w: Tensor) -> None:
    """Equal but for the rare integers whose rounding hangs on the order of a sum; the layer's error is the same."""
    assert same(found.weight, expected.weight) > 0.995
    assert torch.allclose(found.scale_max.float(), expected.scale_max.float(), rtol=2e-3)
    ours, plain = relative_error(h, w, found.weight), relative_error(h, w, expected.weight)
    assert ours == pytest.approx(plain, rel=1e-3)
    if found.codes is not None and found.scale_codes is not None:
        assert same(found.codes, expected.codes) > 0.995
        assert same(found.scale_codes, expected.scale_codes) > 0.998


@pytest.mark.parametrize("text", TEXTS)
def test_one_problem(text: str) -> None:
    k, n = 352, 96  # the last group is cut, columns are more than one block of the kernels
    h, w = hessian(k, 11, tokens=600), weights(k, n, 11)
    factor, layout = prepare(h), parse(text).layout(k)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True)[0]
    assert_close(found, reference(factor, w, layout), h, w)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_random_layouts(data: st.DataObject) -> None:
    rows = tuple(data.draw(st.lists(st.sampled_from([32, 64, 96, 128]), min_size=1, max_size=5)))
    bits = sorted(data.draw(st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=len(rows), max_size=len(rows))))
    seed = data.draw(st.integers(0, 10))
    layout, k = GroupLayout(tuple(reversed(bits)), rows), sum(rows)
    h, w = hessian(k, seed, tokens=2 * k), weights(k, 32 * data.draw(st.integers(1, 3)), seed)
    factor = prepare(h)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True)[0]
    expected = reference(factor, w, layout)
    assert found.codes is not None
    # A flipped integer changes what follows it: the error decides, not the count.
    assert same(found.codes, expected.codes) > 0.9
    assert relative_error(h, w, found.weight) == pytest.approx(relative_error(h, w, expected.weight), rel=0.01)


def test_more_rows_than_a_panel(monkeypatch: pytest.MonkeyPatch) -> None:
    h, w = hessian(320, 2, tokens=600), weights(320, 32, 2)
    factor, layout = prepare(h), parse("0.1:4b_64g/0.9:3b_64g").layout(320)
    whole = solve_problems(factor, [w], [Problem(0, layout)])[0]
    monkeypatch.setattr(solver.panels, "__defaults__", (128,))
    assert len(list(panels(layout.rows))) == 3
    assert_close(solve_problems(factor, [w], [Problem(0, layout)])[0], reference(factor, w, layout), h, w)
    assert same(whole.weight, solve_problems(factor, [w], [Problem(0, layout)])[0].weight) > 0.99


@pytest.mark.parametrize("rows", [(32,), (128, 128, 96), (64,) * 20, (128,) * 4 + (32,), (512, 128), (640,)])
def test_panels_cover_all_groups(rows: tuple[int, ...]) -> None:
    found = list(panels(rows, 512))
    assert [g for first, last, _, _ in found for g in range(first, last)] == list(range(len(rows)))
    assert all(stop - start == sum(rows[first:last]) for first, last, start, stop in found)
    assert (found[0][2], found[-1][3]) == (0, sum(rows))
    assert all(stop - start <= 512 or last == first + 1 for first, last, start, stop in found)


def test_a_batch_gives_what_its_members_give_alone() -> None:
    """Several linears of different width, several options, in an order that is not that of the linears."""
    k = 256
    factor = prepare(hessian(k, 5, tokens=500))
    ws = [weights(k, n, seed) for seed, n in enumerate((96, 32, 64))]
    texts = ["1:4b_64g", "0.1:4b_64g/0.9:3b_64g", "1:2b_64g", "1:4b_128g", "0.05:8b_32g/0.95:4b_128g"]
    problems = [Problem(i, parse(t).layout(k)) for t in texts for i in (2, 0, 1)]
    together = solve_problems(factor, ws, problems, keep_codes=True)
    for problem, found in zip(problems, ordered(together), strict=True):
        alone = solve_problems(factor, [ws[problem.weight]], [Problem(0, problem.layout)], keep_codes=True)[0]
        assert found.weight.shape == ws[problem.weight].shape
        assert torch.equal(found.scale_max, alone.scale_max)
        assert found.scale_codes is not None
        assert alone.scale_codes is not None
        assert torch.equal(found.scale_codes, alone.scale_codes)
        assert same(found.weight, alone.weight) > 0.995


def test_batches_respect_the_budget_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    k, n = 128, 64
    factor, w = prepare(hessian(k)), weights(k, n)
    problems = [Problem(0, parse(t).layout(k)) for t in ("1:2b_64g", "1:3b_64g", "1:4b_64g", "1:5b_64g", "1:6b_64g")]
    sizes: list[int] = []

    def counted(r: Any, perm: Any, ws: Any, segments: Sequence[Segment], *rest: Any, **more: Any) -> list[Solution]:
        sizes.append(len(segments))
        return solve_segments(r, perm, ws, segments, *rest, **more)

    free = solve_problems(factor, [w], problems)
    monkeypatch.setattr(solve, "solve_segments", counted)
    tight = solve_problems(factor, [w], problems, budget_bytes=2 * solve.BYTES_PER_WEIGHT * k * n)
    assert sizes == [2, 2, 1]
    sizes.clear()
    tiny = solve_problems(factor, [w], problems, budget_bytes=1)
    assert sizes == [1] * 5
    for a, b, c in zip(*map(ordered, (free, tight, tiny)), strict=True):
        assert same(a.weight, b.weight) > 0.995
        assert same(a.weight, c.weight) > 0.995


def test_results_survive_the_next_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """`solve_segments` may reuse the buffers of its results: whoever keeps them must hold copies."""
    returned: list[Tensor] = []

    def reusing(*args: Any, **more: Any) -> list[Solution]:
        for old in returned:
            old.fill_(0)
        solutions = solve_segments(*args, **more)
        for s in solutions:
            found = (s.weight, s.codes, s.scale_codes, s.scale_max, s.losses, s.energies)
            returned.extend(t for t in found if t is not None)
        return solutions

    k = 64
    factor, w = prepare(hessian(k)), {"a": weights(k, 32, 1), "b": weights(k, 32, 2)}
    options = {"a": [parse("1:3b_32g"), parse("1:4b_32g")], "b": [parse("1:5b_32g")]}
    layouts = {"a": parse("1:3b_32g").layout(k), "b": parse("1:4b_32g").layout(k)}
    expected_options = solve_options(factor, w, options, budget_bytes=1)
    expected = quantize_linears(factor, w, layouts, budget_bytes=1)
    monkeypatch.setattr(solve, "solve_segments", reusing)
    first = solve_options(factor, w, options, budget_bytes=1)
    second = quantize_linears(factor, w, layouts, budget_bytes=1)
    solve_options(factor, w, options, budget_bytes=1)
    for role in w:
        for a, b in zip(ordered(first[role]), ordered(expected_options[role]), strict=True):
            assert torch.equal(a.weight, b.weight)
        for name in ("weight", "codes", "scale_codes", "scale_max"):
            assert torch.equal(getattr(second[role], name), getattr(expected[role], name))


def test_options_come_back_by_role_in_order() -> None:
    k = 256
    factor = prepare(hessian(k, 3, tokens=500))
    rows = attention_options()
    w = {"q_proj": weights(k, 64, 1), "k_proj": weights(k, 32, 2)}
    options = {"q_proj": [rows[i][0] for i in (0, 6, 18)], "k_proj": [rows[i][1] for i in (18, 0)]}
    found = solve_options(factor, w, options)
    assert {role: len(v) for role, v in found.items()} == {"q_proj": 3, "k_proj": 2}
    for role, params in options.items():
        for option, solved in zip(params, ordered(found[role]), strict=True):
            assert same(solved.weight, reference(factor, w[role], option.layout(k)).weight) > 0.99


def test_round_to_nearest_equals_the_plain_loop_to_the_bit() -> None:
    h, w = hessian(160, 8), weights(160, 64, 8)
    factor, layout = round_to_nearest(h.diagonal()), parse("0.2:4b_32g/0.8:3b_64g").layout(160)
    found = quantize_linears(factor, {"w": w}, {"w": layout})["w"]
    expected = quantize_reference(w, factor.perm, None, layout)
    assert torch.equal(found.scale_codes, expected.scale_codes)
    assert torch.equal(found.scale_max, expected.scale_max)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.weight, expected.weight)


def test_same_input_same_bytes() -> None:
    k = 192
    factor, w = prepare(hessian(k, 9, tokens=400)), weights(k, 96, 9)
    problems = [Problem(0, row[2].layout(k)) for row in mlp_options()]
    a, b = (solve_problems(factor, [w], problems) for _ in range(2))
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(ordered(a), ordered(b), strict=True))


def test_half_weights_are_taken_as_they_are() -> None:
    k = 64
    factor, w = prepare(hessian(k)), weights(k, 32)
    layout = parse("1:4b_32g").layout(k)
    full, half = (solve_problems(factor, [x], [Problem(0, layout)])[0].weight for x in (w, w.half()))
    assert torch.equal(full, half)


@pytest.mark.parametrize("scale", [1e-9, 1e-6, 1e3])
def test_very_small_and_large_weights(scale: float) -> None:
    """Steps that underflow half precision decode to zero; nothing becomes NaN."""
    h, w = hessian(64), weights(64, 32) * scale
    factor, layout = prepare(h), parse("1:4b_32g").layout(64)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True)[0]
    expected = reference(factor, w, layout)
    assert bool(torch.isfinite(found.weight).all())
    assert found.codes is not None
    assert same(found.codes, expected.codes) > 0.99
    assert torch.allclose(found.weight.float(), expected.weight.float(), atol=1e-3 * scale + 1e-7)


def test_a_zero_column_and_a_zero_layer() -> None:
    h, w = hessian(64), weights(64, 64)
    w[:, 5] = 0
    factor, layout = prepare(h), parse("1:4b_32g").layout(64)
    zero = torch.zeros(64, 32)
    solved = solve_problems(factor, [w, zero], [Problem(0, layout), Problem(1, layout)], keep_codes=True)
    columns, layer = ordered(solved)
    assert torch.equal(columns.weight[:, 5], torch.zeros(64, dtype=torch.float16))
    assert columns.codes is not None
    assert columns.codes[:, 5].tolist() == [8] * 64
    assert torch.equal(layer.weight, zero.half())


def test_number_of_threads_stays_what_it_was() -> None:
    """In a fresh process: Numba starts its threads once. Forward passes sum in an order that depends on their number."""
    code = (
        "import torch; torch.set_num_threads(1)\n"
        "from exl2ray.cuda.solver import Segment, solve_segments\n"
        "solve_segments(torch.eye(32), torch.arange(32), [torch.randn(32, 64)], [Segment(0, (4,))], (32,))\n"
        "import numba; print(torch.get_num_threads(), numba.get_num_threads(), numba.config.NUMBA_NUM_THREADS)"
    )
    env = {**os.environ, "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1", "2"]


# ---- refinement of scale codes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_refined_codes_are_those_of_the_plain_loop(text: str) -> None:
    k, n = 352, 96
    h, w = hessian(k, 11, tokens=600), weights(k, n, 11)
    factor, layout = prepare(h), parse(text).layout(k)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True, numerics=FEEDBACK)[0]
    expected = quantize_reference(w, factor.perm, feedback_factor(factor), layout, refine=True)
    assert found.codes is not None
    assert found.scale_codes is not None
    assert same(found.scale_codes, expected.scale_codes) > 0.97
    assert relative_error(h, w, found.weight) == pytest.approx(relative_error(h, w, expected.weight), rel=5e-3)
    unrefined = reference(factor, w, layout)
    if min(layout.bits) >= REFINED_BITS:
        assert same(expected.scale_codes, unrefined.scale_codes) < 0.9
        assert relative_error(h, w, found.weight) < relative_error(h, w, unrefined.weight)
    elif max(layout.bits) < REFINED_BITS:
        assert torch.equal(expected.codes, unrefined.codes)


def test_first_group_is_refined_to_the_bit() -> None:
    """One group sees no sum over other groups: all its codes agree with the plain form."""
    k = 64
    factor, w = prepare(hessian(k, 3)), weights(k, 256, 3)
    layout = parse("1:4b_64g").layout(k)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True, numerics=FEEDBACK)[0]
    u = feedback_factor(factor)
    assert u is not None
    codes, scale_max = gptq.search(w[factor.perm], 4)
    assert found.scale_codes is not None
    assert same(found.scale_codes[0], gptq.refine_codes(w[factor.perm], u, 4, codes, scale_max)) > 0.99


def test_refinement_minimises_its_cost() -> None:
    """Brute force over the tried codes of one column, with the loss written out as tr(E^T H E) of the group."""
    k, bits = 32, 4
    h = hessian(k, 6)
    factor, w = prepare(h), weights(k, 3, 6)
    u = feedback_factor(factor)
    assert u is not None
    x = w[factor.perm]
    codes, scale_max = gptq.search(x, bits)
    damped = torch.linalg.inv(u.double()) @ torch.linalg.inv(u.double()).T
    refined = gptq.refine_codes(x, u, bits, codes, scale_max)
    for c in range(3):
        costs = {}
        for code in range(max(1, int(codes[c]) - 3), min(16, int(codes[c]) + 3) + 1):
            step = gptq.step_sizes(torch.tensor([code]), scale_max).double()
            work, error = x[:, c].double().clone(), torch.zeros(k, dtype=torch.float64)
            along = size = 0.0
            for i in range(k):
                q = torch.clamp(torch.round(work[i] / step), -8, 7) * step
                e, gain = (work[i] - q) / u[i, i], work[i] / u[i, i]
                along, size = along + float(e * gain), size + float(gain * gain)
                error[i] = x[i, c] - q
                work[i + 1 :] -= u[i, i + 1 :] * e
            costs[code] = float(error @ damped @ error) + gptq.SHRINKAGE * along**2 / size
        assert costs[int(refined[c])] == pytest.approx(min(costs.values()), rel=1e-3)


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-6, 1e3])
def test_refinement_of_very_small_and_large_weights(scale: float) -> None:
    h, w = hessian(64), weights(64, 32) * scale
    factor, layout = prepare(h), parse("1:4b_32g").layout(64)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True, numerics=FEEDBACK)[0]
    assert bool(torch.isfinite(found.weight).all())
    assert found.scale_codes is not None
    assert 1 <= int(found.scale_codes.min()) <= int(found.scale_codes.max()) <= 16


def test_refinement_same_input_same_bytes_and_nothing_without_feedback() -> None:
    k = 192
    h, w = hessian(k, 9, tokens=400), weights(k, 96, 9)
    problems = [Problem(0, row[2].layout(k)) for row in mlp_options()[4:8]]
    a, b = (solve_problems(prepare(h), [w], problems, numerics=FEEDBACK) for _ in range(2))
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(a, b, strict=True))
    c, d = (solve_problems(round_to_nearest(h.diagonal()), [w], problems, numerics=n) for n in (FEEDBACK, PLAIN))
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(c, d, strict=True))


# ---- coordinate descent ------------------------------------------------------------------------------------------


def damped(factor: Factor) -> Tensor:
    assert factor.r is not None
    return factor.r @ factor.r.T


@pytest.mark.parametrize("text", TEXTS)
def test_sweeps_are_those_of_the_plain_loop(text: str) -> None:
    k, n = 352, 96
    h, w = hessian(k, 12, tokens=600), weights(k, n, 12)
    factor, layout = prepare(h), parse(text).layout(k)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True, numerics=Numerics(sweeps=2))[0]
    expected = reference(factor, w, layout)
    for _ in range(2):
        expected = descend(w, expected, damped(factor))
    assert found.codes is not None
    assert same(found.codes, expected.codes) > 0.97
    assert relative_error(h, w, found.weight) == pytest.approx(relative_error(h, w, expected.weight), rel=5e-3)


def test_every_sweep_lowers_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several panels, in the loss that is minimised (with damping), which is what the solution reports."""
    monkeypatch.setattr(solver.panels, "__defaults__", (128,))
    k = 352
    h, w = hessian(k, 4, tokens=600), weights(k, 64, 4)
    factor, layout = prepare(h), parse("0.1:4b_64g/0.9:3b_64g").layout(k)
    x, losses = w[factor.perm], []
    for sweeps in (0, 1, 2, 6):
        found = solve_problems(factor, [w], [Problem(0, layout)], numerics=Numerics(0.0, "feedback", sweeps))[0]
        e = (x - found.weight[factor.perm].float()).double()
        losses.append(float((e * (damped(factor).double() @ e)).sum()))
        assert float(found.losses.sum()) == pytest.approx(losses[-1], rel=1e-3)
        assert float(found.energies.sum()) == pytest.approx(float(e.square().sum()), rel=1e-3)
    assert losses[0] > 1.01 * losses[1] > losses[1] > losses[2] > losses[3]


def test_descent_ends_where_no_single_change_helps() -> None:
    k = 64
    factor, w = prepare(hessian(k, 7)), weights(k, 32, 7)
    layout = parse("1:4b_64g").layout(k)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True, numerics=Numerics(sweeps=20))[0]
    assert found.codes is not None
    assert found.scale_codes is not None
    h, x, dq = damped(factor).double(), w[factor.perm].double(), found.weight[factor.perm].double()
    step = gptq.step_sizes(found.scale_codes[0], found.scale_max[0]).double()
    gradient = h @ (x - dq)
    for sign in (-1, 1):
        # changing weight i by t changes the loss by t^2 H_ii - 2 t S_i
        t = (sign * step).half().double()
        gain = t * t * h.diagonal()[:, None] - 2 * t * gradient
        inside = (found.codes < 15) if sign > 0 else (found.codes > 0)
        assert float(gain[inside].min()) > -1e-3 * float(gain.abs().mean())


@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-6, 1e3])
def test_descent_of_very_small_and_large_weights(scale: float) -> None:
    factor, w = prepare(hessian(64)), weights(64, 32) * scale
    layout = parse("1:4b_32g").layout(64)
    found = solve_problems(factor, [w], [Problem(0, layout)], keep_codes=True, numerics=Numerics(sweeps=1))[0]
    assert bool(torch.isfinite(found.weight).all())


def test_descent_same_input_same_bytes_and_nothing_without_feedback() -> None:
    k = 192
    h, w = hessian(k, 9, tokens=400), weights(k, 96, 9)
    problems = [Problem(0, row[2].layout(k)) for row in mlp_options()[4:8]]
    a, b = (solve_problems(prepare(h), [w], problems, numerics=Numerics(0.0, "feedback", 2)) for _ in range(2))
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(a, b, strict=True))
    c, d = (solve_problems(round_to_nearest(h.diagonal()), [w], problems, numerics=Numerics(sweeps=s)) for s in (2, 0))
    assert all(torch.equal(x.weight, y.weight) for x, y in zip(c, d, strict=True))
