"""Reading weights: orientation, parts, order of the output, and every way in which a checkpoint can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import HEAD_DIM, HEADS, HIDDEN, ORACLES, VOCAB, Oracle
from safetensors.torch import save_file
from tiny_models import edit_tensors
from torch import Tensor

from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import ModelSpec, load_spec
from exl2ray.model.blocks import load_block
from exl2ray.model.hyper import loader_config
from exl2ray.model.weights import output_tensors, read_linear, read_plain

LLAMA_Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize("name", ORACLES)
def test_every_output_tensor_can_be_read(name: str, oracle: Callable[[str], Oracle]) -> None:
    source = SourceModel(oracle(name).path)
    spec = load_spec(source)
    for entry in output_tensors(spec):
        if entry.linear is not None:
            weight, bias = read_linear(spec, entry.linear, source)
            assert weight.shape == (entry.linear.in_features, entry.linear.out_features)
            assert (bias is not None) == entry.linear.has_bias
            assert bias is None or bias.shape == (entry.linear.out_features,)
        elif entry.plain is not None:
            tensor = read_plain(spec, entry.plain, source)
            assert tensor.dtype == torch.float16
            assert tensor.is_contiguous()
        else:
            assert entry.copied is not None
            assert entry.copied.source_name in source


def test_order_of_the_output(oracle: Callable[[str], Oracle]) -> None:
    """Norms, linears, q/k norms; the embedding first, the head last, copied tensors after it."""
    spec = load_spec(SourceModel(oracle("Gemma3ForConditionalGeneration").path))
    names = [e.name for e in output_tensors(spec)]
    p = "language_model.model.layers.0."
    assert names[:10] == [
        "language_model.model.embed_tokens.weight",
        p + "input_layernorm.weight",
        p + "post_attention_layernorm.weight",
        *(f"{p}self_attn.{x}_proj" for x in "qkvo"),
        p + "self_attn.q_norm.weight",
        p + "self_attn.k_norm.weight",
        p + "pre_feedforward_layernorm.weight",
    ]
    head = names.index("language_model.lm_head")
    assert names[head - 1] == "language_model.model.norm.weight"
    assert names[head + 1 :]
    assert all(n.startswith(("vision_tower.vision_model.", "multi_modal_projector.")) for n in names[head + 1 :])
    assert "multi_modal_projector.mm_input_projection.weight" in names
    assert len(set(names)) == len(names)


def test_moe_order_is_norm_router_experts(oracle: Callable[[str], Oracle]) -> None:
    names = [e.name for e in output_tensors(load_spec(SourceModel(oracle("MixtralForCausalLM").path)))]
    at = names.index("model.layers.0.post_attention_layernorm.weight")
    moe = "model.layers.0.block_sparse_moe."
    assert names[at + 1 : at + 6] == [moe + "gate.weight", *(f"{moe}experts.{e}" for e in ("0.w1", "0.w3", "0.w2", "1.w1"))]


def test_head_norms_are_stored_per_head(oracle: Callable[[str], Oracle]) -> None:
    source = SourceModel(oracle("Qwen3ForCausalLM").path)
    spec = load_spec(source)
    plain = next(p for p in spec.modules[1].plain if p.role == "q_norm")
    stored = source.load("model.layers.0.self_attn.q_norm.weight")
    assert torch.equal(read_plain(spec, plain, source), stored.half().expand(HEADS, HEAD_DIM))


def test_gemma_norms_are_stored_without_the_offset(oracle: Callable[[str], Oracle]) -> None:
    source = SourceModel(oracle("GemmaForCausalLM").path)
    spec = load_spec(source)
    stored = source.load("model.norm.weight")
    assert torch.equal(read_plain(spec, spec.modules[-2].plain[0], source), stored.half())


def test_scales_are_not_baked_in(oracle: Callable[[str], Oracle]) -> None:
    source = SourceModel(oracle("GraniteForCausalLM").path)
    spec = load_spec(source)
    down = spec.modules[2].linear("down_proj")
    assert torch.equal(read_linear(spec, down, source)[0], source.load(f"{down.key}.weight").t())
    assert torch.equal(read_plain(spec, spec.modules[0].plain[0], source), source.load("model.embed_tokens.weight").half())


def test_normalised_head_has_unit_columns_and_zero_padding_stays(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("IndexForCausalLM")
    edit_tensors(path, lambda t: t["lm_head.weight"][7].zero_())
    source = SourceModel(path)
    spec = load_spec(source)
    norms = read_linear(spec, spec.linears[-1], source)[0].norm(dim=0)
    assert norms[7] == 0
    assert torch.cat((norms[:7], norms[8:])).sub(1).abs().max() < 1e-6


def test_tied_head_is_the_embedding_unless_a_head_is_stored(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("GemmaForCausalLM")
    assert not load_spec(SourceModel(path)).tied
    edit_tensors(path, lambda t: t.pop("lm_head.weight"))
    source = SourceModel(path)
    spec = load_spec(source)
    assert spec.tied
    weight = read_linear(spec, spec.linears[-1], source)[0]
    assert torch.equal(weight, source.load("model.embed_tokens.weight").t())


def test_groups_name_the_input_a_linear_shares(oracle: Callable[[str], Oracle]) -> None:
    def groups(name: str, index: int) -> dict[str, str]:
        module = load_spec(SourceModel(oracle(name).path)).modules[index]
        return {x.role if x.expert is None else f"{x.role}.{x.expert}": x.input_group for x in module.linears}

    qkv = {"q_proj": "qkv", "k_proj": "qkv", "v_proj": "qkv", "o_proj": "o"}
    assert groups("LlamaForCausalLM", 1) == qkv
    assert groups("LlamaForCausalLM", 2) == {"gate_proj": "gate_up", "up_proj": "gate_up", "down_proj": "down"}
    assert groups("GPT2LMHeadModel", 3) == {"up_proj": "gate_up", "down_proj": "down"}
    assert groups("CohereForCausalLM", 1) == {**qkv, "gate_proj": "qkv", "up_proj": "qkv", "down_proj": "down"}
    assert groups("MixtralForCausalLM", 2)["w1.3"] == groups("MixtralForCausalLM", 2)["w3.3"] == "w13.3"
    assert groups("MixtralForCausalLM", 2)["w2.3"] == "w2.3"


# ---- a converted model --------------------------------------------------------------------------------------------


def as_exl2(path: Path, target: Path, spec: ModelSpec, source: SourceModel) -> SourceModel:
    """The output directory with linears left out: enough for everything but the linears themselves."""
    tensors = {e.name: read_plain(spec, e.plain, source) for e in output_tensors(spec) if e.plain is not None}
    target.mkdir()
    save_file(tensors, target / "model.safetensors")
    config = loader_config(spec.arch, source.config)
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "exl2"}}))
    return SourceModel(target)


@pytest.mark.parametrize("name", ["Phi3ForCausalLM", "Qwen3ForCausalLM", "InternLM2ForCausalLM", "DbrxForCausalLM"])
def test_converted_model_runs_with_linears_from_elsewhere(name: str, oracle: Callable[[str], Oracle], tmp_path: Path) -> None:
    source = SourceModel(oracle(name).path)
    spec = load_spec(source)
    converted = as_exl2(oracle(name).path, tmp_path / "exl2", spec, source)
    again = load_spec(converted)
    assert again.hyper == spec.hyper
    assert [x.key for x in again.linears] == [x.key for x in spec.linears]
    by_key = {x.key: x for x in spec.linears}

    def read(_spec: ModelSpec, linear: Any, _source: SourceModel) -> tuple[Tensor, Tensor | None]:
        weight, bias = read_linear(spec, by_key[linear.key], source)
        return torch.nn.functional.pad(weight, (0, linear.padded_out - linear.out_features)), bias

    x = torch.randint(3, VOCAB, (1, 9))
    expected = oracle(name).run(x)[1]
    for module in again.modules:
        x = load_block(again, module, converted, "cpu", torch.float32, torch.float32, read).forward(x)
    assert (x - expected).norm() / expected.norm() < 5e-3  # plain tensors were rounded to float16


# ---- broken checkpoints -------------------------------------------------------------------------------------------


def cut_norm(t: dict[str, Tensor]) -> None:
    t["model.norm.weight"] = t["model.norm.weight"][:-1].clone()


def cut_head(t: dict[str, Tensor]) -> None:
    t["lm_head.weight"] = t["lm_head.weight"][:-1].clone()


BROKEN_HEADERS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing linear": (lambda t: t.pop(LLAMA_Q), f"{LLAMA_Q} is missing"),
    "missing norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "missing embedding": (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
    "missing head": (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing"),
    "transposed linear": (lambda t: t.update({LLAMA_Q: t[LLAMA_Q].t().contiguous()}), r"expected \(128, 96\)"),
    "short norm": (cut_norm, rf"model.norm.weight has shape \(95,\), expected \({HIDDEN},\)"),
    "head of another vocabulary": (cut_head, rf"lm_head.weight has shape \(258, 96\), expected \({VOCAB}, 96\)"),
}


@pytest.mark.parametrize("name", BROKEN_HEADERS)
def test_wrong_shapes_are_found_before_any_weight_is_read(name: str, checkpoint: Callable[[], Path]) -> None:
    edit, message = BROKEN_HEADERS[name]
    path = checkpoint()
    edit_tensors(path, edit)
    with pytest.raises(SourceError, match=message):
        load_spec(SourceModel(path))


BROKEN_VALUES = {
    "NaN": (float("nan"), "holds 1 NaN"),
    "infinity": (float("-inf"), "1 values beyond float16"),
    "too large": (65536.0, "1 values beyond float16"),
}


@pytest.mark.parametrize("name", BROKEN_VALUES)
def test_bad_values_are_named(name: str, checkpoint: Callable[[], Path]) -> None:
    value, message = BROKEN_VALUES[name]
    path = checkpoint()
    edit_tensors(path, lambda t: t[LLAMA_Q][3, 5].fill_(value))
    edit_tensors(path, lambda t: t["model.norm.weight"][1].fill_(value))
    source = SourceModel(path)
    spec = load_spec(source)
    with pytest.raises(SourceError, match=f"{LLAMA_Q}.*{message}"):
        read_linear(spec, spec.modules[1].linear("q_proj"), source)
    with pytest.raises(SourceError, match=f"model.norm.weight.*{message}"):
        read_plain(spec, spec.modules[-2].plain[0], source)
    with pytest.raises(SourceError, match=message):
        load_block(spec, spec.modules[1], source, "cpu", torch.float32)


def test_largest_float16_value_is_accepted(checkpoint: Callable[[], Path]) -> None:
    path = checkpoint()
    edit_tensors(path, lambda t: t[LLAMA_Q][3, 5].fill_(65504.0))
    source = SourceModel(path)
    spec = load_spec(source)
    assert read_linear(spec, spec.modules[1].linear("q_proj"), source)[0].max() == 65504


def test_integer_weights_are_refused(checkpoint: Callable[[], Path]) -> None:
    path = checkpoint()
    edit_tensors(path, lambda t: t.update({LLAMA_Q: t[LLAMA_Q].to(torch.int32)}))
    source = SourceModel(path)  # one matrix may be a table of something else
    with pytest.raises(SourceError, match=rf"{LLAMA_Q} has dtype I32; floating-point numbers are needed"):
        read_linear(load_spec(source), load_spec(source).modules[1].linear("q_proj"), source)


def test_dropped_tensors_are_reported(checkpoint: Callable[[], Path]) -> None:
    path = checkpoint()
    extra = {
        "model.layers.0.self_attn.q_proj.bias": torch.zeros(128),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    edit_tensors(path, lambda t: t.update(extra))
    spec = load_spec(SourceModel(path))
    assert any("biases are stored" in w and "q_proj.bias" in w for w in spec.warnings)
    assert not any("inv_freq" in w for w in spec.warnings)
