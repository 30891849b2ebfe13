"""Models with random weights in the shape of well-known ones, a few layers of them, written tensor by tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from exl2ray.formats.shards import TensorEntry, write_shards

SHARD_BYTES = 4 << 30


@dataclass(frozen=True)
class Shape:
    """``full``: its name in the simulation. ``ladder``: bitrates that it can have, 4 among them. ``per_token``: experts.
    ``head``: width of one; 0: hidden / heads.
    """

    layers: int
    hidden: int
    wide: int
    heads: int
    kv_heads: int
    experts: int = 0
    vocab: int = 32000
    full: str = ""
    ladder: tuple[float, ...] = (3.0, 4.0, 5.0)
    per_token: int = 2
    head: int = 0

    @property
    def head_width(self) -> int:
        return self.head or self.hidden // self.heads

    @property
    def linears(self) -> int:
        """Weights of the decoder layers' linears."""
        attention = 2 * self.hidden * self.head_width * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.wide * max(1, self.experts))

    @property
    def bytes(self) -> int:
        """Size of the model's files, nearly."""
        return 2 * (self.linears + 2 * self.vocab * self.hidden)


SHAPES = {
    "70b": Shape(8, 8192, 28672, 64, 8, full="70B"),
    "mixtral": Shape(4, 4096, 14336, 32, 8, experts=8, full="Mixtral 8x7B"),
    "tiny": Shape(2, 64, 96, 4, 2, vocab=272, ladder=(4.0, 5.0, 6.0)),
    "tiny-mixtral": Shape(1, 64, 96, 4, 2, experts=4, vocab=272, ladder=(4.0, 5.0, 6.0)),
}


def build(directory: Path, shape: Shape) -> None:
    """Weights, config.json and a tokenizer of bytes. Random numbers are made on the GPU where there is one."""
    shapes = tensor_shapes(shape)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make(name: str, seed: int) -> torch.Tensor:
        size = shapes[name]
        if len(size) == 1:
            return torch.ones(size, dtype=torch.float16)
        generator = torch.Generator(device).manual_seed(seed)
        scale = 1.0 if "embed" in name else size[-1] ** -0.5
        dtype = torch.float16 if device == "cuda" else torch.float32
        return torch.randn(size, generator=generator, device=device, dtype=dtype).mul_(scale).half().cpu()

    directory.mkdir(parents=True, exist_ok=True)
    entries = [
        TensorEntry(name, "F16", size, lambda n=name, s=seed: make(n, s))  # type: ignore[misc]
        for seed, (name, size) in enumerate(shapes.items())
    ]
    for shard in write_shards(directory, entries, SHARD_BYTES):
        (directory / shard.name).rename(directory / shard.name.replace("output", "model"))
    if device == "cuda":
        torch.cuda.empty_cache()
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(model_config(shape)), encoding="utf-8")


def model_config(shape: Shape) -> dict[str, object]:
    """Content of config.json."""
    config: dict[str, object] = {
        "architectures": ["MixtralForCausalLM" if shape.experts else "LlamaForCausalLM"],
        "model_type": "mixtral" if shape.experts else "llama", "hidden_size": shape.hidden,
        "intermediate_size": shape.wide, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width, "vocab_size": shape.vocab,
        "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 1,
        "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu", "torch_dtype": "float16",
    }  # fmt: skip
    if shape.experts:
        config |= {"num_local_experts": shape.experts, "num_experts_per_tok": shape.per_token}
    return config


def tensor_shapes(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors, in order."""
    h, w, q, kv = shape.hidden, shape.wide, shape.head_width * shape.heads, shape.head_width * shape.kv_heads
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab, h)}
    for i in range(shape.layers):
        p = f"model.layers.{i}"
        out |= {f"{p}.{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
        sizes = {"q": (q, h), "o": (h, q), "k": (kv, h), "v": (kv, h)}
        out |= {f"{p}.self_attn.{n}_proj.weight": size for n, size in sizes.items()}
        if not shape.experts:
            out |= {f"{p}.mlp.{n}_proj.weight": (w, h) for n in ("gate", "up")} | {f"{p}.mlp.down_proj.weight": (h, w)}
            continue
        moe = f"{p}.block_sparse_moe"
        out[f"{moe}.gate.weight"] = (shape.experts, h)
        for e in range(shape.experts):
            out |= {f"{moe}.experts.{e}.{n}.weight": size for n, size in (("w1", (w, h)), ("w3", (w, h)), ("w2", (h, w)))}
    return out | {"model.norm.weight": (h,), "lm_head.weight": (shape.vocab, h)}


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer
