"""Packing, unpacking and dequantisation in torch, against the NumPy oracle of the format."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exl2_numpy import dequantize_numpy, pack_linear_numpy, pack_scales, pack_values
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.errors import FormatError, NumericError
from exl2ray.formats.exl2 import check_linear
from exl2ray.formats.layout import GroupLayout
from exl2ray.quant.gptq import Quantized
from exl2ray.quant.pack import (
    dequantize,
    pack,
    pack_rows,
    pack_scale_codes,
    pad_columns,
    unit_tables,
    unpack_rows,
    unpack_scale_codes,
)


@st.composite
def layouts(draw: st.DrawFn) -> GroupLayout:
    rows = draw(st.lists(st.sampled_from([32, 64, 96, 128]), min_size=1, max_size=6))
    bits = draw(st.lists(st.sampled_from([2, 3, 4, 5, 6, 8]), min_size=len(rows), max_size=len(rows)))
    return GroupLayout(tuple(sorted(bits, reverse=True)), tuple(rows))


def random_linear(layout: GroupLayout, n: int, seed: int) -> Quantized:
    """Random integers over the full range of each width, scales down into the subnormals."""
    rng = np.random.default_rng(seed)
    k, groups = layout.in_features, len(layout.bits)
    limits = np.repeat([1 << b for b in layout.bits], layout.rows)
    scale_max = (10.0 ** rng.uniform(-6, 0, groups)).astype(np.float16)
    return Quantized(
        layout,
        torch.from_numpy(rng.permutation(k)),
        torch.from_numpy(rng.integers(0, limits[:, None], (k, n)).astype(np.uint8)),
        torch.from_numpy(rng.integers(1, 17, (groups, n)).astype(np.uint8)),
        torch.from_numpy(scale_max),
        torch.empty(0),
    )


@settings(max_examples=25, deadline=None)
@given(layouts(), st.integers(1, 3), st.integers(0, 1000))
def test_pack_and_dequantize_as_the_oracle(layout: GroupLayout, blocks: int, seed: int) -> None:
    q = random_linear(layout, 32 * blocks, seed)
    bias = np.random.default_rng(seed).standard_normal(32 * blocks).astype(np.float16)
    expected = pack_linear_numpy(
        "layer", q.codes.numpy(), q.scale_codes.numpy(), q.scale_max.numpy(), q.perm.numpy(), layout, bias
    )
    packed = pack("layer", q, torch.from_numpy(bias))
    assert check_linear(packed) == []
    for name, tensor in expected.tensors().items():
        assert packed.tensors()[name].dtype == tensor.dtype
        assert torch.equal(packed.tensors()[name], tensor), name
    assert packed.layout == layout
    decoded = dequantize(packed)
    assert np.array_equal(decoded.numpy().view(np.uint16), dequantize_numpy(expected).view(np.uint16))
    assert torch.equal(unpack_rows(packed.q_weight, layout), q.codes)
    assert torch.equal(unpack_scale_codes(packed.q_scale), q.scale_codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_rows_of_one_width(bits: int) -> None:
    layout = GroupLayout((bits, bits), (32, 96))
    codes = torch.randint(0, 1 << bits, (128, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    words = pack_rows(codes, layout)
    assert np.array_equal(words.numpy(), pack_values(codes.numpy(), layout))
    assert torch.equal(unpack_rows(words, layout), codes)
    full = torch.full((128, 8), (1 << bits) - 1, dtype=torch.uint8)
    assert torch.equal(pack_rows(full, layout), torch.full((layout.packed_rows, 8), -1, dtype=torch.int32))


def test_scale_codes() -> None:
    codes = torch.randint(1, 17, (5, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert np.array_equal(pack_scale_codes(codes).numpy(), pack_scales(codes.numpy()))
    assert torch.equal(unpack_scale_codes(pack_scale_codes(codes)), codes)


def test_prescale_is_applied_before_the_rounding() -> None:
    packed = pack("layer", random_linear(GroupLayout((4,), (64,)), 32, 1))
    expected = dequantize_numpy(packed, prescale=0.3)
    assert np.array_equal(dequantize(packed, prescale=0.3).numpy(), expected)
    assert not np.array_equal(expected, dequantize_numpy(packed))


def test_unit_tables() -> None:
    bits, words, groups = unit_tables(GroupLayout((5, 3), (64, 32)), "cpu")
    assert (bits.tolist(), words.tolist(), groups.tolist()) == ([5, 5, 3], [0, 5, 10], [0, 0, 1])


def test_short_bias_is_padded_and_a_large_one_refused() -> None:
    q = random_linear(GroupLayout((4,), (32,)), 64, 0)
    packed = pack("layer", q, torch.ones(50, dtype=torch.float32) * 0.1)
    assert packed.bias is not None
    assert packed.bias.tolist() == [float(np.float16(0.1))] * 50 + [0.0] * 14
    with pytest.raises(NumericError, match=r"layer\.bias does not fit into float16"):
        pack("layer", q, torch.full((64,), 1e5))


def test_columns_must_be_padded() -> None:
    q = random_linear(GroupLayout((4,), (32,)), 40, 0)
    with pytest.raises(FormatError, match="40 columns"):
        pack("layer", q)
    w = torch.ones(4, 40)
    assert pad_columns(w).shape == (4, 64)
    assert float(pad_columns(w)[:, 40:].abs().sum()) == 0
    assert pad_columns(torch.ones(4, 64)).shape == (4, 64)
