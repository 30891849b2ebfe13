"""A wide Hessian factorised by a group has the bits of a worker alone. Members are threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from thread_comm import together

from exl2ray.errors import NumericError
from exl2ray.quality import Settings
from exl2ray.quant import cholesky, hessian
from exl2ray.quant.factorising import factorise_together
from exl2ray.quant.hessian import Factor, HessianAccumulator, factorise
from exl2ray.quant.rows import SHARES, TreeSum, owner_shares, share_rows

K, CPU = 150, torch.device("cpu")
SIZES = [2, 3, 4, 8]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "BLOCK", 32)
    monkeypatch.setattr(hessian, "FLOAT64_ROWS", 64)


def sums(rows: int, spoil: Any = None) -> dict[int, HessianAccumulator]:
    """Of the shares that have rows; sums of them depend on the order."""
    out = {}
    for s, share in enumerate(share_rows(rows)):
        if len(share):
            out[s] = HessianAccumulator(K)
            x = torch.randn(len(share), 40, K, generator=torch.Generator().manual_seed(s))
            out[s].add(x * 3.0 ** (s % 3), len(share))
            if spoil is not None:
                spoil(out[s].h)
    return out


def tree_of(found: dict[int, HessianAccumulator], shares: range) -> TreeSum:
    tree = TreeSum()
    for s in shares:
        if s in found:
            tree.add(s, found[s])
    return tree


def alone(rows: int, natural: bool, spoil: Any = None) -> tuple[Factor, list[str]]:
    notes: list[str] = []
    total = tree_of(sums(rows, spoil), range(SHARES)).total()
    return factorise(total, Settings(), "a place", notes, natural), notes


def in_group(size: int, rows: int, natural: bool, owner: int, spoil: Any = None) -> list[Any]:
    """What each member gets: (factor, notes), or its error."""

    def member(comm: Any) -> Any:
        tree = tree_of(sums(rows, spoil), owner_shares(comm.rank, size))
        notes: list[str] = []
        try:
            factor = factorise_together(
                comm, tree, comm.gather(tree.counts()), owner, CPU, Settings().damping, "a place", notes, natural
            )
        except NumericError as e:
            return e
        assert not tree.counts()
        return factor, notes

    return together(size, member)


def compare(found: list[Any], expected: tuple[Factor, list[str]], owner: int) -> None:
    for rank, (factor, notes) in enumerate(found):
        if rank != owner:
            assert (factor, notes) == (None, [])
            continue
        assert notes == expected[1]
        assert torch.equal(factor.perm, expected[0].perm)
        assert (factor.r is None) == (expected[0].r is None)
        if factor.r is not None:
            assert torch.equal(factor.r, expected[0].r)
        for name in ("damping", "attempts", "mean_diagonal"):
            assert getattr(factor, name) == getattr(expected[0], name)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("rows", "natural"), [(19, False), (19, True), (5, False), (1, False)])
def test_bits_are_those_of_a_worker_alone(size: int, rows: int, natural: bool) -> None:
    owner = size - 1
    expected = alone(rows, natural)
    assert expected[0].r is not None
    compare(in_group(size, rows, natural, owner), expected, owner)


def shifted(by: float) -> Any:
    return lambda h: h.diagonal().sub_(by * float(h.diagonal().mean()))


@pytest.mark.parametrize(("by", "attempts"), [(0.3, 3), (0.97, 0)])
def test_more_damping_and_no_factor_at_all(by: float, attempts: int) -> None:
    expected = alone(19, False, shifted(by))
    assert (expected[0].attempts > 1) == (attempts > 1)
    assert (expected[0].r is None) == (attempts == 0)
    assert expected[1]
    compare(in_group(3, 19, False, 0, shifted(by)), expected, 0)


def test_what_is_not_finite_stops_everybody() -> None:
    def nan(h: torch.Tensor) -> None:
        h[3, 3] = torch.nan

    for error in in_group(3, 19, False, 0, nan):
        assert isinstance(error, NumericError)
        assert "a place is not finite" in error.message
