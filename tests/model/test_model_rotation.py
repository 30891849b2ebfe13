"""--rotate: the rotated model computes the same function, with every norm weight folded and every tensor changed.

The models of tests/oracles.py have random norm weights and biases, so a norm that is not folded, a bias that is not rotated
or a tensor on the wrong side of R shows as an error of order 1.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import LENGTH, NO_DIM, ORACLES, SIZES, VOCAB, Oracle, direct, llama, swiglu_fused
from oracles import mapped as mapped_oracle
from safetensors.torch import load_file, save_file
from torch import Tensor

from exl2ray.errors import SourceError, UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import load_block
from exl2ray.model.rotated import WRITERS, rotated
from exl2ray.model.rotation import Rotation
from exl2ray.model.spec import ModelSpec
from exl2ray.model.table import ARCHITECTURES
from exl2ray.model.weights import output_tensors, read_linear, read_plain

TOLERANCE = 1e-5  # relative error of float32 logits; 2 layers of hidden size 96
IDS = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
SUPPORTED = {
    "LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM", "GemmaForCausalLM", "Phi3ForCausalLM", "InternLM2ForCausalLM", "GraniteForCausalLM",
    "YiForCausalLM", "IndexForCausalLM", "MiniCPMForCausalLM", "GemmoeForCausalLM",
}  # fmt: skip
LAYER_NORM, POST_NORM, VISION = "LayerNorm subtracts the mean", "before they are added to the residual stream", "vision tower"
REFUSED = {
    **dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM", "Starcoder2ForCausalLM", "DbrxForCausalLM"), LAYER_NORM),
    **dict.fromkeys(("GPTBigCodeForCausalLM", "GPT2LMHeadModel", "OrionForCausalLM"), LAYER_NORM),
    **dict.fromkeys(("Gemma2ForCausalLM", "Glm4ForCausalLM"), POST_NORM),
    **dict.fromkeys(("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), POST_NORM),
    **dict.fromkeys(("Mistral3ForConditionalGeneration", "LlavaForConditionalGeneration"), VISION),
    **dict.fromkeys(("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"), VISION),
}
GRANITE = {**NO_DIM, "attention_bias": True, "mlp_bias": True, "residual_multiplier": 0.4, "logits_scaling": 3.0}
VARIANTS: dict[str, Callable[[Path], Oracle]] = {
    "biases": llama(attention_bias=True, mlp_bias=True),
    "tied": llama(tie_word_embeddings=True),
    "multipliers and biases": direct("GraniteConfig", "GraniteForCausalLM", **GRANITE, embedding_multiplier=5.0),
    "swiglu-fused": mapped_oracle(llama(), "LlamaForCausalLM", swiglu_fused),
    "power of two": llama(hidden_size=64),
    "gemma tied": direct("GemmaConfig", "GemmaForCausalLM", **{**SIZES, "tie_word_embeddings": True}),
}


def opened(path: Path) -> tuple[SourceModel, ModelSpec]:
    source = SourceModel(path)
    return source, load_spec(source)


def states(spec: ModelSpec, source: SourceModel, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """The residual stream after each module, then normed states and logits; states are float32."""
    x, out = IDS, []
    for module in spec.modules:
        x = load_block(spec, module, source, "cpu", dtype, state_dtype=torch.float32).forward(x)
        out.append(x.float())
    return out


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def check(path: Path) -> None:
    """Logits as they were; states of every module rotated, which no unrotated model has."""
    source, spec = opened(path)
    turned = rotated(spec)
    plain, other = states(spec, source), states(turned, source)
    assert relative_error(other[-1], plain[-1]) < TOLERANCE
    assert turned.rotation is not None
    for a, b in zip(other[:-2], plain[:-2], strict=True):
        assert relative_error(a, turned.rotation.rows(b.flatten(0, 1)).view(b.shape)) < TOLERANCE
        assert relative_error(a, b) > 0.5
    assert relative_error(states(turned, source, torch.float16)[-1], plain[-1]) < (0.1 if spec.arch.moe else 0.01)


def test_every_family_is_rotated_or_refused() -> None:
    assert SUPPORTED | set(REFUSED) == set(ARCHITECTURES) == set(ORACLES)
    assert not SUPPORTED & set(REFUSED)


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_rotated_family_computes_the_same_function(name: str, oracle: Callable[[str], Oracle]) -> None:
    check(oracle(name).path)


@pytest.mark.parametrize("name", VARIANTS)
def test_rotated_variant_computes_the_same_function(name: str, tmp_path: Path) -> None:
    check(VARIANTS[name](tmp_path).path)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_families_that_no_rotation_fits_are_refused(name: str, oracle: Callable[[str], Oracle]) -> None:
    _, spec = opened(oracle(name).path)
    with pytest.raises(UsageError, match=REFUSED[name]) as caught:
        rotated(spec)
    assert f"--rotate: {name} cannot be rotated" in caught.value.message


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GemmaForCausalLM", "MixtralForCausalLM"])
def test_stored_tensors(name: str, oracle: Callable[[str], Oracle]) -> None:
    """Norms are neutral as the family stores them; all that touches the residual stream differs, nothing else does."""
    source, spec = opened(oracle(name).path)
    turned = rotated(spec)
    for before, after in zip(output_tensors(spec), output_tensors(turned), strict=True):
        assert before.name == after.name
        if after.plain is not None and before.plain is not None:
            old, new = read_plain(spec, before.plain, source), read_plain(turned, after.plain, source)
            assert new.dtype == old.dtype == torch.float16
            assert new.shape == old.shape
            if after.plain.role == "norm":
                assert torch.equal(new, torch.full_like(new, 0.0 if name.startswith("Gemma") else 1.0))
            else:
                assert relative_error(new.float(), old.float()) > 0.5
        elif after.linear is not None and before.linear is not None:
            old, new = (read_linear(s, e.linear, source)[0] for s, e in ((spec, before), (turned, after)) if e.linear)
            assert new.shape == old.shape
            assert new.dtype == torch.float32
            assert relative_error(new, old.float()) > 0.5
            if after.linear.role in WRITERS:
                torch.testing.assert_close(new.norm(dim=1), old.float().norm(dim=1))  # rows times R


@pytest.mark.parametrize("size", [32, 96, 224, 128, 4096])
def test_rotation_is_orthogonal_and_mixes_everything(size: int) -> None:
    r = Rotation(size, 3).rows(torch.eye(size))
    assert float((r @ r.t() - torch.eye(size)).abs().max()) < 2e-6 * size**0.5
    odd = size // (size & -size)
    if odd == 1:
        assert torch.allclose(r.abs(), torch.full_like(r, size**-0.5))
    assert float(r.abs().max()) <= (size / odd) ** -0.5 + 1e-6
    assert not torch.equal(r, Rotation(size, 4).rows(torch.eye(size)))
    assert torch.equal(r, Rotation(size, 3).rows(torch.eye(size)))


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([32, 96, 160]), st.integers(1, 40), st.sampled_from([torch.float16, torch.bfloat16]), st.booleans())
def test_rows_are_multiplied_by_the_matrix(size: int, count: int, dtype: torch.dtype, view: bool) -> None:
    g = torch.Generator().manual_seed(count)
    x = torch.randn(size, count, generator=g).to(dtype).t() if view else torch.randn(count, size, generator=g).to(dtype)
    scale = torch.randn(size, generator=g)
    before, rotation = x.clone(), Rotation(size)
    found = rotation.rows(x, scale, dtype=torch.float64)
    wanted = (x.double() * scale.double()) @ rotation.rows(torch.eye(size)).double()
    assert torch.equal(x, before)
    assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max() + 1)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))
    whole = Rotation(96).rows(x)
    monkeypatch.setattr("exl2ray.model.rotation.CPU_CHUNK_BYTES", 7 * 4 * 96)
    assert float((Rotation(96).rows(x) - whole).abs().max()) < 1e-6


def test_weights_that_grow_beyond_float16_are_refused(tmp_path: Path) -> None:
    path = llama()(tmp_path).path
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"].fill_(6e4)
    tensors["model.layers.0.self_attn.q_proj.weight"].fill_(6e4)
    save_file(tensors, path / "model.safetensors")
    source, spec = opened(path)
    q = rotated(spec).modules[1].linear("q_proj")
    with pytest.raises(SourceError, match=r"layers\.0\.self_attn\.q_proj\.weight, rotated, has .* beyond float16"):
        read_linear(rotated(spec), q, source)
