"""Factors of wide Hessians, block by block: against torch's own, and their use above a width."""

from __future__ import annotations

import pytest
import torch

from exl2ray.errors import NumericError
from exl2ray.quant import cholesky, hessian
from exl2ray.quant.cholesky import block_count, block_row, block_shape, holders
from exl2ray.quant.hessian import Factor, act_order, prepare

WIDTHS = [1, 31, 32, 33, 64, 100, 257]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", 32)


def hessian_of(k: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(3 * k, k, generator=generator) * torch.logspace(-2, 1, k)
    return x.T @ x


@pytest.mark.parametrize("k", WIDTHS)
def test_the_factor_is_that_of_the_whole_matrix(k: int) -> None:
    h, damping, rows = hessian_of(k), 0.05, 7
    perm = act_order(h.diagonal())
    r = cholesky.upper_factor(h, rows, perm, damping)
    assert r is not None
    assert torch.equal(r, r.triu())
    matrix = (h / rows).double()[perm][:, perm] + damping * torch.eye(k, dtype=torch.float64)
    flipped = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    assert torch.allclose(r.double(), flipped, rtol=1e-6, atol=1e-6 * float(flipped.abs().max()))
    product = r.double() @ r.double().T
    assert float((product - matrix).abs().max()) < 1e-6 * float(matrix.abs().max())


@pytest.mark.parametrize("bad", [0, 40, 99])
def test_a_matrix_that_is_not_positive_definite_has_none(bad: int) -> None:
    h = hessian_of(100)
    perm = act_order(h.diagonal())
    h[perm[bad], perm[bad]] = -1e6
    assert cholesky.upper_factor(h, 1, perm, 0.1) is None


def test_block_rows_are_shared_out_evenly() -> None:
    for size in range(1, 9):
        ranks = holders(28 * 32, size)
        assert len(ranks) == block_count(28 * 32) == 28
        work = [sum(i * i for i, rank in enumerate(ranks) if rank == r) for r in range(size)]
        assert max(work) < 1.2 * sum(work) / size
    for k in WIDTHS:
        h, order = torch.rand(k, k), torch.randperm(k)
        shapes = [block_row(h, order, i).shape for i in range(block_count(k))]
        assert shapes == [block_shape(k, i) for i in range(block_count(k))]


def test_wide_hessians_are_factorised_so(monkeypatch: pytest.MonkeyPatch) -> None:
    h = hessian_of(100)
    whole = prepare(h.clone(), rows=3)
    monkeypatch.setattr(hessian, "FLOAT64_ROWS", 99)
    wide = prepare(h.clone(), rows=3)
    assert isinstance(wide, Factor)
    assert torch.equal(wide.perm, whole.perm)
    assert (wide.damping, wide.attempts, wide.mean_diagonal) == (whole.damping, 1, whole.mean_diagonal)
    assert wide.r is not None
    assert whole.r is not None
    assert torch.allclose(wide.r, whole.r, rtol=1e-3, atol=1e-4)  # float32 is less exact
    h[0, 0] = torch.nan
    with pytest.raises(NumericError, match="not finite"):
        prepare(h)


def test_damping_grows_until_there_is_a_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "FLOAT64_ROWS", 1)
    h = torch.eye(40)
    h[0, 1] = h[1, 0] = -1.3  # an eigenvalue of -0.3
    factor = prepare(h)
    assert factor.attempts == 3
    assert factor.damping == pytest.approx(0.36)
    h[0, 1] = h[1, 0] = -9.0
    with pytest.raises(NumericError, match=r"40 x 40.* even with damping 1\.2"):
        prepare(h)
