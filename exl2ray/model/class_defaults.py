"""What an absent key of config.json means: the value that the family's config class in transformers has by default.

Publishers leave out what is the default of the class they trained with, and ``save_pretrained`` of some versions does too.
The same key means different numbers in different families (key/value heads: 8 in Mistral, 2 in GLM-4), so the rule of the
loader, which knows no families here, would describe another model. Source: configuration classes of transformers 5.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exl2ray.formats.source.architecture_name import BY_MODEL_TYPE
from exl2ray.model.config_reader import (
    EXPERTS_KEYS,
    HEADS_KEYS,
    HIDDEN_KEYS,
    KV_HEADS_KEYS,
    LAYER_KEYS,
    MAX_LENGTH_KEYS,
    MLP_KEYS,
    ConfigReader,
)
from exl2ray.model.rules import Arch

# Names of one thing; a default holds only where none of them is given.
ALIASES = (
    LAYER_KEYS, HIDDEN_KEYS, HEADS_KEYS, KV_HEADS_KEYS, EXPERTS_KEYS, MLP_KEYS, MAX_LENGTH_KEYS,
    ("layer_norm_epsilon", "norm_epsilon"),
    ("num_experts_per_tok", "ffn_config.moe_top_k"),
    ("sliding_window", "sliding_window_size"),
    ("rope_theta", "attn_config.rope_theta"),
)  # fmt: skip


def _sizes(vocab: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int | None, length: int) -> dict[str, Any]:
    found = {
        "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": length,
    }  # fmt: skip
    return {k: v for k, v in found.items() if v is not None}  # None: as many as there are heads


_GPT2 = {"vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
_QWEN2_VL = {**_sizes(152064, 8192, 29568, 80, 64, 8, 32768), "rms_norm_eps": 1e-5, "rope_theta": 1e6}
# By model_type, for multimodal models that of their text_config.
CLASS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "cohere": {**_sizes(256000, 8192, 22528, 40, 64, None, 8192), "layer_norm_eps": 1e-5},
    "cohere2": {**_sizes(256000, 8192, 22528, 40, 64, None, 8192), "layer_norm_eps": 1e-5},
    "dbrx": {
        "vocab_size": 32000, "d_model": 2048, "n_layers": 24, "n_heads": 16, "max_seq_len": 2048,
        "attn_config.kv_n_heads": 1, "ffn_config.ffn_hidden_size": 3584, "ffn_config.moe_num_experts": 4,
        "ffn_config.moe_top_k": 1,
    },
    "gemma": _sizes(256000, 3072, 24576, 28, 16, 16, 8192),
    "gemma2": _sizes(256000, 2304, 9216, 26, 8, 4, 8192),
    "gemma3_text": _sizes(262208, 2304, 9216, 26, 8, 4, 131072),
    "glm4": {**_sizes(151552, 4096, 13696, 40, 32, 2, 131072), "rms_norm_eps": 1.5625e-07, "attention_bias": True},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "granite": {**_sizes(32000, 4096, 11008, 32, 32, None, 2048), "rms_norm_eps": 1e-6},
    "llama": {**_sizes(32000, 4096, 11008, 32, 32, None, 2048), "rms_norm_eps": 1e-6},
    "mistral": {**_sizes(32000, 4096, 14336, 32, 32, 8, 131072), "rms_norm_eps": 1e-6, "sliding_window": 4096},
    "mixtral": {
        **_sizes(32000, 4096, 14336, 32, 32, 8, 131072), "rms_norm_eps": 1e-5, "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    "phi3": {**_sizes(32064, 3072, 8192, 32, 32, None, 4096), "rms_norm_eps": 1e-5},
    "qwen2": {**_sizes(151936, 4096, 22016, 32, 32, 32, 32768), "rms_norm_eps": 1e-6},
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3": {**_sizes(151936, 4096, 22016, 32, 32, 32, 32768), "rms_norm_eps": 1e-6},
    "qwen3_moe": {
        **_sizes(151936, 2048, 6144, 24, 32, 4, 32768), "rms_norm_eps": 1e-6, "num_local_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    },
    "starcoder2": {**_sizes(49152, 3072, 12288, 30, 24, 2, 4096), "layer_norm_epsilon": 1e-5},
}  # fmt: skip
# Text part of a multimodal model whose text_config does not say its type.
TEXT_TYPES = {
    "gemma3": "gemma3_text", "llava": "llama", "mistral3": "mistral", "qwen2_vl": "qwen2_vl_text",
    "qwen2_5_vl": "qwen2_5_vl_text",
}  # fmt: skip
MODEL_TYPES = {name: kind for kind, name in BY_MODEL_TYPE.items()}


def defaults_of(arch: Arch, config: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value of what ``config`` leaves out, where the class has a value for it."""
    kind = MODEL_TYPES[arch.name]
    text = config.get("text_config")
    said = text.get("model_type") if isinstance(text, Mapping) else None
    kind = said if isinstance(said, str) and said in CLASS_DEFAULTS else TEXT_TYPES.get(kind, kind)
    defaults = {**CLASS_DEFAULTS.get(kind, {}), **dict(arch.defaults)}
    c = ConfigReader(config, {})
    heads = c.raw(*HEADS_KEYS)
    kv_heads = defaults.get("num_key_value_heads")
    if kv_heads is not None and type(heads) is int and heads % kv_heads:
        del defaults["num_key_value_heads"]  # no model of these heads has it; the loader takes as many as heads
    return {k: v for k, v in defaults.items() if c.raw(*_names(k)) is None and not c.has(k)}


def _names(key: str) -> tuple[str, ...]:
    return next((names for names in ALIASES if key in names), (key,))
