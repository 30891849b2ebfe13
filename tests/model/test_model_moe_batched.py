"""Experts computed in runs give what experts one by one give: outputs, Hessian inputs, replaced weights, memory limits."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import EXPERT_WIDE, HIDDEN, QWEN3_MOE, Oracle, direct
from torch import Tensor

from exl2ray.formats.hf import SourceModel
from exl2ray.model import moe
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import MoeBlock, check_states, load_block
from exl2ray.model.half import LinearBank, Norm
from exl2ray.model.moe import MOST_PADDING, Expert, ExpertBank, Routing, cut_runs, route
from exl2ray.model.spec import LinearSpec, Stored
from exl2ray.quality import Settings
from exl2ray.quant.measure_moe import coverage
from exl2ray.quant.rows import reference_pass

WIDTH = 24
RAGGED = (7, 0, 1, 31, 7, 2, 0, 16, 0, 1, 30, 5, 5, 12, 64, 3)


def expert_bank(
    experts: int, hidden: int, width: int, per_token: int, transposed: bool = True, device: str = "cpu"
) -> ExpertBank:
    """Random experts; ``transposed``: weights are transposed views, as they come from most checkpoints."""
    generator = torch.Generator().manual_seed(experts)
    dtype = torch.float16 if device == "cuda" else torch.float32

    def linear(role: str, k: int, n: int, e: int) -> LinearSpec:
        group = f"w2.{e}" if role == "w2" else f"w13.{e}"
        return LinearSpec(role, f"experts.{e}.{role}", k, n, group, Stored("", (n, k)), expert=e)

    shapes = (("w1", hidden, width), ("w3", hidden, width), ("w2", width, hidden))
    threes = tuple(Expert(*(linear(role, k, n, e) for role, k, n in shapes)) for e in range(experts))
    bank = LinearBank(tuple(x for t in threes for x in (t.gate, t.up, t.down)), dtype)
    for x in bank.specs.values():
        stored = torch.randn(x.out_features, x.in_features, generator=generator) * x.in_features**-0.5
        bank.weights[x.key] = stored.to(device, dtype).t() if transposed else stored.t().contiguous().to(device, dtype)
    router = torch.randn(experts, hidden, generator=generator).to(device)
    return ExpertBank(bank, threes, router, per_token, "silu", Norm("rms", torch.ones(hidden), 1e-5))


def inputs(tokens: int, hidden: int = 16, seed: int = 0) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))


def routing_of(counts: Sequence[int]) -> Routing:
    """One choice per token, so that expert e gets exactly counts[e] of them, in mixed order."""
    total = sum(counts)
    mixed = torch.randperm(total, generator=torch.Generator().manual_seed(total))
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[mixed]
    order = experts.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(total)
    weights = torch.rand(total, 1, generator=torch.Generator().manual_seed(1))
    return Routing(experts[:, None], weights, order, place[:, None], tuple(counts))


def relative_error(a: Tensor, b: Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


class Captured(dict[str, Tensor]):
    def __call__(self, group: str, inputs: Tensor) -> None:
        assert group not in self
        self[group] = inputs


def spy_on_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Will hold the number of experts of every run that is computed."""
    lengths: list[int] = []
    plain = ExpertBank._run

    def spy(self: ExpertBank, run: moe.Run, *args: object) -> None:
        lengths.append(len(run.experts))
        plain(self, run, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(ExpertBank, "_run", spy)
    return lengths


# ---- outputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("counts", [RAGGED, (0,) * 15 + (9,), (5,) * 16, tuple(range(24)), (1, 0) * 8])
def test_runs_equal_the_loop_for_ragged_counts(counts: tuple[int, ...], transposed: bool) -> None:
    bank, routing = expert_bank(len(counts), 16, WIDTH, 1, transposed), routing_of(counts)
    h = inputs(sum(counts))
    loop = bank.forward(h, routing, in_runs=False)
    assert relative_error(bank.forward(h, routing, in_runs=True), loop) < 1e-5
    assert torch.equal(bank.forward(h, routing), loop)  # the default on CPUs


@settings(max_examples=20, deadline=None)
@given(tokens=st.integers(0, 60), experts=st.integers(1, 20), seed=st.integers(0, 999), data=st.data())
def test_runs_equal_the_loop_for_any_routing(tokens: int, experts: int, seed: int, data: st.DataObject) -> None:
    bank = expert_bank(experts, 16, WIDTH, data.draw(st.integers(1, experts)))
    h = inputs(tokens, seed=seed)
    routing = route(bank.router, h, bank.per_token)
    loop = bank.forward(h, routing, in_runs=False)
    assert torch.allclose(bank.forward(h, routing, in_runs=True), loop, rtol=1e-5, atol=1e-5)


def test_small_memory_gives_more_runs_and_the_same_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, routing, h = expert_bank(16, 16, WIDTH, 1), routing_of(RAGGED), inputs(sum(RAGGED))
    loop = bank.forward(h, routing, in_runs=False)
    lengths = spy_on_runs(monkeypatch)
    bank.forward(h, routing, in_runs=True)
    usual = len(lengths)
    assert sum(lengths) == 13  # experts with tokens
    assert usual < 10
    lengths.clear()
    monkeypatch.setattr(moe, "cut_runs", lambda *args: cut_runs(*args, limit_bytes=1))
    assert relative_error(bank.forward(h, routing, in_runs=True), loop) < 1e-5
    assert lengths == [1] * 13


# ---- runs and their limits ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 3000), min_size=1, max_size=130),
    weight=st.integers(1, 1 << 20),
    row=st.integers(1, 1 << 13),
    limit=st.integers(1, 1 << 26),
)
def test_runs_hold_every_expert_once_within_their_limits(counts: list[int], weight: int, row: int, limit: int) -> None:
    runs = list(cut_runs(counts, weight, row, limit))
    assert sorted(e for run in runs for e in run.experts) == [e for e, n in enumerate(counts) if n]
    for run in runs:
        padded = run.rows * len(run.experts)
        assert run.rows == max(counts[e] for e in run.experts)
        assert padded - sum(counts[e] for e in run.experts) <= MOST_PADDING * padded
        assert len(run.experts) == 1 or padded * row + len(run.experts) * weight <= limit


@pytest.mark.parametrize(("experts", "hidden", "width", "tokens_per_expert", "expected"), [
    (128, 2048, 768, 512, True),  # Qwen3-30B-A3B
    (128, 2048, 768, 4096, True),
    (128, 2048, 768, 8192, False),  # products outlast the launches
    (128, 4096, 1536, 512, True),  # Qwen3-235B-A22B
    (8, 4096, 14336, 64, False),  # Mixtral: few
    (16, 6144, 10752, 64, False),  # DBRX: copying the weights costs more than the launches
])  # fmt: skip
def test_shapes_decide(experts: int, hidden: int, width: int, tokens_per_expert: int, expected: bool) -> None:
    linear = LinearSpec("w1", "", hidden, width, "", Stored("", (width, hidden)))
    bank = ExpertBank(
        LinearBank((), torch.float16), (Expert(linear, linear, linear),) * experts, torch.zeros(1, 1), 2, "silu",
        Norm("rms", torch.ones(1), 1e-5),
    )  # fmt: skip
    assert bank.runs_pay(tokens_per_expert * experts, torch.device("cuda")) == expected
    assert not bank.runs_pay(tokens_per_expert * experts, torch.device("cpu"))


# ---- replaced weights, candidates, biases -------------------------------------------------------------------------


def test_replaced_weights_are_seen_at_once() -> None:
    """All the ways in which the entries of a bank change: set_weight with padding columns, an update, an assignment."""
    bank, routing, h = expert_bank(16, 16, WIDTH, 1), routing_of(RAGGED), inputs(sum(RAGGED))
    first = bank.forward(h, routing, in_runs=True)
    originals = dict(bank.bank.weights)
    seen = [first]

    def changed() -> None:
        out = bank.forward(h, routing, in_runs=True)
        assert relative_error(out, bank.forward(h, routing, in_runs=False)) < 1e-5
        assert all(relative_error(out, old) > 1e-3 for old in seen)
        seen.append(out)

    expert = bank.experts[3]
    bank.bank.set_weight(expert.gate.key, torch.randn(16, 32))  # the padded width: the others stay transposed views
    changed()
    bank.bank.weights.update({key: w.contiguous() * 1.5 for key, w in originals.items()})
    changed()
    bank.bank.weights[expert.down.key] = torch.randn(WIDTH, 16)
    changed()
    bank.bank.weights[expert.down.key].mul_(0.5)  # in place: the same tensor with other values
    changed()
    bank.bank.weights.update(originals)
    assert torch.equal(bank.forward(h, routing, in_runs=True), first)


def test_candidates_and_biases_go_one_by_one() -> None:
    bank, routing, h = expert_bank(16, 16, WIDTH, 1), routing_of(RAGGED), inputs(sum(RAGGED))
    candidates = {bank.experts[3].up.key: torch.randn(16, WIDTH)}
    scored = bank.forward(h, routing, candidates, in_runs=True)
    assert torch.equal(scored, bank.forward(h, routing, candidates, in_runs=False))
    assert relative_error(scored, bank.forward(h, routing, in_runs=True)) > 1e-3
    bank.bank.biases[bank.experts[14].down.key] = torch.randn(16)
    assert torch.equal(bank.forward(h, routing, in_runs=True), bank.forward(h, routing, in_runs=False))


# ---- Hessian inputs -----------------------------------------------------------------------------------------------


def test_captured_inputs_are_the_tokens_of_each_expert_and_no_more() -> None:
    bank, routing, h = expert_bank(16, 16, WIDTH, 1), routing_of(RAGGED), inputs(sum(RAGGED))
    loop, runs = Captured(), Captured()
    bank.forward(h, routing, capture=loop, in_runs=False)
    bank.forward(h, routing, capture=runs, in_runs=True)
    assert set(runs) == set(loop) == {f"{g}.{e}" for e, n in enumerate(RAGGED) if n for g in ("w13", "w2")}
    for e, count in enumerate(RAGGED):
        if count:
            assert torch.equal(runs[f"w13.{e}"], loop[f"w13.{e}"])
            assert runs[f"w2.{e}"].shape == (count, WIDTH)
            assert torch.allclose(runs[f"w2.{e}"], loop[f"w2.{e}"], rtol=1e-5, atol=1e-6)


# ---- a model ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many_experts(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """A Qwen3-MoE of 16 experts, 4 per token."""
    build = direct("Qwen3MoeConfig", "Qwen3MoeForCausalLM", **{**QWEN3_MOE, "num_experts": 16, "num_experts_per_tok": 4})
    return build(tmp_path_factory.mktemp("many_experts"))


def open_experts(oracle: Oracle, device: str = "cpu", dtype: torch.dtype = torch.float32) -> MoeBlock:
    source = SourceModel(oracle.path)
    spec = load_spec(source)
    module = next(m for m in spec.modules if m.kind == "moe")
    block = load_block(spec, module, source, device, dtype)
    assert isinstance(block, MoeBlock)
    return block


def test_block_in_runs_agrees_with_transformers(many_experts: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ExpertBank, "runs_pay", lambda self, slots, device: True)
    block = open_experts(many_experts)
    assert block.weights[block.module.linears[0].key].shape == (HIDDEN, EXPERT_WIDE)
    n = block.pre(inputs(80, HIDDEN)[None])
    with torch.no_grad():
        expected = many_experts.model.model.layers[0].mlp(n)
    expected = expected[0] if isinstance(expected, tuple) else expected
    h = n.flatten(0, 1)
    assert relative_error(block.forward_experts(h, block.route(h)), expected.view(h.shape)) < 1e-5


def test_hessians_and_coverage_are_those_of_the_loop(many_experts: Oracle, monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = open_experts(many_experts), inputs(3 * 20, HIDDEN).view(3, 20, HIDDEN)
    lengths = spy_on_runs(monkeypatch)
    y_loop, expected = reference_pass(block, x, Settings(batch_rows=2), check_states)
    assert not lengths
    monkeypatch.setattr(ExpertBank, "runs_pay", lambda self, slots, device: True)
    y, found = reference_pass(block, x, Settings(batch_rows=2), check_states)
    assert lengths
    assert relative_error(y, y_loop) < 1e-5
    assert coverage(block, found) == coverage(block, expected)
    for group, hessian in expected.items():
        assert (found[group].tokens, found[group].rows) == (hessian.tokens, hessian.rows)
        assert torch.allclose(found[group].h, hessian.h, rtol=1e-4, atol=1e-4)


# ---- GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("transposed", [True, False])
def test_gpu_runs_agree_with_the_loop_and_do_not_synchronise(transposed: bool) -> None:
    bank = expert_bank(32, 256, 96, 4, transposed, device="cuda")
    h = inputs(1000, 256).cuda().half()
    routing = route(bank.router, h, bank.per_token)
    loop = bank.forward(h, routing, in_runs=False)
    first = bank.forward(h, routing, in_runs=True)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = bank.forward(h, routing, in_runs=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert relative_error(first, loop) < 2e-3  # float16
    assert torch.equal(first, again)
