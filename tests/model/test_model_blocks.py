"""Blocks stage by stage: halves, captures, replaced weights, experts, embeddings, and the check of states."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import HIDDEN, VOCAB, WIDE, Oracle
from torch import Tensor

from exl2ray.errors import CalibrationError, NumericError
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import Block, MoeBlock, check_states, load_block
from exl2ray.model.moe import route
from exl2ray.model.rope import RotaryTable, resolve_rope

ROWS, LENGTH = 3, 7


def open_block(path: Path, kind: str) -> Any:
    """First module of a kind, in float32."""
    source = SourceModel(path)
    spec = load_spec(source)
    module = next(m for m in spec.modules if m.kind == kind)
    return load_block(spec, module, source, "cpu", torch.float32, state_dtype=torch.float32)


def states(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(seed))


class Captured(dict[str, Tensor]):
    def __call__(self, group: str, inputs: Tensor) -> None:
        assert group not in self
        assert inputs.dim() == 2
        self[group] = inputs


HALVES = [
    ("LlamaForCausalLM", "attention"),
    ("LlamaForCausalLM", "mlp"),
    ("Qwen2ForCausalLM", "attention"),
    ("Gemma2ForCausalLM", "attention"),
    ("Gemma2ForCausalLM", "mlp"),
    ("GPT2LMHeadModel", "mlp"),
    ("GraniteForCausalLM", "mlp"),
]


@pytest.mark.parametrize(("name", "kind"), HALVES)
def test_stages_compose_to_the_forward_pass(name: str, kind: str, oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle(name).path, kind)
    x, captured = states(), Captured()
    y = block.forward(x, captured)
    (half,) = block.halves
    n = half.pre(x)
    m = half.mid({spec.role: half.linear(spec, n) for spec in half.first})
    assert torch.equal(half.post(x, half.linear(half.second.key, m)), y)
    assert torch.equal(captured[half.first[0].input_group], n.flatten(0, 1))
    assert torch.equal(captured[half.second.input_group], m.flatten(0, 1))
    assert set(captured) == {spec.input_group for spec in block.module.linears}


def test_mid_leaves_its_inputs_alone(oracle: Callable[[str], Oracle]) -> None:
    """Scoring many options reuses the outputs of the first linears."""
    for name, kind in HALVES:
        block = open_block(oracle(name).path, kind)
        half = block.halves[0]
        outs = {spec.role: half.linear(spec, half.pre(states())) for spec in half.first}
        before = {k: v.clone() for k, v in outs.items()}
        first, second = half.mid(outs), half.mid(outs)
        assert torch.equal(first, second)
        assert all(torch.equal(outs[k], before[k]) for k in outs)


def test_parallel_block_adds_two_branches(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("CohereForCausalLM").path, "parallel")
    x, captured = states(), Captured()
    y = block.forward(x, captured)
    assert set(captured) == {"qkv", "o", "down"}
    total = x
    for half in block.halves:
        n = half.pre(x)
        m = half.mid({spec.role: half.linear(spec, n) for spec in half.first})
        total = total + half.post(x, half.linear(half.second, m))
    assert torch.equal(total, y)


SOME = [*HALVES, ("CohereForCausalLM", "parallel"), ("MixtralForCausalLM", "moe")]


@pytest.mark.parametrize(("name", "kind"), SOME)
def test_states_of_some_rows_alone(name: str, kind: str, oracle: Callable[[str], Oracle]) -> None:
    """The last product of halves is of these rows; what is captured is of all, bit for bit."""
    block = open_block(oracle(name).path, kind)
    x, of_all, of_some = states(), Captured(), Captured()
    y = block.forward(x, of_all)
    products: list[tuple[str, int]] = []
    block.bank.watch = lambda key, x, out: products.append((key, out[..., 0].numel()))
    found = block.forward_some(x, slice(1, None, 2), of_some)
    assert found.shape == (1, LENGTH, HIDDEN)
    assert torch.allclose(found, y[1::2], atol=1e-5)
    assert of_all.keys() == of_some.keys()
    assert all(torch.equal(t, of_some[group]) for group, t in of_all.items())
    for half in block.halves[:1]:
        assert sum(n for key, n in products if key == half.second.key) == LENGTH
    assert block.forward_some(x, slice(5, None, 4)).shape == (0, LENGTH, HIDDEN)


def test_rows_are_independent(oracle: Callable[[str], Oracle]) -> None:
    for name, kind in (*HALVES, ("MixtralForCausalLM", "moe"), ("CohereForCausalLM", "parallel")):
        block = open_block(oracle(name).path, kind)
        x = states()
        together = block.forward(x)
        alone = torch.cat([block.forward(x[r : r + 1]) for r in range(ROWS)])
        assert torch.allclose(together, alone, atol=1e-5)


def test_attention_is_causal(oracle: Callable[[str], Oracle]) -> None:
    for name in ("LlamaForCausalLM", "Gemma2ForCausalLM", "GPTBigCodeForCausalLM"):
        block = open_block(oracle(name).path, "attention")
        x = states()
        changed = x.clone()
        changed[:, -1] += 1
        assert torch.equal(block.forward(x)[:, :-1], block.forward(changed)[:, :-1])


def test_replaced_weight_may_be_padded(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("LlamaForCausalLM").path, "head")
    assert block.weights["lm_head"].shape == (HIDDEN, VOCAB)
    new = torch.randn(HIDDEN, VOCAB)
    x = states()
    candidate = block.bank.linear("lm_head", x, torch.nn.functional.pad(new, (0, 29)))
    block.set_weight("lm_head", torch.nn.functional.pad(new, (0, 29)))
    assert torch.equal(block.weights["lm_head"], new)
    assert torch.equal(block.forward(x), candidate)
    assert torch.allclose(candidate, x @ new, atol=1e-4)
    with pytest.raises(NumericError, match=r"lm_head has shape \(96, 260\), expected \(96, 259\)"):
        block.set_weight("lm_head", torch.zeros(HIDDEN, 260))


def test_gated_product_is_clamped_to_float16(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("LlamaForCausalLM").path, "mlp")
    huge = torch.full((1, 1, WIDE), 1e4)
    assert block.halves[0].mid({"gate_proj": huge, "up_proj": -huge}).min() == -65504


# ---- experts ------------------------------------------------------------------------------------------------------


def test_experts_equal_a_loop_over_tokens(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("MixtralForCausalLM").path, "moe")
    assert isinstance(block, MoeBlock)
    x, captured = states(), Captured()
    y = block.forward(x, captured)
    h = block.pre(x).flatten(0, 1)
    routing = block.route(h)
    expected = torch.zeros_like(h)
    for t in range(len(h)):
        for choice, weight in zip(routing.experts[t].tolist(), routing.weights[t], strict=True):
            w1, w3, w2 = (block.weights[block.module.linear(r, choice).key] for r in ("w1", "w3", "w2"))
            expected[t] += weight * ((torch.nn.functional.silu(h[t] @ w1) * (h[t] @ w3)) @ w2)
    assert torch.allclose(block.forward_experts(h, routing), expected, atol=1e-5)
    assert torch.allclose(y, x + expected.view_as(x), atol=1e-5)
    assert sum(routing.counts) == len(h) * 2
    for e, count in enumerate(routing.counts):
        assert captured[f"w13.{e}"].shape == (count, HIDDEN)
        assert captured[f"w2.{e}"].shape[0] == count


def test_candidate_weights_of_experts(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("Qwen3MoeForCausalLM").path, "moe")
    h = block.pre(states()).flatten(0, 1)
    routing = block.route(h)
    candidates = {k: torch.randn_like(w) for k, w in block.weights.items()}
    scored = block.forward_experts(h, routing, candidates)
    for key, weight in candidates.items():
        block.set_weight(key, weight)
    assert torch.equal(block.forward_experts(h, routing), scored)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), experts=st.integers(1, 9), seed=st.integers(0, 999), data=st.data())
def test_routing_sends_every_choice_somewhere_once(tokens: int, experts: int, seed: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    h, router = (torch.randn(n, 8, generator=generator) for n in (tokens, experts))
    r = route(router, h, k)
    assert torch.allclose(r.weights.sum(1), torch.ones(tokens))
    assert torch.equal(r.order.sort().values, torch.arange(tokens * k))
    assert torch.equal(r.order[r.place.flatten()], torch.arange(tokens * k))
    by_expert = r.experts.flatten()[r.order]
    assert torch.equal(by_expert, by_expert.sort().values)
    assert list(r.counts) == [int((r.experts == e).sum()) for e in range(experts)]
    start = 0
    for count in r.counts:  # stable: the tokens of an expert keep their order
        assert torch.equal(r.tokens[start : start + count], r.tokens[start : start + count].sort().values)
        start += count


# ---- embeddings and positions -------------------------------------------------------------------------------------


def test_ids_outside_the_table_count_as_zero(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("LlamaForCausalLM").path, "embedding")
    strange, zero = torch.tensor([[5, VOCAB, VOCAB + 7, -1, -9]]), torch.tensor([[5, 0, 0, 0, 0]])
    assert torch.equal(block.forward(strange), block.forward(zero))


def test_noise_rows_follow_the_statistics_of_the_others(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("Qwen2VLForConditionalGeneration").path, "embedding")
    ids = torch.randint(0, VOCAB, (6, 200), generator=torch.Generator().manual_seed(2))
    text = block.forward(ids)
    ids[4:] = -1
    mixed = block.forward(ids)
    assert torch.equal(mixed[:4], text[:4])
    std, mean = torch.std_mean(text[:4])
    assert mixed[4:].mean() == pytest.approx(float(mean), abs=0.02)
    assert mixed[4:].std() == pytest.approx(float(std), rel=0.02)
    assert not torch.equal(mixed[4], mixed[5])
    assert torch.equal(block.forward(ids), mixed)
    with pytest.raises(CalibrationError, match="noise rows"):
        block.forward(ids[4:])


def test_rows_longer_than_learned_positions_are_refused(oracle: Callable[[str], Oracle]) -> None:
    block = open_block(oracle("GPT2LMHeadModel").path, "positions")
    with pytest.raises(CalibrationError, match="rows of 129 tokens, but the model has 128"):
        block.forward(torch.zeros(1, 129, HIDDEN))


@settings(max_examples=20, deadline=None)
@given(style=st.sampled_from(["neox", "gptj"]), partial=st.sampled_from([0.5, 1.0]), seed=st.integers(0, 99))
def test_rotation_keeps_norms_and_depends_on_distance_only(style: Any, partial: float, seed: int) -> None:
    rotary = RotaryTable(resolve_rope(style, 16, 1e4, None, 64, partial), torch.device("cpu"))
    q, k = torch.randn(2, 16, generator=torch.Generator().manual_seed(seed))
    many = rotary.rotate(torch.stack((q, k)).expand(1, 9, 2, 16))[0]  # (9 positions, 2, 16)
    assert torch.allclose(many.norm(dim=-1), torch.stack((q, k)).norm(dim=-1).expand(9, 2), atol=1e-4)
    scores = many[:, 0] @ many[:, 1].t()
    for distance in range(8):
        diagonal = scores.diagonal(-distance)
        assert torch.allclose(diagonal, diagonal[0].expand_as(diagonal), atol=1e-3)


# ---- states -------------------------------------------------------------------------------------------------------


def test_few_infinities_are_clamped_in_place() -> None:
    x = torch.zeros(100, 100, dtype=torch.float16)
    x[0, :49] = float("inf")
    x[1, 0] = float("-inf")
    x[2, 0] = 7
    with pytest.raises(NumericError, match="layer 3: 50 of 10000 values are infinite"):
        check_states(x, "layer 3")
    x[0, 0] = 0
    assert check_states(x, "layer 3") == 49
    assert (x[0, 1], x[1, 0], x[2, 0]) == (65504, -65504, 7)
    assert check_states(x, "layer 3") == 0


def test_a_single_nan_is_an_error() -> None:
    x = torch.zeros(10, 10)
    x[3, 3] = float("nan")
    with pytest.raises(NumericError, match="layer 3: 1 of 100 values are NaN"):
        check_states(x, "layer 3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "Gemma2ForCausalLM", "MixtralForCausalLM", "CohereForCausalLM"])
def test_gpu_agrees_with_float32_and_does_not_synchronise(name: str, oracle: Callable[[str], Oracle]) -> None:
    source = SourceModel(oracle(name).path)
    spec = load_spec(source)
    x = torch.randint(3, VOCAB, (2, 24), generator=torch.Generator().manual_seed(3))
    expected = oracle(name).run(x)[1]
    x = x.cuda()
    for module in spec.modules:
        block: Block = load_block(spec, module, source, "cuda", torch.float16)
        block.forward(x)  # rotary tables are built on first use
        torch.cuda.set_sync_debug_mode("default" if module.kind == "moe" else "error")
        try:
            x = block.forward(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert (x.cpu() - expected).norm() / expected.norm() < 0.08  # float16; a token may change experts
