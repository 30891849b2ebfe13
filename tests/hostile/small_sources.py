"""Source models and EXL2 directories of a few kilobytes, whose config and headers tests then spoil."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import byte_tokenizer

HIDDEN, WIDE, VOCAB, LAYERS, HEADS, KV_HEADS, EXPERTS = 64, 96, 272, 2, 4, 2, 4
KV = HIDDEN // HEADS * KV_HEADS
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN, "intermediate_size": WIDE, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "vocab_size": VOCAB, "max_position_embeddings": 4096,
    "bos_token_id": 1, "eos_token_id": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL = {**LLAMA, "architectures": ["MixtralForCausalLM"], "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
BITS = 4


def shapes(experts: int = 0) -> dict[str, tuple[int, ...]]:
    """Tensors of the Llama or Mixtral checkpoint that LLAMA and MIXTRAL describe."""
    out: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN),
    }  # fmt: skip
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        out |= {f"{layer}.{n}.weight": (HIDDEN,) for n in ("input_layernorm", "post_attention_layernorm")}
        attention = {"q": (HIDDEN, HIDDEN), "k": (KV, HIDDEN), "v": (KV, HIDDEN), "o": (HIDDEN, HIDDEN)}
        out |= {f"{layer}.self_attn.{n}_proj.weight": s for n, s in attention.items()}
        if experts:
            out[f"{layer}.block_sparse_moe.gate.weight"] = (experts, HIDDEN)
            roles = {"w1": (WIDE, HIDDEN), "w3": (WIDE, HIDDEN), "w2": (HIDDEN, WIDE)}
            for e in range(experts):
                out |= {f"{layer}.block_sparse_moe.experts.{e}.{n}.weight": s for n, s in roles.items()}
        else:
            mlp = {"gate": (WIDE, HIDDEN), "up": (WIDE, HIDDEN), "down": (HIDDEN, WIDE)}
            out |= {f"{layer}.mlp.{n}_proj.weight": s for n, s in mlp.items()}
    return out


@cache
def weights(experts: int = 0) -> dict[str, torch.Tensor]:
    """Random weights in float16 of the size that trained ones have."""
    g = torch.Generator().manual_seed(0)
    out = {}
    for name, shape in shapes(experts).items():
        noise = torch.randn(shape, generator=g)
        out[name] = (1 + 0.1 * noise if len(shape) == 1 else noise * shape[-1] ** -0.5).half()
    return out


def write_source(directory: Path, config: Mapping[str, Any] = LLAMA) -> Path:
    """A model with random weights and a tokenizer; Mixtral's weights if ``config`` names experts of a Mixtral."""
    directory.mkdir(parents=True, exist_ok=True)
    experts = EXPERTS if config.get("architectures") == MIXTRAL["architectures"] else 0
    save_file(weights(experts), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def write_exl2(directory: Path, config: Mapping[str, Any] = LLAMA) -> Path:
    """An EXL2 directory with every linear in one width, values all alike, that `verify` calls sound."""
    directory.mkdir(parents=True, exist_ok=True)
    experts = EXPERTS if config.get("architectures") == MIXTRAL["architectures"] else 0
    tensors: dict[str, torch.Tensor] = {}
    for name, w in weights(experts).items():
        if w.dim() == 1 or "embed" in name or ".gate.weight" in name:
            tensors[name] = w
            continue
        key, (n, k) = name.removesuffix(".weight"), w.shape
        n = math.ceil(n / 32) * 32
        tensors |= {
            f"{key}.q_weight": torch.zeros(k * BITS // 32, n, dtype=torch.int32),
            f"{key}.q_scale": torch.zeros(1, n // 8, dtype=torch.int32),
            f"{key}.q_scale_max": torch.ones(1, dtype=torch.float16),
            f"{key}.q_groups": torch.tensor([BITS, 0], dtype=torch.int16),
            f"{key}.q_invperm": torch.arange(k, dtype=torch.int32),
        }
    save_file(tensors, directory / "output.safetensors", metadata={"format": "pt"})
    quantization = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 4, "calibration": {}}
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory
