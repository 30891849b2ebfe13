"""Every family against transformers: states after each block, final norm and logits, in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import (
    GEMMA2,
    GPT,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    LENGTH,
    NO_DIM,
    ORACLES,
    QWEN3_MOE,
    SIZES,
    VOCAB,
    Oracle,
    direct,
    llama,
    mapped,
    renamed,
    swiglu_fused,
)
from safetensors.torch import load_file, save_file
from tiny_models import edit_config
from torch import Tensor

from exl2ray.formats.hf import SourceModel
from exl2ray.model import half
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
def test_family_matches_transformers(name: str, oracle: Callable[[str], Oracle]) -> None:
    compare(oracle(name))


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM"])
def test_family_matches_with_its_own_state_dtype(name: str, oracle: Callable[[str], Oracle]) -> None:
    """States rounded to float16 (Gemma 2: float32) between modules, as in a conversion on the CPU."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    source = SourceModel(oracle(name).path)
    spec = load_spec(source)
    x = ids
    for module in spec.modules:
        x = load_block(spec, module, source, "cpu", torch.float32).forward(x)
        if module.kind not in ("norm", "head"):
            assert x.dtype == (torch.float32 if name == "Gemma2ForCausalLM" else torch.float16)
    assert relative_error(x, oracle(name).run(ids)[1]) < 5e-3


@pytest.mark.parametrize("name", ORACLES)
def test_float16_compute(name: str, oracle: Callable[[str], Oracle]) -> None:
    """The dtypes of a GPU run: float16 linears, states in the family's dtype."""
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    source = SourceModel(oracle(name).path)
    spec = load_spec(source)
    x = ids
    for module in spec.modules:
        block = load_block(spec, module, source, "cpu", torch.float16)
        assert all(w.dtype == torch.float16 for w in (*block.weights.values(), *block.biases.values()))
        x = block.forward(x)
    assert x.dtype == torch.float32
    # A token near a tie may go to other experts than in float32.
    assert relative_error(x, oracle(name).run(ids)[1]) < (0.1 if spec.arch.moe else 0.01)


MIXED = ["full_attention", "sliding_attention"]
VARIANTS: dict[str, Callable[[Path], Oracle]] = {
    "llama biases": llama(attention_bias=True, mlp_bias=True),
    "llama tied": llama(tie_word_embeddings=True),
    "llama one key/value head": llama(num_key_value_heads=1),
    "llama no sharing": llama(num_key_value_heads=HEADS),
    "mistral window": direct("MistralConfig", "MistralForCausalLM", **SIZES, sliding_window=5),
    "mistral, layer types": direct("MistralConfig", "MistralForCausalLM", **SIZES, sliding_window=5, layer_types=MIXED),
    "qwen3 moe windows": direct(
        "Qwen3MoeConfig", "Qwen3MoeForCausalLM", **QWEN3_MOE, use_sliding_window=True, sliding_window=5, layer_types=MIXED
    ),
    "qwen3 windows": direct(
        "Qwen3Config", "Qwen3ForCausalLM", **SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma tied": direct("GemmaConfig", "GemmaForCausalLM", **{**SIZES, "tie_word_embeddings": True}),
    "gemma2 with both softcaps off": direct(
        "Gemma2Config", "Gemma2ForCausalLM", **GEMMA2, attn_logit_softcapping=None, final_logit_softcapping=None
    ),
    "cohere q/k norm": direct("CohereConfig", "CohereForCausalLM", **NO_DIM, use_qk_norm=True, attention_bias=True),
    "glm4 without bias": direct("Glm4Config", "Glm4ForCausalLM", **SIZES, partial_rotary_factor=1.0),
    "granite biases": direct(
        "GraniteConfig", "GraniteForCausalLM", **NO_DIM, residual_multiplier=0.4, attention_bias=True, mlp_bias=True
    ),
    "index without norm_head": mapped(llama(), "IndexForCausalLM", renamed(), norm_head=0),
    "gpt2 without prefix": mapped(
        direct("GPT2Config", "GPT2LMHeadModel", **GPT), "GPT2LMHeadModel", renamed(("transformer.", ""))
    ),
    "gpt2 default width": direct("GPT2Config", "GPT2LMHeadModel", **{**GPT, "n_inner": None}),
    "swiglu-fused llama": mapped(llama(), "LlamaForCausalLM", swiglu_fused),
    "gemma3 with the names of transformers in memory": mapped(
        ORACLES["Gemma3ForConditionalGeneration"],
        "Gemma3ForConditionalGeneration",
        renamed(("language_model.model.", "model.language_model."), ("vision_tower.", "model.vision_tower.")),
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_matches_transformers(name: str, tmp_path: Path) -> None:
    compare(VARIANTS[name](tmp_path))


def test_a_head_that_lies_outside_of_the_language_model(tmp_path: Path) -> None:
    """The rest has the names of the published checkpoints, in which the head is the embedding."""
    model = type(ORACLES["Gemma3ForConditionalGeneration"](tmp_path).model)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(3)) * HIDDEN**-0.5
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    compare(Oracle(model.from_pretrained(tmp_path, attn_implementation="eager", dtype=torch.float32).eval(), tmp_path))


def test_long_rows_of_softcapped_attention(oracle: Callable[[str], Oracle], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several query chunks, the last one short; windows across chunk borders."""
    monkeypatch.setattr(half, "QUERY_CHUNK", 8)
    compare(oracle("Gemma2ForCausalLM"), length=29)


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("old_spelling", [False, True])
def test_rope_scaling(name: str, old_spelling: bool, tmp_path: Path) -> None:
    oracle = llama(rope_parameters=ROPES[name])(tmp_path)
    if old_spelling:
        scaling = {k: v for k, v in ROPES[name].items() if k not in ("rope_theta", "rope_type")}
        theta = ROPES[name]["rope_theta"]
        edit_config(tmp_path, rope_parameters=None, rope_theta=theta, rope_scaling={"type": name, **scaling})
    compare(oracle)


def test_yarn_is_computed_from_the_configured_length(tmp_path: Path) -> None:
    """Transformers uses the original length where the loader uses the configured one: give it ours (128)."""
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    oracle = llama(rope_parameters=scaling)(tmp_path)
    edit_config(tmp_path, rope_parameters={**scaling, "original_max_position_embeddings": 64})
    compare(oracle)


def test_yarn_is_inactive_up_to_the_original_length(tmp_path: Path) -> None:
    oracle = llama()(tmp_path)
    scaling = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
    edit_config(tmp_path, rope_parameters=scaling)
    compare(oracle)


PHI3_LONG, PHI3_SHORT = [1.0 + 0.5 * i for i in range(8)], [1.0 + 0.1 * i for i in range(8)]


@pytest.mark.parametrize("kind", ["longrope", "su"])
def test_longrope_takes_long_factors_when_the_configured_length_is_longer(kind: str, tmp_path: Path) -> None:
    """Rows of 13 tokens are longer than the original length 8, so transformers takes the long factors, too."""
    scaling = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "long_factor": PHI3_LONG,
        "short_factor": PHI3_SHORT,
        "original_max_position_embeddings": 8,
    }
    sizes = {**NO_DIM, "rope_parameters": scaling, "original_max_position_embeddings": 8}
    oracle = direct("Phi3Config", "Phi3ForCausalLM", **sizes)(tmp_path)
    old = {"type": kind, "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT}
    edit_config(tmp_path, rope_parameters=None, rope_theta=1e4, rope_scaling=old, original_max_position_embeddings=8)
    compare(oracle)


def test_longrope_takes_short_factors_otherwise(tmp_path: Path) -> None:
    scaling = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": PHI3_LONG, "short_factor": PHI3_SHORT}
    sizes = {**NO_DIM, "rope_parameters": scaling, "original_max_position_embeddings": 128}
    compare(direct("Phi3Config", "Phi3ForCausalLM", **sizes)(tmp_path))


def test_partial_rotation(tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    compare(direct("Phi3Config", "Phi3ForCausalLM", **NO_DIM, rope_parameters=rope)(tmp_path))


def test_ntk_alpha_raises_the_base(tmp_path: Path) -> None:
    theta = 1e4 * 2.5 ** (HEAD_DIM / (HEAD_DIM - 2))
    oracle = llama(rope_parameters={"rope_type": "default", "rope_theta": theta})(tmp_path)
    edit_config(tmp_path, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    compare(oracle, rope_alpha=2.5)


def test_rope_scale_replaces_the_linear_factor(tmp_path: Path) -> None:
    oracle = llama(rope_parameters=ROPES["linear"])(tmp_path)
    edit_config(tmp_path, rope_parameters={**ROPES["linear"], "factor": 2.0})
    compare(oracle, rope_scale=4.0)


def test_rope_scale_leaves_the_sliding_layers_of_gemma3_alone(oracle: Callable[[str], Oracle]) -> None:
    source = SourceModel(oracle("Gemma3ForConditionalGeneration").path)
    plain, scaled = load_spec(source).hyper, load_spec(source, rope_scale=16.0).hyper
    assert scaled.layer_rope(0) == plain.layer_rope(0)
    full, stretched = plain.layer_rope(1), scaled.layer_rope(1)
    assert full is not None
    assert stretched is not None
    assert stretched.inv_freq == pytest.approx([f / 2 for f in full.inv_freq])  # factor 8 became 16
