"""Small models made here: a Llama with a vocabulary that is no multiple of 32, as fp16 and as EXL2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exl2_numpy import dequantize_numpy, pack_linear_numpy
from safetensors.torch import load_file, save_file
from tiny_models import byte_tokenizer
from tokenizers import Tokenizer

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.layout import GroupLayout, pad32

VOCAB, HIDDEN, WIDE, LAYERS = 260, 64, 96, 2
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, 32),
    "self_attn.v_proj": (HIDDEN, 32),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, WIDE),
    "mlp.up_proj": (HIDDEN, WIDE),
    "mlp.down_proj": (WIDE, HIDDEN),
}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXL2 = {
    "quantization_config": {
        "quant_method": "exl2", "version": "0.3.2", "bits": 4.0, "head_bits": 4,
        "calibration": {"rows": 1, "length": 64, "dataset": "(default)"},
    }
}  # fmt: skip


def write_model(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({**CONFIG, **config}), encoding="utf-8")
    return directory


def random_packed(key: str, k: int, n: int, rng: np.random.Generator) -> PackedLinear:
    """Random integers in groups of 5 and 4 bits, of about the size of trained weights; padding columns are not zero."""
    layout = GroupLayout((5, 4), (32, k - 32))
    columns = pad32(n)
    values = np.concatenate([rng.integers(0, 32, (32, columns)), rng.integers(0, 16, (k - 32, columns))])
    codes = rng.integers(1, 17, (2, columns))
    scale_max = np.array([0.02, 0.04], dtype=np.float16)
    return pack_linear_numpy(key, values.astype(np.uint8), codes, scale_max, rng.permutation(k), layout)


def plain_tensors(rng: np.random.Generator) -> dict[str, torch.Tensor]:
    def norm() -> torch.Tensor:
        return torch.from_numpy(rng.uniform(0.5, 1.5, HIDDEN)).half()

    out = {"model.embed_tokens.weight": torch.from_numpy(rng.standard_normal((VOCAB, HIDDEN))).half()}
    for layer in range(LAYERS):
        out[f"model.layers.{layer}.input_layernorm.weight"] = norm()
        out[f"model.layers.{layer}.post_attention_layernorm.weight"] = norm()
    out["model.norm.weight"] = norm()
    return out


@pytest.fixture(scope="session")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(fp16 directory, EXL2 directory) with the very same weights."""
    rng = np.random.default_rng(3)
    root = tmp_path_factory.mktemp("twins")
    plain = plain_tensors(rng)
    keys = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LINEARS.items()}
    packed = [random_packed(key, k, n, rng) for key, (k, n) in {**keys, "lm_head": (HIDDEN, VOCAB)}.items()]
    widths = {**keys, "lm_head": (HIDDEN, VOCAB)}
    floats = {f"{p.key}.weight": torch.from_numpy(dequantize_numpy(p)[:, : widths[p.key][1]].T.copy()) for p in packed}
    quantized = {name: tensor for p in packed for name, tensor in p.tensors().items()}
    fp16 = write_model(root / "fp16", {**plain, **floats})
    return fp16, write_model(root / "exl2", {**plain, **quantized}, **EXL2)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory, twins: tuple[Path, Path]) -> Path:
    """The fp16 twin with noise on its linears."""
    generator = torch.Generator().manual_seed(5)
    tensors = load_file(twins[0] / "model.safetensors")
    for name, tensor in tensors.items():
        if "proj" in name:
            noise = torch.randn(tensor.shape, generator=generator) * 0.1 * tensor.float().std()
            tensors[name] = (tensor.float() + noise).half()
    return write_model(tmp_path_factory.mktemp("other"), tensors)


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """(5, 24) token ids of the small models."""
    return torch.randint(0, VOCAB, (5, 24), generator=torch.Generator().manual_seed(11))


@pytest.fixture(scope="session")
def bytes_tokenizer() -> Tokenizer:
    return byte_tokenizer()
