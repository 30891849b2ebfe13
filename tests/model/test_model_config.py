"""Configs: what is recognised, what is refused and why, defaults, and configs in the spellings of published models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles import HIDDEN, llama
from tiny_models import edit_config

from exl2ray.errors import SourceError, UnknownArchitectureError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.hfconfig import NEVER_NULL
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config, resolve_hyper
from exl2ray.model.table import ARCHITECTURES


def test_unknown_architecture_lists_the_known_ones(checkpoint: Callable[[], Path]) -> None:
    path = checkpoint()
    edit_config(path, architectures=["MambaForCausalLM"], model_type="mamba")
    with pytest.raises(UnknownArchitectureError, match="'MambaForCausalLM'") as e:
        load_spec(SourceModel(path))
    assert all(name in e.value.hint for name in ARCHITECTURES)


@pytest.mark.parametrize("names", [["LlamaForCausalLM", "MistralForCausalLM"], [], "of my own"])
def test_exactly_one_architecture(names: Any, checkpoint: Callable[[], Path]) -> None:
    path = checkpoint()
    edit_config(path, architectures=names, model_type="of my own")
    with pytest.raises(SourceError, match="architecture"):
        load_spec(SourceModel(path))


def test_pixtral_strings_need_a_pixtral_tower(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("LlavaForConditionalGeneration")
    edit_config(path, vision_config={"model_type": "clip_vision_model"})
    with pytest.raises(UnknownArchitectureError, match="clip_vision_model"):
        load_spec(SourceModel(path))


@pytest.mark.parametrize(("name", "text"), [
    ("LlavaForConditionalGeneration", "qwen2"), ("Mistral3ForConditionalGeneration", "qwen3"),
    ("Gemma3ForConditionalGeneration", "gemma2"),
])  # fmt: skip
def test_text_of_another_family_is_refused(name: str, text: str, checkpoint: Callable[[str], Path]) -> None:
    """Its biases or norms of heads would be left out."""
    path = checkpoint(name)
    config = json.loads((path / "config.json").read_text())
    edit_config(path, text_config={**config["text_config"], "model_type": text})
    with pytest.raises(UnknownArchitectureError, match=f"text_config.model_type '{text}'.*"):
        load_spec(SourceModel(path))


@pytest.mark.parametrize("kinds", [("full", "full"), ("sliding", "sliding"), ("full", "sliding"), ("sliding", "full")])
def test_layer_types_of_gemma_2_that_the_loader_does_not_follow(
    kinds: tuple[str, str], checkpoint: Callable[[str], Path]
) -> None:
    path = checkpoint("Gemma2ForCausalLM")
    edit_config(path, layer_types=[f"{kind}_attention" for kind in kinds])
    told = any("layer_types: the loader does not read it" in w for w in load_spec(SourceModel(path)).warnings)
    assert told == (kinds != ("sliding", "full"))


@pytest.mark.parametrize(
    ("name", "changes", "sliding"),
    [
        ("MistralForCausalLM", {}, (True, True)),
        ("Phi3ForCausalLM", {}, (True, True)),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": True, "max_window_layers": 1}, (True, True)),
        ("Qwen3MoeForCausalLM", {"use_sliding_window": False}, (False, False)),
        ("Qwen3ForCausalLM", {"use_sliding_window": True, "max_window_layers": 0}, (False, True)),
    ],
)
def test_classes_that_do_not_look_at_layer_types(
    name: str, changes: dict[str, Any], sliding: tuple[bool, ...], checkpoint: Callable[[str], Path]
) -> None:
    """As in transformers; test_model_forward.py compares logits."""
    path = checkpoint(name)
    edit_config(path, sliding_window=5, layer_types=["full_attention", "sliding_attention"], **changes)
    assert load_spec(SourceModel(path)).hyper.sliding == sliding


LONG = [1.0 + i for i in range(16)]


@pytest.mark.parametrize(
    ("scaling", "told"),
    [
        ({"type": "dynamic", "factor": 2.0}, "dynamic: RoPE of rows of more than 128 tokens"),
        ({"rope_type": "longrope", "short_factor": LONG, "long_factor": LONG}, "longrope: the loader picks long or short"),
        ({"rope_type": "yarn", "factor": 2.0}, "yarn: the loader computes"),
        ({"type": "linear", "factor": 2.0}, ""),
    ],
)
def test_rope_that_the_loader_scales_in_another_way_is_told(
    scaling: dict[str, Any], told: str, checkpoint: Callable[[str], Path]
) -> None:
    """Of whatever family."""
    path = checkpoint("LlamaForCausalLM")
    edit_config(path, rope_scaling=scaling, original_max_position_embeddings=64, rope_parameters=None)
    assert [told in w for w in load_spec(SourceModel(path)).warnings] == ([True] if told else [])


def test_scaled_queries_of_ministral_are_told(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("Mistral3ForConditionalGeneration")
    config = json.loads((path / "config.json").read_text())
    rope = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}
    rope["llama_4_scaling_beta"] = 0.1
    edit_config(path, text_config={**config["text_config"], "model_type": "ministral3", "rope_parameters": rope})
    assert any("llama_4_scaling_beta" in w and "before position 64" in w for w in load_spec(SourceModel(path)).warnings)


@pytest.mark.parametrize(("name", "changes", "said"), [
    ("LlamaForCausalLM", {"logit_scale": 0.5, "scale_emb": 3.0}, "logit_scale, scale_emb: the loader applies them to every"),
    ("MistralForCausalLM", {"final_logit_softcapping": 1.0}, "final_logit_softcapping: the loader applies it"),
    ("LlamaForCausalLM", {"logit_scale": 1.0, "residual_multiplier": 1, "query_pre_attn_scalar": 0}, ""),
    ("LlamaForCausalLM", {"attention_multiplier": 0.5}, "attention_multiplier: the loader applies it"),
    ("GraniteForCausalLM", {"attention_multiplier": 0.5}, ""),
    ("CohereForCausalLM", {"logit_scale": 0.5}, ""),
    ("Gemma2ForCausalLM", {"attn_logit_softcapping": 9.0, "final_logit_softcapping": 9.0}, ""),
    ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 9, "final_logit_softcapping": 9.0}, ""),
    ("Gemma3ForCausalLM", {"attn_logit_softcapping": 9.0}, "attn_logit_softcapping: the loader applies it"),
    ("Gemma3ForConditionalGeneration", {"final_logit_softcapping": 9.0}, "final_logit_softcapping: the loader applies it"),
])  # fmt: skip
def test_factors_of_other_families_are_told(
    name: str, changes: dict[str, Any], said: str, checkpoint: Callable[[str], Path]
) -> None:
    """transformers leaves them out, so `eval` and the original differ without a word."""
    path = checkpoint(name)
    edit_config(path, **changes)
    found = [w for w in load_spec(SourceModel(path)).warnings if "to every family" in w]
    assert [said in w for w in found] == ([True] if said else [])


@pytest.mark.parametrize(
    ("name", "beside", "told"),
    [
        ("Mistral3ForConditionalGeneration", {}, ""),
        ("Mistral3ForConditionalGeneration", {"rope_theta": 5000.0}, "has rope_theta outside of text_config"),
        ("LlavaForConditionalGeneration", {"rope_scaling": {"type": "linear", "factor": 4.0}}, "has rope_scaling outside"),
        ("Gemma3ForConditionalGeneration", {"sliding_window": 9, "rms_norm_eps": 1e-3}, "has rms_norm_eps, sliding_window"),
        ("Qwen2VLForConditionalGeneration", {"hidden_size": HIDDEN, "rms_norm_eps": 1e-5, "max_position_embeddings": 9}, ""),
        ("Qwen2VLForConditionalGeneration", {"sliding_window": 9, "rope_scaling": {"type": "default"}}, ""),
    ],
)
def test_keys_that_only_the_loader_reads_are_told(
    name: str, beside: dict[str, Any], told: str, checkpoint: Callable[[str], Path]
) -> None:
    """transformers reads text_config; what stands beside it in older files, and says the same, is no matter."""
    path = checkpoint(name)
    edit_config(path, **beside)
    found = [w for w in load_spec(SourceModel(path)).warnings if "outside of text_config" in w]
    assert [told in w for w in found] == ([True] if told else [])


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "unnormalised routing": ("Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob is False"),
    "absent norm_topk_prob": ("Qwen3MoeForCausalLM", {"norm_topk_prob": None}, "norm_topk_prob is False"),
    "dense layers": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\]"),
    "activation": ("LlamaForCausalLM", {"hidden_act": "gelu"}, "the activation is 'gelu'"),
    "attention that looks ahead": ("LlamaForCausalLM", {"is_causal": False}, "is_causal is False"),
    "no bias": ("Starcoder2ForCausalLM", {"use_bias": False}, "use_bias is False"),
    "rope type": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "spiral"}}, "'spiral' is unknown"),
    "rope factor": ("LlamaForCausalLM", {"rope_parameters": {"rope_type": "linear", "factor": -1}}, "factor is -1"),
    "rope factors": (
        "Phi3ForCausalLM",
        {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        "short_factor has 1 entries; 8 numbers",
    ),
    "hidden size": ("LlamaForCausalLM", {"hidden_size": "96"}, "hidden_size is '96'"),
    "missing size": ("LlamaForCausalLM", {"vocab_size": None}, "vocab_size is absent, and 32000 by default"),
    "negative layers": ("LlamaForCausalLM", {"num_hidden_layers": -2}, "num_hidden_layers is -2"),
    "flag": ("LlamaForCausalLM", {"attention_bias": 1}, "attention_bias is 1"),
    "heads": ("LlamaForCausalLM", {"num_key_value_heads": 3}, "cannot share 3"),
    "too many experts per token": ("MixtralForCausalLM", {"num_experts_per_tok": 9}, "9 experts per token"),
    "local rope base": (
        "Gemma3ForConditionalGeneration",
        {"rope_local_base_freq": 5000.0},
        "rope_local_base_freq is 5000",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configs_that_cannot_run_are_refused(name: str, checkpoint: Callable[[str], Path]) -> None:
    family, changes, message = REFUSED[name]
    path = checkpoint(family)
    edit_config(path, **changes)
    with pytest.raises(SourceError, match=message):
        load_spec(SourceModel(path))


def test_sizes_that_the_format_cannot_hold(tmp_path: Path) -> None:
    llama(intermediate_size=150)(tmp_path)
    with pytest.raises(SourceError, match=r"gate_proj has 150 output features.*down_proj has 150 input") as e:
        load_spec(SourceModel(tmp_path))
    assert "multiples of 32" in e.value.hint


def test_defaults_of_the_family_apply_where_the_config_is_silent(checkpoint: Callable[[str], Path]) -> None:
    """Transformers has class defaults that the loader does not share: they are used, and written."""
    path = checkpoint("CohereForCausalLM")
    edit_config(path, logit_scale=None, rope_parameters=None)
    source = SourceModel(path)
    hyper = load_spec(source).hyper
    assert hyper.logit_scale == 0.0625
    config = loader_config(ARCHITECTURES["CohereForCausalLM"], source.config)
    assert (config["logit_scale"], config["rope_theta"]) == (0.0625, 500000.0)


def test_null_hides_a_default_of_the_family(checkpoint: Callable[[str], Path]) -> None:
    path = checkpoint("Gemma2ForCausalLM")
    config = json.loads((path / "config.json").read_text())
    config["attn_logit_softcapping"] = None
    del config["final_logit_softcapping"]
    (path / "config.json").write_text(json.dumps(config))
    source = SourceModel(path)
    hyper, written = load_spec(source).hyper, loader_config(ARCHITECTURES["Gemma2ForCausalLM"], source.config)
    assert (hyper.attention_softcap, hyper.logit_softcap) == (None, 30.0)
    assert (written["attn_logit_softcapping"], written["final_logit_softcapping"]) == (None, 30.0)


def test_what_transformers_refuses_to_load_is_put_right(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """Nulls where a value has to be, counts as 2.0, no model_type, a padding token without an embedding row: the weights are
    read all the same, and a model that does not load would be no use."""
    from transformers import AutoConfig, AutoModelForCausalLM

    path = checkpoint("LlamaForCausalLM")
    config = json.loads((path / "config.json").read_text()) | dict.fromkeys(NEVER_NULL)
    config = {k: v for k, v in config.items() if k != "model_type"} | {"pad_token_id": config["vocab_size"]}
    config |= {"num_attention_heads": float(config["num_attention_heads"]), "rope_scaling": {"type": None, "factor": 2.0}}
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "rope_parameters"}))
    source = SourceModel(path)
    written = loader_config(ARCHITECTURES["LlamaForCausalLM"], source.config)
    (tmp_path / "config.json").write_text(json.dumps(written))
    loaded = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).config
    assert (loaded.model_type, loaded.pad_token_id) == ("llama", None)
    assert loaded.max_position_embeddings == load_spec(source).hyper.max_seq_len == written["max_position_embeddings"]


def test_missing_layers_are_noticed(checkpoint: Callable[[], Path]) -> None:
    path = checkpoint()
    edit_config(path, num_hidden_layers=3)
    with pytest.raises(SourceError, match=r"the weights have 2 layers, config.json says 3"):
        load_spec(SourceModel(path))


# ---- configs as published: old spellings, minimal text parts ---------------------------------------------------------


PUBLISHED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "long-context phi": (
        "Phi3ForCausalLM",
        {
            **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 2, "num_attention_heads": 32},
            **{"num_key_value_heads": 32, "vocab_size": 32064, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
            **{"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144},
            "rope_scaling": {"type": "longrope", "long_factor": [2.0] * 48, "short_factor": [1.0] * 48},
        },
        {"head_dim": 96, "window": 262144, "sliding": (True, True), "rope_kind": "longrope"},
    ),
    "gemma 3 with a minimal text_config": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {
                **{"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 12, "sliding_window": 1024},
                "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            },
            "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27, "model_type": "siglip_vision_model"},
        },
        {
            **{"heads": 8, "kv_heads": 4, "head_dim": 256, "vocab_size": 262208, "window": 1024, "norm_eps": 1e-6},
            **{"sliding": ((True,) * 5 + (False,)) * 2, "attention_scale": 1 / 16, "state_dtype": "float32"},
        },
    ),
    "pixtral with a minimal text_config": (
        "LlavaForConditionalGeneration",
        {
            "text_config": {
                **{"hidden_size": 5120, "head_dim": 128, "intermediate_size": 14336, "num_hidden_layers": 2},
                **{"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e9, "vocab_size": 131072},
                **{"max_position_embeddings": 1024000, "sliding_window": None, "model_type": "mistral"},
            },
            "vision_config": {"model_type": "pixtral", "hidden_size": 1024, "num_attention_heads": 16},
        },
        {"heads": 32, "kv_heads": 8, "head_dim": 128, "window": None, "max_seq_len": 1024000},
    ),
    "qwen2 with a window that is switched off": (
        "Qwen2ForCausalLM",
        {
            **{"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 3, "num_attention_heads": 28},
            **{"num_key_value_heads": 4, "vocab_size": 152064, "rms_norm_eps": 1e-6, "rope_theta": 1e6},
            **{"sliding_window": 131072, "use_sliding_window": False, "max_window_layers": 1},
        },
        {"head_dim": 128, "sliding": (False,) * 3, "bias_qkv": True, "bias_o": False, "tie_embeddings": False},
    ),
    "dbrx": (
        "DbrxForCausalLM",
        {
            **{"d_model": 6144, "n_heads": 48, "n_layers": 2, "max_seq_len": 32768, "vocab_size": 100352},
            "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "model_type": "", "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        },
        {
            **{"hidden_size": 6144, "heads": 48, "kv_heads": 8, "intermediate_size": 10752, "num_experts": 16},
            **{"experts_per_token": 4, "qkv_clip": 8.0, "norm_eps": 1e-5, "max_seq_len": 32768},
        },
    ),
    "internlm2 with dynamic scaling": (
        "InternLM2ForCausalLM",
        {
            **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 2, "num_attention_heads": 32},
            **{"num_key_value_heads": 8, "vocab_size": 92544, "rms_norm_eps": 1e-5, "rope_theta": 1e6, "bias": False},
            "rope_scaling": {"type": "dynamic", "factor": 2.0},
        },
        {"rope_kind": "dynamic", "bias_qkv": False, "head_dim": 128},
    ),
    "minicpm": (
        "MiniCPMForCausalLM",
        {
            **{"hidden_size": 2304, "intermediate_size": 5760, "num_hidden_layers": 4, "num_attention_heads": 36},
            **{"num_key_value_heads": 36, "vocab_size": 122753, "rms_norm_eps": 1e-5, "scale_emb": 12},
            **{"dim_model_base": 256, "scale_depth": 1.4, "rope_scaling": None},
        },
        {"embedding_scale": 12.0, "residual_scale": 0.7, "logit_scale": 256 / 2304, "max_seq_len": 2048},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs(name: str) -> None:
    family, config, wanted = PUBLISHED[name]
    hyper = resolve_hyper(ARCHITECTURES[family], {"architectures": [family], **config})
    assert {k: getattr(hyper, k) for k in wanted} == wanted
