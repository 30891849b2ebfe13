"""A small EXL2 directory with random content, built by our own writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exl2_numpy import pack_linear_numpy

from exl2ray.formats.layout import GroupLayout, LinearShape, pad32
from exl2ray.formats.shards import TensorEntry, output_config, write_config, write_shards
from exl2ray.formats.side_files import copy_side_files

HIDDEN, WIDTH, VOCAB, LAYERS = 64, 96, 100, 2


@dataclass
class TinyExl2:
    """Tensors and config of a two-layer Llama; change them, then ``write``."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    shapes: dict[str, LinearShape]
    side_files: dict[str, str] = field(default_factory=lambda: {"tokenizer.json": "{}"})

    def write(self, directory: Path, limit_bytes: int = 0) -> Path:
        source = directory.parent / f"{directory.name}-source"
        source.mkdir()
        for name, text in self.side_files.items():
            (source / name).write_text(text)
        write_shards(directory, [TensorEntry.of(n, t) for n, t in self.tensors.items()], limit_bytes)
        copy_side_files(source, directory)
        write_config(directory, self.config)
        return directory

    def linear(self, key: str, shape: LinearShape, seed: int, identity: bool = False) -> None:
        """Add a quantised linear with random content."""
        rng = np.random.default_rng(seed)
        layout = GroupLayout((4, 3), (32, shape.in_features - 32))
        columns = pad32(shape.out_features)
        limits = np.repeat([16, 8], layout.rows)
        p = pack_linear_numpy(
            key,
            rng.integers(0, limits[:, None], (shape.in_features, columns)).astype(np.uint8),
            rng.integers(1, 17, (2, columns)),
            np.array([0.01, 0.02], dtype=np.float16),
            np.arange(shape.in_features) if identity else rng.permutation(shape.in_features),
            layout,
            np.zeros(columns, dtype=np.float16) if shape.has_bias else None,
        )
        self.tensors.update(p.tensors())
        self.shapes[key] = shape

    def drop(self, prefix: str) -> None:
        """Remove all tensors whose name starts with ``prefix``."""
        self.tensors = {n: t for n, t in self.tensors.items() if not n.startswith(prefix)}


def llama() -> TinyExl2:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "vocab_size": VOCAB,
    }
    model = TinyExl2(output_config(config, 3.5, 6, 10, 512, None), {}, {})
    half = {"dtype": torch.float16}
    model.tensors["model.embed_tokens.weight"] = torch.ones(VOCAB, HIDDEN, **half)
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            model.tensors[f"{layer}.{norm}.weight"] = torch.ones(HIDDEN, **half)
        for j, role in enumerate("qkvo"):
            model.linear(f"{layer}.self_attn.{role}_proj", LinearShape(HIDDEN, HIDDEN), 10 * i + j)
        for j, role in enumerate(("gate", "up")):
            model.linear(f"{layer}.mlp.{role}_proj", LinearShape(HIDDEN, WIDTH), 10 * i + j + 4)
        model.linear(f"{layer}.mlp.down_proj", LinearShape(WIDTH, HIDDEN), 10 * i + 6)
    model.tensors["model.norm.weight"] = torch.ones(HIDDEN, **half)
    model.linear("lm_head", LinearShape(HIDDEN, VOCAB), 99)
    return model


def mixtral() -> TinyExl2:
    model = llama()
    model.config = json.loads(json.dumps(model.config))
    model.config.update(architectures=["MixtralForCausalLM"], num_local_experts=3, num_experts_per_tok=2)
    for i in range(LAYERS):
        model.drop(f"model.layers.{i}.mlp")
        block = f"model.layers.{i}.block_sparse_moe"
        model.tensors[f"{block}.gate.weight"] = torch.ones(3, HIDDEN, dtype=torch.float16)
        for e in range(3):
            for j, (role, shape) in enumerate(
                {"w1": (HIDDEN, WIDTH), "w3": (HIDDEN, WIDTH), "w2": (WIDTH, HIDDEN)}.items()
            ):
                model.linear(f"{block}.experts.{e}.{role}", LinearShape(*shape), 100 * i + 10 * e + j)
    model.shapes = {k: s for k, s in model.shapes.items() if ".mlp." not in k}
    return model


@pytest.fixture
def tiny_llama() -> TinyExl2:
    return llama()


@pytest.fixture
def tiny_mixtral() -> TinyExl2:
    return mixtral()


@pytest.fixture
def build() -> dict[str, Callable[[], TinyExl2]]:
    return {"llama": llama, "mixtral": mixtral}
