"""Sums of Hessians: the same bits whoever holds which shares."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.errors import NumericError
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.rows import SHARES, TreeSum, owner_shares, share_rows


def accumulators(rows: int) -> dict[int, HessianAccumulator]:
    """Of the shares that have rows; float32 values whose sum depends on the order."""
    out = {}
    for s, r in enumerate(share_rows(rows)):
        if len(r):
            out[s] = HessianAccumulator(5)
            generator = torch.Generator().manual_seed(s)
            out[s].h = torch.randn(5, 5, generator=generator) * 10.0 ** (s % 4)
            out[s].rows, out[s].tokens = len(r), 3 * len(r)
    return out


def reduced(rows: int, size: int) -> HessianAccumulator:
    """The sum as a group of ``size`` makes it: partial sums of each member, added by the first."""
    trees = []
    for rank in range(size):
        tree = TreeSum()
        for s, h in accumulators(rows).items():
            if s in owner_shares(rank, size):
                tree.add(s, h)
        trees.append(tree)
    for tree in trees[1:]:
        for node in sorted(tree.counts()):
            trees[0].add_node(node, tree.take(node))
    return trees[0].total()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 120), st.integers(1, SHARES))
def test_any_number_of_members_gives_the_same_bits(rows: int, size: int) -> None:
    one, many = reduced(rows, 1), reduced(rows, size)
    assert torch.equal(one.h, many.h)
    assert (many.rows, many.tokens) == (rows, 3 * rows)


def test_the_order_matters_in_float32() -> None:
    """Otherwise the test above could not fail."""
    parts = [h.h for h in accumulators(16).values()]
    assert not torch.equal(sum(parts[1:], parts[0]), reduced(16, 1).h)


@pytest.mark.parametrize("size", range(1, SHARES + 1))
def test_every_share_has_one_owner(size: int) -> None:
    assert [s for rank in range(size) for s in owner_shares(rank, size)] == list(range(SHARES))


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_aligned_members_send_one_matrix(size: int) -> None:
    tree = TreeSum()
    for s, h in accumulators(64).items():
        if s in owner_shares(0, size):
            tree.add(s, h)
    assert len(tree.counts()) == 1


def test_shares_cover_the_rows_in_order() -> None:
    for rows in (1, 7, 8, 19, 115):
        assert [i for r in share_rows(rows) for i in r] == list(range(rows))


def test_no_rows_are_an_error() -> None:
    with pytest.raises(NumericError, match="without calibration rows"):
        TreeSum().total()
