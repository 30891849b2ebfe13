"""Hessians and their factorisation, also where the matrix makes it hard."""

from __future__ import annotations

import pytest
import torch
from quant_helpers import correlated_inputs, hessian
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.quality import Settings
from exl2ray.quant import hessian as hessian_room
from exl2ray.quant.gptq import feedback_factor
from exl2ray.quant.hessian import (
    Factor,
    HessianAccumulator,
    act_order,
    factorise,
    prepare,
    prepare_reference,
    round_to_nearest,
)


def test_accumulator_sums_rows_and_divides_by_their_number() -> None:
    x = correlated_inputs(32, 90).half()
    accumulator = HessianAccumulator(32)
    accumulator.add(x[:40], rows=2)
    accumulator.add(x[40:].view(5, 10, 32))
    accumulator.add(x[:0])
    assert (accumulator.rows, accumulator.tokens) == (4, 90)
    exact = x.double().T @ x.double() / 4
    assert torch.allclose(accumulator.finish().double(), exact, rtol=1e-5, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("k", [48, 64, 70])
def test_a_wide_sum_is_of_one_side_until_it_is_read(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: panels from the diagonal to the right. What is read, added up or sent has both sides."""
    products: list[int] = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        products.append(x.shape[1] * y.shape[1])
        return x.T @ y

    monkeypatch.setattr(hessian_room, "TRIANGLE_ROWS", 16)
    monkeypatch.setattr(hessian_room, "_on_tensor_cores", lambda x: True)
    monkeypatch.setattr(hessian_room, "_product", product)
    x = correlated_inputs(k, 120)
    exact = x.double().T @ x.double()

    def both_sides(h: Tensor) -> bool:
        return all(torch.equal(h[start:, :start], h[:start, start:].T) for start in range(16, k, 16))

    def same(h: Tensor) -> bool:
        return both_sides(h) and torch.allclose(h.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.abs().max()))

    whole = HessianAccumulator(k)
    whole.add(x[:50])
    assert sum(products) < 0.7 * k * k
    whole.add(x[50:70])
    assert both_sides(whole.h)  # in between
    whole.add(x[70:])
    assert same(whole.h)
    for read in (False, True):  # one of the parts was read before
        parts = [HessianAccumulator(k) for _ in range(3)]  # the last without a token
        parts[0].add(x[:50])
        parts[1].add(x[50:])
        assert not read or parts[0].h.shape == (k, k)
        for part in parts[1:]:
            parts[0].include(part)
        assert (parts[0].rows, parts[0].tokens, parts[0].routed) == (2, 120, 120)
        assert same(parts[0].h)


def test_no_token_gives_the_identity() -> None:
    assert torch.equal(HessianAccumulator(32).finish(), torch.eye(32))


@pytest.mark.parametrize("k", [32, 160, 256])
def test_prepare_agrees_with_the_route_of_the_reference(k: int) -> None:
    h = hessian(k, seed=k)
    factor = prepare(h)
    perm, u = prepare_reference(h)
    assert torch.equal(factor.perm, perm)
    own = feedback_factor(factor)
    assert own is not None
    assert torch.allclose(own, u, rtol=1e-3, atol=1e-4 * float(u.abs().max()))
    assert factor.attempts == 1
    assert factor.note == ""
    assert factor.damping == pytest.approx(0.12 * float(h.diagonal().mean()), rel=1e-6)


def test_factor_reproduces_the_damped_hessian() -> None:
    h = hessian(96, seed=3)
    factor = prepare(h, damping=0.05)
    assert factor.r is not None
    assert torch.equal(factor.r, factor.r.triu())
    damped = h[factor.perm][:, factor.perm] + factor.damping * torch.eye(96)
    assert torch.allclose(factor.r @ factor.r.T, damped, rtol=1e-5, atol=1e-5 * float(damped.max()))


def test_act_order_is_stable() -> None:
    h = torch.diag(torch.tensor([2.0, 5.0, 2.0, 5.0, 2.0, 7.0]))
    assert act_order(h.diagonal()).tolist() == [5, 1, 3, 0, 2, 4]


def test_floor_of_the_damping() -> None:
    factor = prepare(torch.zeros(32, 32))
    assert factor.damping == pytest.approx(1e-5)
    assert factor.r is not None
    assert torch.allclose(factor.r, 1e-5**0.5 * torch.eye(32))


@pytest.mark.parametrize("tokens", [1, 20])
def test_fewer_tokens_than_dimensions(tokens: int) -> None:
    x = correlated_inputs(64, tokens)
    factor = prepare(x.T @ x)
    assert factor.attempts == 1
    assert factor.r is not None
    assert bool(torch.isfinite(factor.r).all())


def test_dead_channels_come_last_and_do_not_disturb() -> None:
    h = hessian(64)
    dead = torch.tensor([3, 17, 40])
    h[dead] = 0
    h[:, dead] = 0
    factor = prepare(h)
    assert factor.perm[-3:].tolist() == dead.tolist()
    assert factor.r is not None
    assert torch.allclose(factor.r[-3:, -3:], factor.damping**0.5 * torch.eye(3))


def indefinite(lowest: float) -> Tensor:
    """A symmetric matrix with unit mean diagonal whose smallest eigenvalue is about ``lowest``."""
    q, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(5)).double())
    values = torch.full((64,), (64 - lowest) / 63, dtype=torch.float64)
    values[0] = lowest
    return (q * values @ q.T).float()


def test_damping_grows_by_its_first_step_until_it_is_enough() -> None:
    factor = prepare(indefinite(-0.3), damping=0.12)
    assert factor.damping == pytest.approx(3 * 0.12, rel=1e-3)
    assert factor.attempts == 5  # float32 and float64 with once and twice the damping, float32 with three times
    assert "damping raised to 0.36" in factor.note


def test_float64_is_tried_before_more_damping(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.dtype] = []
    original = torch.linalg.cholesky_ex

    def failing_in_float32(a: Tensor, out: tuple[Tensor, Tensor]) -> None:
        used.append(a.dtype)
        original(a, out=out)
        if a.dtype is torch.float32:
            out[1].fill_(1)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", failing_in_float32)
    h = hessian(64)
    factor = prepare(h)
    assert used == [torch.float32, torch.float64]
    assert factor.damping == pytest.approx(0.12 * float(h.diagonal().mean()))
    assert factor.r is not None
    assert factor.r.dtype is torch.float32
    monkeypatch.undo()
    plain = prepare(h)
    assert plain.r is not None
    assert torch.allclose(factor.r, plain.r, rtol=1e-3, atol=1e-4 * float(plain.r.max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_hessian_that_is_not_finite_is_refused_by_name(bad: float) -> None:
    h = hessian(32)
    h[4, 4] = bad
    with pytest.raises(NumericError, match=r"Hessian of layer 7 is not finite"):
        prepare(h, where="layer 7")


def test_nan_off_the_diagonal_is_no_reason_to_round_to_nearest() -> None:
    accumulator = HessianAccumulator(32)
    accumulator.add(correlated_inputs(32))
    accumulator.h[3, 5] = accumulator.h[5, 3] = float("nan")
    with pytest.raises(NumericError):
        factorise(accumulator, Settings(), "layer 7", [])


def test_no_factor_at_all() -> None:
    with pytest.raises(NumericError, match=r"layer 7 \(64 x 64\) has no Cholesky factor even with damping 1\.2"):
        prepare(indefinite(-30.0), where="layer 7")


def test_fallback_to_round_to_nearest_is_noted() -> None:
    accumulator = HessianAccumulator(64)
    accumulator.h, accumulator.rows, accumulator.tokens = indefinite(-30.0), 1, 64
    notes: list[str] = []
    factor = factorise(accumulator, Settings(), "layer 7", notes)
    assert factor.r is None
    assert len(notes) == 1
    assert "layer 7" in notes[0]
    assert "rounded to nearest" in notes[0]


def test_round_to_nearest_keeps_the_act_order() -> None:
    h = hessian(64)
    factor = round_to_nearest(h.diagonal())
    assert isinstance(factor, Factor)
    assert torch.equal(factor.perm, prepare(h).perm)
    assert feedback_factor(factor) is None
    assert "round to nearest" in factor.note
