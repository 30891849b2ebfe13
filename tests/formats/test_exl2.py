"""Byte layout: worked examples, the reference's own output, and properties of the oracle."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exl2_numpy import dequantize_numpy, pack_linear_numpy, pack_scales, pack_values, unpack_scales, unpack_values
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.errors import FormatError
from exl2ray.formats.exl2 import Exl2Model, PackedLinear, check_linear
from exl2ray.formats.layout import WIDTHS, GroupLayout


@pytest.fixture(scope="session")
def example(shared_dir: Path) -> dict[str, Any]:
    return json.loads((shared_dir / "spec" / "exl2-example.json").read_text())


def hex_words(rows: list[list[str]]) -> np.ndarray:
    return np.array([[int(w, 16) for w in row] for row in rows], dtype=np.uint32).view(np.int32)


def hex_halves(rows: list[str]) -> np.ndarray:
    return np.stack([np.frombuffer(bytes.fromhex(r), dtype=">u2") for r in rows]).astype(np.uint16)


def sha256(a: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()


def example_linear(example: dict[str, Any]) -> PackedLinear:
    e = example["format_example"]
    scale_max = np.array([int(b, 16) for b in e["tensors"]["q_scale_max"]["half_bits"]], dtype=np.uint16)
    return pack_linear_numpy(
        "layer",
        np.array(e["values_stored_order"], dtype=np.uint8),
        np.array(e["scale_nibbles"]) + 1,
        scale_max.view(np.float16),
        np.array(e["q_perm"]),
        GroupLayout((3, 2), (32, 32)),
    )


def test_packing_vectors(example: dict[str, Any]) -> None:
    vectors = example["packing_vectors"]["vectors"]
    assert sorted(v["bits"] for v in vectors) == list(WIDTHS)
    for v in vectors:
        layout = GroupLayout((v["bits"],), (v["rows"],))
        values = np.array(v["column_values"], dtype=np.uint8)[:, None]
        words = pack_values(values, layout)
        assert words.view(np.uint32)[:, 0].tolist() == [int(w, 16) for w in v["words"]]
        assert np.array_equal(unpack_values(words, layout), values)


def test_format_example_bytes(example: dict[str, Any]) -> None:
    p = example_linear(example)
    for name, want in example["format_example"]["tensors"].items():
        t = p.tensors()[f"layer.{name}"].numpy()
        assert list(t.shape) == want["shape"]
        assert sha256(t) == want["sha256_le_bytes"], name
    assert np.array_equal(p.q_weight.numpy(), hex_words(example["format_example"]["tensors"]["q_weight"]["words"]))


def test_format_example_dequantised(example: dict[str, Any]) -> None:
    e = example["format_example"]
    w = dequantize_numpy(example_linear(example))
    assert np.array_equal(w.view(np.uint16), hex_halves(e["dequantised_half_bits"]))
    assert sha256(w) == e["dequantised_sha256_le_bytes"]


def test_gptq_example_bytes(example: dict[str, Any]) -> None:
    e = example["gptq_example"]
    scale_max = np.array([int(g["scale_max_half_bits"], 16) for g in e["groups"]], dtype=np.uint16)
    p = pack_linear_numpy(
        "layer",
        np.array(e["values_stored_order"], dtype=np.uint8),
        np.array([g["scale_nibbles"] for g in e["groups"]]) + 1,
        scale_max.view(np.float16),
        np.array(e["q_perm"]),
        GroupLayout((3, 2), (32, 32)),
    )
    assert np.array_equal(p.q_weight.numpy(), hex_words(e["q_weight_words"]))
    assert np.array_equal(p.q_scale.numpy(), hex_words(e["q_scale_words"]))
    assert p.q_invperm.tolist() == e["q_invperm"]
    assert np.array_equal(dequantize_numpy(p).view(np.uint16), hex_halves(e["dequantised_half_bits"]))


def test_reference_output_dequantises_bit_for_bit(shared_dir: Path) -> None:
    model = Exl2Model(shared_dir / "golden" / "tiny-llama-7m-exl2-3.0bpw")
    golden = np.load(shared_dir / "golden" / "exllamav2-0.3.2.npz")
    compared = 0
    for name in golden.files:
        if name.startswith("dq/"):
            w = dequantize_numpy(model.linear(name.removeprefix("dq/")))
            assert np.array_equal(w.view(np.uint16), golden[name].view(np.uint16)), name
            compared += 1
    assert compared == 3
    assert len(model.keys()) == 6 * 7 + 1


def test_reference_output_repacks_to_the_same_bytes(shared_dir: Path) -> None:
    model = Exl2Model(shared_dir / "golden" / "tiny-llama-7m-exl2-3.0bpw")
    for key in ("lm_head", "model.layers.3.mlp.down_proj", "model.layers.5.self_attn.k_proj"):
        p = model.linear(key)
        again = pack_linear_numpy(
            key,
            unpack_values(p.q_weight.numpy(), p.layout),
            unpack_scales(p.q_scale.numpy()),
            p.q_scale_max.numpy(),
            np.argsort(p.q_invperm.numpy()),
            p.layout,
        )
        assert all(torch.equal(a, b) for a, b in zip(p.tensors().values(), again.tensors().values(), strict=True))


# -- properties ----------------------------------------------------------------------------------------------------

layouts = st.lists(st.tuples(st.sampled_from(WIDTHS), st.integers(1, 3)), min_size=1, max_size=5).map(
    lambda groups: GroupLayout(
        tuple(sorted((b for b, _ in groups), reverse=True)), tuple(32 * units for _, units in groups)
    )
)


def random_linear(layout: GroupLayout, columns: int, seed: int, bias: bool = False) -> PackedLinear:
    rng = np.random.default_rng(seed)
    k, g = layout.in_features, len(layout.bits)
    limits = np.repeat([1 << b for b in layout.bits], layout.rows)
    scale_max = np.exp(rng.uniform(np.log(1e-5), np.log(2.0), g)).astype(np.float16)  # reaches into subnormals
    return pack_linear_numpy(
        "layer",
        rng.integers(0, limits[:, None], (k, columns)).astype(np.uint8),
        rng.integers(1, 17, (g, columns)),
        scale_max,
        rng.permutation(k),
        layout,
        rng.normal(size=columns).astype(np.float16) if bias else None,
    )


def scalar_weight(p: PackedLinear, feature: int, column: int, prescale: float) -> np.float16:
    """One weight, bit by bit, with Python integers."""
    stored_row = int(p.q_invperm[feature])
    groups, words = p.q_groups.tolist(), p.q_weight.shape[0]
    first = 0
    for g in range(len(groups) // 2):
        b, offset = groups[2 * g], groups[2 * g + 1]
        end = groups[2 * g + 3] if 2 * g + 3 < len(groups) else words
        rows = (end - offset) * 32 // b
        if stored_row < first + rows:
            break
        first += rows
    stream = sum((int(p.q_weight[w, column]) & 0xFFFFFFFF) << (32 * (w - offset)) for w in range(offset, end))
    q = stream >> ((stored_row - first) * b) & ((1 << b) - 1)
    s = ((int(p.q_scale[g, column // 8]) & 0xFFFFFFFF) >> (4 * (column % 8)) & 15) + 1
    m = np.float16(np.float32(p.q_scale_max[g].item()) * np.float32(prescale / 256))
    e = np.float16(np.float16(s * s) * m)
    return np.float16(np.float16(q - (1 << (b - 1))) * e)


@settings(max_examples=30, deadline=None)
@given(layouts, st.integers(0, 2**32 - 1))
def test_values_round_trip(layout: GroupLayout, seed: int) -> None:
    limits = np.repeat([1 << b for b in layout.bits], layout.rows)
    values = np.random.default_rng(seed).integers(0, limits[:, None], (layout.in_features, 5)).astype(np.uint8)
    words = pack_values(values, layout)
    assert words.shape == (layout.packed_rows, 5)
    assert np.array_equal(unpack_values(words, layout), values)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32 - 1))
def test_scale_codes_round_trip(groups: int, octets: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(1, 17, (groups, 8 * octets))
    assert np.array_equal(unpack_scales(pack_scales(codes)), codes)


@settings(max_examples=25, deadline=None)
@given(layouts, st.integers(0, 2**32 - 1), st.sampled_from([1.0, 0.125, 1.4 / 40**0.5, 0.0625, 8.0]), st.booleans())
def test_dequantize_matches_scalar_reading_of_the_format_page(
    layout: GroupLayout, seed: int, prescale: float, bias: bool
) -> None:
    p = random_linear(layout, 32, seed, bias)
    assert check_linear(p) == []
    w = dequantize_numpy(p, prescale)
    rng = np.random.default_rng(seed)
    for f, c in zip(rng.integers(0, layout.in_features, 24), rng.integers(0, 32, 24), strict=True):
        assert w[f, c].view(np.uint16) == scalar_weight(p, int(f), int(c), prescale).view(np.uint16)


@settings(max_examples=20, deadline=None)
@given(layouts, st.integers(0, 2**32 - 1), st.booleans())
def test_layout_survives_storage_and_bits_are_counted(layout: GroupLayout, seed: int, bias: bool) -> None:
    p = random_linear(layout, 64, seed, bias)
    again = PackedLinear.from_tensors("layer", p.tensors().get)
    assert again.layout == layout
    stored_bits = sum(t.nbytes * 8 for t in p.tensors().values())
    assert layout.total_bits(again.out_features, bias) == stored_bits


# -- structural check ----------------------------------------------------------------------------------------------


def broken(**changes: torch.Tensor | None) -> PackedLinear:
    p = random_linear(GroupLayout((4, 2), (32, 64)), 64, seed=3, bias=True)
    fields = {f: getattr(p, f) for f in ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "bias")}
    return PackedLinear("layer", **{**fields, **changes})


GOOD = broken()
CASES = [
    ("q_groups is torch.int32", broken(q_groups=GOOD.q_groups.int())),
    ("q_scale_max is torch.float32", broken(q_scale_max=GOOD.q_scale_max.float())),
    ("bias is torch.bfloat16", broken(bias=GOOD.bias.bfloat16())),
    ("q_weight is torch.int64", broken(q_weight=GOOD.q_weight.long())),
    ("with shape (96, 1)", broken(q_invperm=GOOD.q_invperm[:, None])),
    ("not a permutation", broken(q_invperm=torch.zeros(96, dtype=torch.int32))),
    ("the groups hold 96 rows", broken(q_invperm=torch.arange(64, dtype=torch.int32))),
    ("in_features 80", broken(q_invperm=torch.arange(80, dtype=torch.int32))),
    ("widths increase", broken(q_groups=torch.tensor([2, 0, 4, 4], dtype=torch.int16))),
    ("starts at q_weight row 1", broken(q_groups=torch.tensor([4, 1, 2, 4], dtype=torch.int16))),
    ("group 1 of width 2 spans", broken(q_groups=torch.tensor([4, 0, 2, 8], dtype=torch.int16))),
    ("width 7 is not one of", broken(q_groups=torch.tensor([7, 0, 1, 7], dtype=torch.int16))),
    ("group 0 of width 0", broken(q_groups=torch.tensor([0, 0, 2, 4], dtype=torch.int16))),
    ("q_groups has 2 numbers", broken(q_groups=torch.tensor([4, 0], dtype=torch.int16))),
    ("not a non-empty list", broken(q_groups=torch.tensor([4, 0, 2], dtype=torch.int16))),
    ("q_scale has shape (2, 4)", broken(q_scale=GOOD.q_scale[:, :4])),
    ("48 columns", broken(q_weight=GOOD.q_weight[:, :48])),
    ("bias has 32 entries", broken(bias=GOOD.bias[:32])),
    ("bias has NaN", broken(bias=torch.full((64,), float("nan"), dtype=torch.float16))),
    ("q_scale_max has NaN", broken(q_scale_max=torch.tensor([float("inf"), 1.0], dtype=torch.float16))),
]


@pytest.mark.parametrize(("message", "p"), CASES, ids=[m for m, _ in CASES])
def test_check_linear_names_the_rule(message: str, p: PackedLinear) -> None:
    assert any(message in problem for problem in check_linear(p)), check_linear(p)
    with pytest.raises(FormatError, match="layer"):
        PackedLinear.from_tensors("layer", p.tensors().get)


def test_missing_tensor_is_named() -> None:
    tensors = GOOD.tensors()
    del tensors["layer.q_invperm"]
    with pytest.raises(FormatError, match=r"layer\.q_invperm"):
        PackedLinear.from_tensors("layer", tensors.get)


def test_oracle_refuses_values_out_of_range() -> None:
    with pytest.raises(FormatError, match="does not fit into 2 bits"):
        pack_values(np.full((32, 8), 4, dtype=np.uint8), GroupLayout((2,), (32,)))
    with pytest.raises(FormatError, match=r"1\.\.16"):
        pack_scales(np.zeros((1, 8), dtype=np.int64))
