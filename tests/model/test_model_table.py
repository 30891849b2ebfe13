"""The table against the reference description of the architectures (optional data), field by field."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from oracles import ORACLES, Oracle

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.checkpoint_names import relocated
from exl2ray.model.hyper import loader_config
from exl2ray.model.spec import ModuleSpec
from exl2ray.model.table import ARCHITECTURES
from exl2ray.model.weights import output_tensors

ROLES = {  # field of Names -> name in the reference data
    "embed": "embed_tokens",
    "positions": "position_embeddings",
    "attn_norm": "norm_attn_in",
    "attn_post_norm": "norm_attn_out",
    "mlp_norm": "norm_mlp_in",
    "mlp_post_norm": "norm_mlp_out",
    "router": "router",
    "head": "lm_head",
    **{f"{n}_norm": f"{n}_norm" for n in "qk"},
    **{n: f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")},
    "final_norm": "final_norm",
}


def entry(architectures: dict[str, Any], name: str) -> dict[str, Any]:
    loaded = ARCHITECTURES[name].loads_as or name
    found: dict[str, Any] = next(a for a in architectures["architectures"] if a["arch"] == loaded)
    return found


def test_every_architecture_is_in_the_table(architectures: dict[str, Any]) -> None:
    assert {a["arch"] for a in architectures["architectures"]} == {
        a.name for a in ARCHITECTURES.values() if not a.loads_as
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_names(name: str, architectures: dict[str, Any]) -> None:
    arch, tensors = ARCHITECTURES[name], entry(architectures, name)["tensors"]
    layouts = arch.source_layouts or ((("", arch.prefix),),)
    for field, role in ROLES.items():
        output, source = getattr(arch.output, field), getattr(arch.source, field)
        if role in ("q_norm", "k_norm") and arch.head_norm is None:
            output = None
        if tensors[role] is None:
            assert output is None, field
            continue
        assert arch.prefix + output == tensors[role]["output"], field
        if arch.loads_as:  # stored under the names of another family than the one it is loaded as
            continue
        wanted = tensors[role]["source"]
        if isinstance(wanted, list):
            wanted = wanted[0]
        plain = re.sub(r"\[[^\]]*\]|\^T", "", wanted)  # without the marks of slices and transposition
        assert plain in [relocated(source, layout) for layout in layouts], field


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rules(name: str, architectures: dict[str, Any]) -> None:
    arch, wanted = ARCHITECTURES[name], entry(architectures, name)
    norm, rope, moe = wanted["norm"], wanted["rope"], wanted["moe"]
    assert f"{arch.norm.kind}norm" == norm["type"]
    assert (arch.norm.offset, arch.norm.bias) == (norm["weight_offset"], norm["bias"])
    assert norm["eps_config_key"] is None or norm["eps_config_key"] in arch.norm.eps_keys
    assert arch.parallel == (wanted["block"]["layout"] == "parallel")
    assert (arch.output.attn_post_norm is not None) == wanted["block"]["post_norms"]
    assert (arch.output.gate is not None) == wanted["mlp"]["gated"]
    assert wanted["mlp"]["activation"].startswith(arch.activation)
    assert (arch.bias_o, arch.bias_mlp) == (wanted["bias"]["o"], wanted["bias"]["mlp"])
    assert arch.bias_qkv == (wanted["bias"]["qkv"] is True)
    assert (arch.rope, arch.local_rope_theta) == (rope["style"], rope["local_theta"])
    assert (arch.rope_on == "all") == rope["rope_on_all_layers_hf"]
    assert arch.moe == (moe is not None)
    assert arch.sqrt_hidden_embedding == wanted["embedding"]["sqrt_hidden_multiplier"]
    assert (arch.output.positions is not None) == wanted["embedding"]["learned_positions"]
    assert arch.float32_states == wanted["residual"]["fp32_stream"]
    assert arch.tied == wanted["tied_embeddings"].startswith("always")
    assert arch.needs_bos == wanted["requires_bos"]
    assert arch.linears_transposed == wanted["source_linear_weights_transposed"]
    rows = wanted["calibration_noise_rows"]
    assert arch.noise_rows == (rows and (rows["measurement"], rows["quantisation"]))
    head = wanted["qk_norm"]
    assert (arch.head_norm and arch.head_norm.kind + "norm") == head["hf_type"]
    assert (arch.head_norm.offset if arch.head_norm else 0) == head["weight_offset"]
    assert bool(arch.head_norm and arch.head_norm.always) == head["enabled_default"]
    copied = {new for _, new in arch.copied if "input_projection" not in new}
    assert arch.loads_as or copied == set((wanted["multimodal"] or {"copied_prefixes": []})["copied_prefixes"])
    if wanted["reference_vs_hf"] and "sliding window" in wanted["reference_vs_hf"][0]["topic"]:
        assert arch.window is not None
        assert any(d.startswith("sliding window") for d in arch.loader_differences)


@pytest.mark.parametrize("name", ORACLES)
def test_output_has_exactly_the_names_that_the_loader_demands(
    name: str, architectures: dict[str, Any], oracle: Callable[[str], Oracle]
) -> None:
    spec = load_spec(SourceModel(oracle(name).path))
    tensors = entry(architectures, name)["tensors"]
    wanted = set()
    for role, value in tensors.items():
        if value is None or (role in ("q_norm", "k_norm") and not spec.hyper.qk_norm):
            continue
        for layer in range(spec.hyper.num_layers):
            for expert in range(max(spec.hyper.num_experts, 1)):
                wanted.add(value["output"].replace("{L}", str(layer)).replace("{E}", str(expert)))
    found = {e.name if e.linear else re.sub(r"\.(weight|bias)$", "", e.name) for e in output_tensors(spec) if e.module}
    assert found == wanted


def lookup(config: dict[str, Any], keys: list[str], text: bool) -> Any:
    """A config value as the loader finds it; JSON null counts as absent."""
    for level in [config] + ([config["text_config"]] if text and "text_config" in config else []):
        for key in keys:
            value: Any = level
            for part in key.split("."):
                value = value.get(part) if isinstance(value, dict) else None
            if value is not None:
                return value
    return None


@pytest.mark.parametrize("name", ORACLES)
def test_loader_reads_the_same_numbers_from_the_written_config(
    name: str, architectures: dict[str, Any], oracle: Callable[[str], Oracle]
) -> None:
    """Configs of transformers 5 hide most of these values from the loader; loader_config brings them back."""
    source = SourceModel(oracle(name).path)
    hyper, config = load_spec(source).hyper, loader_config(ARCHITECTURES[name], source.config)
    fields = {f["field"]: f for f in architectures["common"]["config_keys"]}

    def read(field: str) -> Any:
        f = fields[field]
        return lookup(config, f["keys_in_order"], f["text_config_fallback"])

    heads = read("num_attention_heads") or entry(architectures, name)["attention"]["default_num_heads"]
    assert heads == hyper.heads
    assert (read("head_dim") or read("hidden_size") // heads) == hyper.head_dim
    kv_heads = read("num_key_value_heads") or heads
    assert (1 if name == "GPTBigCodeForCausalLM" else kv_heads) == hyper.kv_heads
    assert read("vocab_size") == hyper.vocab_size
    assert read("num_hidden_layers") == hyper.num_layers
    wide = read("moe_intermediate_size") if ARCHITECTURES[name].moe else None
    assert (wide or read("intermediate_size") or 4 * hyper.hidden_size) == hyper.intermediate_size
    assert (read("num_experts") or 0) == hyper.num_experts
    eps_key = entry(architectures, name)["norm"]["eps_config_key"]
    assert (lookup(config, [eps_key], True) if eps_key else 1e-5) == hyper.norm_eps
    assert (read("logits_scaling") is not None) or (
        name == "MiniCPMForCausalLM" or (read("logit_scale") or 1.0) == hyper.logit_scale
    )
    assert read("attn_logit_softcapping") == hyper.attention_softcap
    assert read("final_logit_softcapping") == hyper.logit_softcap
    scale = read("attention_multiplier") or (read("query_pre_attn_scalar") or hyper.head_dim) ** -0.5
    assert scale == pytest.approx(hyper.attention_scale)
    assert read("max_seq_len") == hyper.max_seq_len
    if hyper.rope is not None:
        assert int(hyper.head_dim * (read("partial_rotary_factor") or 1.0)) == hyper.rope.dim
        theta, linear = read("rope_theta"), (read("rope_scaling") or {}).get("factor", 1.0)
        assert theta ** (-2 / hyper.rope.dim) / linear == pytest.approx(hyper.rope.inv_freq[1])
    rule = entry(architectures, name)["sliding_window"]
    if rule["reference"] == "alternating":
        p = read("sliding_window_pattern") or rule["pattern_default"]
        slides = tuple((i + 1) % p != 0 if p > 1 else i % 2 == 0 for i in range(hyper.num_layers))
        assert (slides, read("sliding_window")) == (hyper.sliding, hyper.window)


def test_profile_keys_are_those_of_measurement_files(oracle: Callable[[str], Oracle]) -> None:
    def keys(name: str) -> list[str]:
        return [m.profile_key for m in load_spec(SourceModel(oracle(name).path)).modules if quantized(m)]

    def quantized(module: ModuleSpec) -> bool:
        return module.quantized or module.kind in ("norm", "head")

    assert keys("LlamaForCausalLM") == [
        "model.layers.0.self_attn",
        "model.layers.0.mlp",
        "model.layers.1.self_attn",
        "model.layers.1.mlp",
        "model.norm.norm",
        "lm_head.linear",
    ]
    assert keys("Qwen3MoeForCausalLM")[1] == "model.layers.0.block_sparse_moe"
    assert keys("CohereForCausalLM")[:2] == ["model.layers.0.parallel_decoder", "model.layers.1.parallel_decoder"]
    assert keys("Gemma3ForConditionalGeneration")[0] == "language_model.model.layers.0.self_attn"
