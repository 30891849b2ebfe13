"""Every family against transformers: states after each block, final norm and logits, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import HEADS, LENGTH, ORACLES, SIZES, VOCAB, Oracle, direct, llama
from torch import Tensor

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import load_block
from exl2ray.model.table import ARCHITECTURES

TOLERANCE = 1e-4


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def run_blocks(path: Path, ids: Tensor, **overrides: Any) -> tuple[list[Tensor], Tensor]:
    """Our states in the order of ``Oracle.run``."""
    source = SourceModel(path)
    spec = load_spec(source, **overrides)
    x, states = ids, []
    for module in spec.modules:
        block = load_block(spec, module, source, "cpu", torch.float32, state_dtype=torch.float32)
        x = block.forward(x)
        if module.kind in ("mlp", "moe", "parallel", "norm") or (module.kind == "embedding"):
            states.append(x)
        if module.kind == "positions":
            states[-1] = x
    return states, x


def test_oracles_cover_the_table() -> None:
    assert set(ORACLES) == set(ARCHITECTURES)


def compare(oracle: Oracle, length: int = LENGTH, **overrides: Any) -> None:
    ids = torch.randint(3, VOCAB, (2, length), generator=torch.Generator().manual_seed(1))
    expected, logits = oracle.run(ids)
    states, ours = run_blocks(oracle.path, ids, **overrides)
    assert len(states) == len(expected)
    for step, (a, b) in enumerate(zip(states, expected, strict=True)):
        assert relative_error(a, b) < TOLERANCE, f"step {step}"
    assert ours.shape == logits.shape
    assert relative_error(ours, logits) < TOLERANCE


@pytest.mark.parametrize("name", ORACLES)
def test_family_matches_transformers(name: str, tmp_path: Path) -> None:
    compare(ORACLES[name](tmp_path))


VARIANTS: dict[str, Callable[[Path], Oracle]] = {
    "llama biases": llama(attention_bias=True, mlp_bias=True),
    "llama tied": llama(tie_word_embeddings=True),
    "llama linear": llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
    "llama3": llama(
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        }
    ),
    "llama one key/value head": llama(num_key_value_heads=1),
    "llama no sharing": llama(num_key_value_heads=HEADS),
    "mistral window": direct("MistralConfig", "MistralForCausalLM", **SIZES, sliding_window=5),
    "qwen3 windows": direct(
        "Qwen3Config", "Qwen3ForCausalLM", **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_matches_transformers(name: str, tmp_path: Path) -> None:
    compare(VARIANTS[name](tmp_path))
