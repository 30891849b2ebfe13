"""Models of any size that take no room: real config and tensor headers over files of holes, which read as zeros."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SIZES = {"F16": 2, "BF16": 2, "F32": 4, "F8_E4M3": 1}
LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu",
}  # fmt: skip
LLAMA_8B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 8, "vocab_size": 128256}  # fmt: skip
LLAMA_70B = {**LLAMA_8B, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_405B = {
    **LLAMA_8B, "hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 128,
}  # fmt: skip
MIXTRAL_8X7B = {
    **LLAMA_8B, "architectures": ["MixtralForCausalLM"], "vocab_size": 32000, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
Tensors = dict[str, tuple[int, ...]]


def tensors_of(config: dict[str, Any]) -> Tensors:
    """Names and shapes of a Llama or Mixtral checkpoint."""
    h, wide, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    experts = config.get("num_local_experts", 0)
    out: Tensors = {"model.embed_tokens.weight": (vocab, h), "model.norm.weight": (h,), "lm_head.weight": (vocab, h)}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        out |= {f"{layer}.{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
        attention = {"q": (h, h), "k": (kv, h), "v": (kv, h), "o": (h, h)}
        out |= {f"{layer}.self_attn.{n}_proj.weight": s for n, s in attention.items()}
        mlp = {"gate_proj": (wide, h), "up_proj": (wide, h), "down_proj": (h, wide)}
        if experts:
            out[f"{layer}.block_sparse_moe.gate.weight"] = (experts, h)
            for e in range(experts):
                names = {"w1": (wide, h), "w3": (wide, h), "w2": (h, wide)}
                out |= {f"{layer}.block_sparse_moe.experts.{e}.{n}.weight": s for n, s in names.items()}
        else:
            out |= {f"{layer}.mlp.{n}.weight": s for n, s in mlp.items()}
    return out


def write_shard(path: Path, tensors: Tensors, dtype: str = "BF16") -> None:
    """A safetensors file of holes."""
    header, position = {}, 0
    for name, shape in tensors.items():
        size = math.prod(shape) * SIZES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + position)


def write_header_model(directory: Path, config: dict[str, Any], shards: int = 8, tensors: Tensors | None = None) -> Path:
    """A model directory with the demo model's tokenizer."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, directory)
    names = list((tensors or tensors_of(config)).items())
    for i in range(shards):
        part = dict(names[i * len(names) // shards : (i + 1) * len(names) // shards])
        write_shard(directory / f"model-{i + 1:05d}-of-{shards:05d}.safetensors", part)
    return directory
