"""Quantising a module and the head: what is packed is what runs from then on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exl2_numpy import dequantize_numpy
from quant_helpers import Packed, load, measured, quantized, states
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.formats.exl2 import check_linear
from exl2ray.formats.layout import QParams
from exl2ray.model.blocks import Block, check_states
from exl2ray.quality import Settings
from exl2ray.quant import module as module_room
from exl2ray.quant.gptq import feedback_factor, quantize_reference
from exl2ray.quant.hessian import HessianAccumulator, prepare
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import attention_options, head_option, mlp_options, parse
from exl2ray.quant.rows import reference_pass

CASES = [("Llama", 1), ("Llama", 2), ("Qwen2", 3), ("Mixtral", 2), ("Cohere", 1)]


def options(block: Block, attention: int = 8, mlp: int = 9) -> dict[str, QParams]:
    """Linear key -> option, a row of each table."""
    rows = dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), attention_options()[attention], strict=True))
    gate, up, down = mlp_options()[mlp]
    rows |= {"gate_proj": gate, "up_proj": up, "down_proj": down, "w1": gate, "w3": up, "w2": down}
    return {x.key: rows[x.role] for x in block.module.linears}


@pytest.mark.parametrize(("family", "module"), CASES)
def test_packed_tensors_are_what_the_block_holds_afterwards(
    tiny: Callable[[str], Path], family: str, module: int
) -> None:
    spec, block = load(tiny(family), module)
    x, params = states(spec), options(block)
    source, biases = dict(block.weights), dict(block.biases)
    plain = block.forward(x)
    result, found, y = quantized(block, x, params, Settings(batch_rows=2))
    target = torch.cat(list(result.other.values()))
    assert torch.equal(target, plain)
    assert found.keys() == {n.key for n in block.module.linears}
    for packed, linear in zip(found.values(), block.module.linears, strict=True):
        assert check_linear(packed) == []
        assert packed.layout == params[packed.key].layout(linear.in_features)
        assert 8 * sum(t.nbytes for t in packed.tensors().values()) == params[packed.key].bits_of(linear)
        decoded = dequantize_numpy(packed)[:, : linear.out_features]
        assert np.array_equal(block.weights[packed.key].half().numpy(), decoded)
        difference = float((torch.from_numpy(decoded).float() - source[packed.key].float()).norm())
        assert 0 < difference < 0.2 * float(source[packed.key].float().norm())
        assert (packed.bias is not None) == linear.has_bias
        if packed.bias is not None:
            assert torch.equal(packed.bias[: linear.out_features].float(), biases[packed.key].half().float())
    assert torch.equal(y, block.forward(x))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(y.float(), target.float(), strict=True)]
    assert result.error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
    assert 0.001 < result.error < 0.2


def test_error_equals_the_measured_one(tiny: Callable[[str], Path]) -> None:
    """The same options on the same states: the measurement predicts the quantisation."""
    spec, block = load(tiny("Llama"), 1)
    x, settings = states(spec), Settings(batch_rows=2)
    profile, _ = measured(block, x, settings)
    assert profile.options is not None
    for row in (0, 9, 18):
        _, fresh = load(tiny("Llama"), 1)
        result, _, _ = quantized(fresh, x, options(fresh, attention=row), settings)
        assert result.error == pytest.approx(1 - profile.options[row].accuracy, rel=5e-3)


def test_every_hessian_comes_from_the_unquantised_module(tiny: Callable[[str], Path]) -> None:
    """down_proj is calibrated on activations of the source's gate and up, as in the reference."""
    spec, block = load(tiny("Llama"), 2)
    x, params = states(spec), options(block)
    down = block.module.linear("down_proj")
    source = block.weights[down.key].clone()
    _, hessians = reference_pass(block, x, Settings(), check_states)
    factor = prepare(hessians["down"].finish())
    layout = params[down.key].layout(down.in_features)
    expected = quantize_reference(pad_columns(source), factor.perm, feedback_factor(factor), layout)
    quantized(block, x, params, Settings())
    assert float((block.weights[down.key].half() == expected.weight).double().mean()) > 0.99


def test_same_input_same_bytes(tiny: Callable[[str], Path]) -> None:
    runs = []
    for _ in range(2):
        spec, block = load(tiny("Mixtral"), 2)
        _, packed, y = quantized(block, states(spec), options(block), Settings())
        runs.append((packed, y))
    assert torch.equal(runs[0][1], runs[1][1])
    for a, b in zip(runs[0][0].values(), runs[1][0].values(), strict=True):
        assert all(torch.equal(t, b.tensors()[name]) for name, t in a.tensors().items())


@pytest.mark.parametrize("bit", [5, 6, 7])  # of one code: larger or smaller weights
def test_packed_that_decodes_to_something_else_is_an_error(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, bit: int
) -> None:
    spec, block = load(tiny("Llama"), 2)
    original, written = module_room.pack, list[str]()

    def damaged(*linear: Any, **how: Any) -> Any:
        packed = original(*linear, **how)
        word = packed.q_weight.clone()
        word[1, 3] ^= 1 << bit
        return dataclasses.replace(packed, q_weight=word)

    monkeypatch.setattr(module_room, "pack", damaged)
    monkeypatch.setattr(Packed, "add", lambda self, packed: written.extend(packed))
    with pytest.raises(NumericError, match=r"model\.layers\.0\.mlp\.gate_proj: the packed tensors decode to other"):
        quantized(block, states(spec), options(block), Settings())
    assert not written, "nothing that has not been checked"


@pytest.mark.parametrize(("module", "role"), [(6, "lm_head"), (2, "down_proj"), (1, "o_proj")])
def test_weights_that_their_width_does_not_hold_are_an_error(tiny: Callable[[str], Path], module: int, role: str) -> None:
    """A step of 3 bits that has to reach -65500 is rounded to more than float16 has, by quantiser and loader alike."""
    spec, block = load(tiny("Llama"), module)
    key = next(linear.key for linear in block.module.linears if role in linear.key)
    weight = block.weights[key].clone()
    weight[5, 7] = -65500.0
    block.set_weight(key, weight)
    params = {linear.key: parse("1:8b_32g" if linear.key != key else "1:2b_32g") for linear in block.module.linears}
    with pytest.raises(NumericError, match=f"{role}.*: 1 of the quantised weights are beyond float16"):
        quantized(block, states(spec), params, Settings())


def test_nan_states_are_refused_with_the_place(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Llama"), 1)
    x = states(spec)
    x[1, 0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"output of model\.layers\.0\.self_attn, rows 1 to 1"):
        quantized(block, x, options(block), Settings(batch_rows=1))


def head_inputs(spec: Any) -> Tensor:
    g = torch.Generator().manual_seed(3)
    return torch.randn(3, 60, spec.hyper.hidden_size, generator=g) * torch.logspace(-1, 1, spec.hyper.hidden_size)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_head(tiny: Callable[[str], Path], bits: int) -> None:
    """272 columns are padded to 288; the block keeps 272."""
    spec, block = load(tiny("Llama"), len(load(tiny("Llama"), 1)[0].modules) - 1)
    key = block.module.linears[0].key
    x, source = head_inputs(spec), block.weights[key].clone()
    result, found, _ = quantized(block, x, {key: head_option(bits)}, Settings(batch_rows=2))
    packed = found[key]
    assert result.notes == []
    assert result.error is None
    assert packed.out_features == 288
    assert check_linear(packed) == []
    decoded = dequantize_numpy(packed)
    assert np.array_equal(block.weights[key].half().numpy(), decoded[:, :272])
    assert not decoded[:, 272:].any()
    accumulator = HessianAccumulator(64)
    accumulator.add(x, 3)
    factor = prepare(accumulator.finish())
    layout = head_option(bits).layout(64)
    expected = quantize_reference(pad_columns(source), factor.perm, feedback_factor(factor), layout)
    assert float((torch.from_numpy(decoded) == expected.weight).double().mean()) > 0.98
    assert block.forward(x).shape == (3, 60, 272)
