"""Parts of packed linears: their weights are those of the whole, whatever is cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exl2_numpy import dequantize_numpy, pack_linear_numpy

from exl2ray.formats.exl2 import PackedLinear, check_linear
from exl2ray.formats.layout import GroupLayout
from exl2ray.run.linear import Exl2Linear
from exl2ray.run.slices import columns, rows

MIXED = GroupLayout((8, 6, 5, 4, 3, 2, 2), (32, 96, 32, 128, 64, 32, 128))  # 512 input features


def linear(layout: GroupLayout = MIXED, n: int = 96, seed: int = 0, natural: bool = False) -> PackedLinear:
    rng = np.random.default_rng(seed)
    k, groups = layout.in_features, len(layout.bits)
    values = (rng.integers(0, 256, (k, n)) % (1 << np.repeat(layout.bits, layout.rows))[:, None]).astype(np.uint8)
    perm = np.arange(k) if natural else rng.permutation(k)
    tops = rng.uniform(0.001, 0.1, groups).astype(np.float16)
    bias = rng.standard_normal(n).astype(np.float16)
    return pack_linear_numpy("linear", values, rng.integers(1, 17, (groups, n)), tops, perm, layout, bias)


@pytest.mark.parametrize(("first", "count"), [(0, 96), (32, 64), (0, 1), (40, 25), (95, 1), (13, 70)])
def test_columns(first: int, count: int) -> None:
    whole = linear()
    part = columns(whole, first, count)
    assert check_linear(part) == []
    assert part.out_features == -(-count // 32) * 32
    assert np.array_equal(dequantize_numpy(part)[:, :count], dequantize_numpy(whole)[:, first : first + count])
    assert torch.equal(part.bias[:count], whole.bias[first : first + count])


def test_columns_of_a_rank_that_has_fewer_than_its_width_or_none() -> None:
    """Ranks of a head have equal widths, though the vocabulary may end in front of the last one's, or before it begins."""
    whole = linear()
    part = columns(whole, 64, 20, width=64)
    assert (part.out_features, check_linear(part)) == (64, [])
    assert np.array_equal(dequantize_numpy(part)[:, :20], dequantize_numpy(whole)[:, 64:84])
    assert columns(whole, 96, 0, width=64).out_features == 64


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4, 16])
def test_rows(parts: int, natural: bool) -> None:
    whole = linear(natural=natural)
    weights, count = dequantize_numpy(whole), 512 // parts
    for rank in range(parts):
        part = rows(whole, rank * count, count)
        assert check_linear(part) == []
        got = dequantize_numpy(part)
        assert np.array_equal(got[:count], weights[rank * count : (rank + 1) * count])
        assert not got[count:].any()
        assert part.q_weight.numel() <= whole.q_weight.numel()
    assert part.in_features == (count if natural or parts == 1 else part.in_features)


def test_parts_add_up_to_the_whole() -> None:
    """What ranks compute: columns side by side, rows summed."""
    whole = linear(seed=3)
    x = torch.randn(3, 512)
    y = Exl2Linear.from_packed(whole)(x)
    halves = [Exl2Linear.from_packed(columns(whole, first, 48), out_features=48)(x) for first in (0, 48)]
    torch.testing.assert_close(torch.cat(halves, 1), y)
    total = -whole.bias.float()  # twice in the sum
    for first in (0, 256):
        part = rows(whole, first, 256)
        padded = torch.nn.functional.pad(x[:, first : first + 256], (0, part.in_features - 256))
        total = total + Exl2Linear.from_packed(part)(padded)
    torch.testing.assert_close(total, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_of_every_width(bits: int) -> None:
    whole = linear(GroupLayout((bits,), (128,)), 32, seed=bits)
    part = rows(whole, 64, 64)
    assert np.array_equal(dequantize_numpy(part)[:64], dequantize_numpy(whole)[64:])
