"""Measuring a module: every score is what a plain forward with the candidates in place gives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from quant_helpers import load, measured, states
from torch import Tensor

from exl2ray.cuda.solver import Solution
from exl2ray.errors import NumericError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.measurement import ModuleProfile, OptionProfile, read_measurement
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import Block, check_states, load_block
from exl2ray.quality import Settings
from exl2ray.quant import measure
from exl2ray.quant import module as module_room
from exl2ray.quant.gptq import feedback_factor, quantize_reference
from exl2ray.quant.hessian import Factor, expert_factor, factorise, prepare_borrowing
from exl2ray.quant.measure_moe import coverage
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import attention_options, mlp_options
from exl2ray.quant.rows import accuracy_of, reference_pass, row_errors


def plain_errors(block: Block, x: Tensor, table: list[dict[str, Any]], factors: dict[str, Factor]) -> list[float]:
    """1 - accuracy of each row of options, by quantising every linear with the plain loop and running the whole block."""
    target = block.forward(x)
    source = dict(block.weights)
    quantised: dict[tuple[str, Any], Tensor] = {}
    out = []
    for row in table:
        for linear in block.module.linears:
            if linear.role not in row:
                continue
            option = row[linear.role]
            if (linear.key, option) not in quantised:
                factor = factors[linear.input_group]
                q = quantize_reference(
                    pad_columns(source[linear.key]), factor.perm, feedback_factor(factor),
                    option.layout(linear.in_features),
                )  # fmt: skip
                quantised[linear.key, option] = q.weight
            block.set_weight(linear.key, quantised[linear.key, option])
        y = block.forward(x)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(y.float(), target.float(), strict=True)]
        out.append(sum(errors) / len(errors))
        for key, w in source.items():
            block.set_weight(key, w)
    return out


def group_factors(block: Block, x: Tensor, settings: Settings) -> dict[str, Factor]:
    _, hessians = reference_pass(block, x, settings, check_states)
    notes: list[str] = []
    if block.module.kind == "moe":
        return {g: expert_factor(block, hessians, g, settings, notes) for g in hessians}
    return {g: factorise(h, settings, g, notes) for g, h in hessians.items()}


ATTENTION = [dict(zip(("q_proj", "k_proj", "v_proj", "o_proj"), row, strict=True)) for row in attention_options()]
MLP = [dict(zip(("gate_proj", "up_proj", "down_proj"), row, strict=True)) for row in mlp_options()]
EXPERTS = [dict(zip(("w1", "w3", "w2"), row, strict=True)) for row in mlp_options()]


def assert_scores(options: tuple[OptionProfile, ...], expected: list[float], table: list[dict[str, Any]]) -> None:
    assert [dict(o.params) for o in options] == table
    for option, error in zip(options, expected, strict=True):
        assert 1 - option.accuracy == pytest.approx(error, rel=5e-3)


@pytest.mark.parametrize(
    ("family", "module", "mode", "table"),
    [
        ("Llama", 1, "self_attn", ATTENTION),
        ("Llama", 2, "mlp", MLP),
        ("Qwen2", 3, "self_attn", ATTENTION),
        ("Mixtral", 2, "block_sparse_moe", EXPERTS),
    ],
)
def test_scores_are_those_of_whole_forwards(
    tiny: Callable[[str], Path], family: str, module: int, mode: str, table: list[dict[str, Any]]
) -> None:
    spec, block = load(tiny(family), module)
    x, settings = states(spec), Settings(batch_rows=2)
    y_plain = block.forward(x)
    before = {k: w.clone() for k, w in block.weights.items()}
    profile, y = measured(block, x, settings)
    assert torch.equal(y, y_plain)
    assert all(torch.equal(block.weights[k], w) for k, w in before.items())
    assert profile.entry_key == f"model.layers.{(module - 1) // 2}.{mode}"
    assert profile.options is not None
    assert_scores(profile.options, plain_errors(block, x, table, group_factors(block, x, settings)), table)
    for option, row in zip(profile.options, table, strict=True):
        expected = sum(row[n.role].bits_of(n) for n in block.module.linears)
        assert option.total_bits == expected
    assert profile.options[-1].accuracy > 0.99
    assert profile.options[0].accuracy < 0.95


def test_parallel_block_scores_each_half_without_the_residual(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Cohere"), 1)
    x, settings = states(spec), Settings(batch_rows=2)
    profile, y = measured(block, x, settings)
    assert profile.options is None
    assert profile.attn is not None
    assert profile.mlp is not None
    assert (len(profile.attn), len(profile.mlp)) == (19, 17)
    assert torch.equal(y, block.forward(x))
    factors = group_factors(block, x, settings)
    assert set(factors) == {"qkv", "o", "down"}  # up and gate share the input of q
    n = block.halves[0].pre(x)
    for half, options, table in zip(block.halves, (profile.attn, profile.mlp), (ATTENTION, MLP), strict=True):
        one = _Branch(block, half, n)
        assert_scores(options, plain_errors(one, x, table, factors), table)  # type: ignore[arg-type]


class _Branch:
    """One half of a parallel block as a block of its own: normed states to the branch's output."""

    def __init__(self, block: Block, half: Any, n: Tensor) -> None:
        self.weights, self.set_weight, self.module = block.weights, block.set_weight, block.module
        self._half, self._n = half, n

    def forward(self, x: Tensor) -> Tensor:
        branch: Tensor = self._half.branch(self._n)
        return branch


@pytest.mark.parametrize(("family", "module"), [("Llama", 1), ("Llama", 2), ("Mixtral", 2), ("Cohere", 1)])
def test_batching_of_rows_changes_nothing_but_rounding(
    tiny: Callable[[str], Path], family: str, module: int
) -> None:
    spec, block = load(tiny(family), module)
    x = states(spec, rows=5)
    one, y1 = measured(block, x, Settings(batch_rows=1))
    all_, y5 = measured(block, x, Settings(batch_rows=8, budget_bytes=1))
    # Half states: a product summed in another order may land on the neighbouring half, rarely.
    assert torch.allclose(y1.float(), y5.float(), rtol=2e-3, atol=1e-3)
    for a, b in zip(one.slots(), all_.slots(), strict=True):
        for p, q in zip(a, b, strict=True):
            assert 1 - p.accuracy == pytest.approx(1 - q.accuracy, rel=0.02)


def test_two_runs_agree_to_the_bit(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Llama"), 1)
    x = states(spec)
    a, b = (measured(block, x, Settings())[0] for _ in range(2))
    assert a == b


def test_experts_without_tokens_have_a_defined_fallback(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Mixtral"), 2)
    x = states(spec, rows=1, tokens=1).expand(1, 30, -1).contiguous()  # equal tokens go to the same two experts
    reported: list[str] = []
    profile, _ = measured(block, x, Settings(), reported.append)
    tokens = [e["tokens"] for e in profile.extra["experts"]]
    assert sorted(tokens) == [0, 0, 30, 30]
    idle = tokens.index(0)
    assert any(f"w2.{idle}" in line and "no calibration token" in line for line in reported)
    assert any(f"w13.{idle}" in line and "0 tokens for 64 dimensions" in line for line in reported)
    assert not any(line.startswith("model.layers.0") for line in reported)  # whoever shows them names the module


def test_a_starved_expert_borrows_from_all(tiny: Callable[[str], Path]) -> None:
    """Its own tokens count as they are, those of all experts with the weight of the missing ones."""
    spec, block = load(tiny("Mixtral"), 2)
    x, settings = states(spec, rows=1, tokens=40), Settings()
    _, hessians = reference_pass(block, x, settings, check_states)
    counts = [c["tokens"] for c in coverage(block, hessians)]
    assert sum(counts) == 80
    e = int(np.argmin(counts))
    assert 0 < counts[e] < 64
    factor = expert_factor(block, hessians, f"w13.{e}", settings, [])
    everyone = torch.stack([hessians[f"w13.{i}"].h for i in range(4)]).sum(0)
    mixed = hessians[f"w13.{e}"].h + (64 - counts[e]) / 80 * everyone
    assert factor.r is not None
    perm = factor.perm
    restored = factor.r @ factor.r.T - factor.damping * torch.eye(64)
    assert torch.equal(perm, torch.argsort(mixed.diagonal(), descending=True, stable=True))
    expected = mixed[perm][:, perm]
    scale = float(restored.diagonal().sum() / expected.diagonal().sum())
    assert torch.allclose(restored, expected * scale, rtol=1e-3, atol=1e-4 * float(restored.max()))
    untouched = {name: own for name, own in hessians.items() if name.startswith("w13.")}
    prepare_borrowing(block, hessians)
    for i in (i for i, count in enumerate(counts) if count < 64):  # whoever borrowed before it
        later, first = (expert_factor(block, given, f"w13.{i}", settings, []) for given in (hessians, dict(untouched)))
        assert later.r is not None
        assert first.r is not None
        assert torch.equal(later.r, first.r)


def test_nan_states_are_refused_with_the_place(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Llama"), 2)
    x = states(spec)
    x[2, 5, 7] = float("nan")
    with pytest.raises(NumericError, match=r"output of model\.layers\.0\.mlp, rows 2 to 2: 64 of"):
        measured(block, x, Settings(batch_rows=2))


def test_a_module_that_no_option_can_hold_is_refused(tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    spec, block = load(tiny("Llama"), 2)
    options = [OptionProfile(0.05, o.total_bits, o.params) for o in measured(block, states(spec), Settings())[0].slots()[0]]
    monkeypatch.setattr(module_room, "measure_halves", lambda *_: ([options], {}))
    with pytest.raises(NumericError, match=r"model\.layers\.0\.mlp: the best of 17 options has accuracy 0\.05"):
        measured(block, states(spec), Settings())


def test_a_candidate_that_yields_nan_counts_as_useless(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, block = load(tiny("Llama"), 2)
    solve_options = measure.solve_options

    def broken(*args: Any) -> dict[str, dict[int, Solution]]:
        solved = solve_options(*args)
        if "down_proj" in solved:
            for t in (solved["down_proj"][0].weight, solved["down_proj"][0].losses, solved["down_proj"][0].energies):
                t.fill_(float("nan"))
        return solved

    monkeypatch.setattr(measure, "solve_options", broken)
    profile, _ = measured(block, states(spec), Settings())
    assert profile.options is not None
    rows = [row["down_proj"] for row in MLP]
    for option, row in zip(profile.options, rows, strict=True):
        assert (option.accuracy == 1e-6) == (row == rows[0])
    losses = profile.extra["linears"]["down_proj"]["losses"]
    assert {desc for desc, loss in losses.items() if loss > 1e20} == {rows[0].desc}


def test_row_errors() -> None:
    target = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    result = target * torch.tensor([1.0, 1.1, 0.5])[:, None, None]
    norm = target.flatten(1).norm(dim=1)
    assert float(row_errors(result, target, norm)) == pytest.approx(0.6, rel=1e-5)
    infinite = result.half()
    infinite[0, 0, 0] = float("inf")
    assert math.isfinite(float(row_errors(infinite, target, norm)))  # clamped to the largest half
    assert accuracy_of(0.25) == 0.75
    assert accuracy_of(1.5) == accuracy_of(float("nan")) == accuracy_of(float("inf")) == 1e-6


@pytest.mark.slow
def test_layer_of_a_trained_model_agrees_with_the_reference(shared_dir: Path) -> None:
    """Other calibration text than the reference's, and less of it: the numbers differ a little, their pattern does not."""
    source = SourceModel(shared_dir / "models" / "tiny-llama-7m")
    spec = load_spec(source)
    golden = read_measurement(shared_dir / "golden" / "tiny-llama-7m-measurement.json")
    tokens = np.load(shared_dir / "data" / "eval-tokens.npy").astype(np.int64)
    ids = torch.from_numpy(tokens).view(64, 1024)[:4, :256]
    x = load_block(spec, spec.modules[0], source, "cpu", torch.float32).forward(ids)
    for module in spec.modules[1:3]:
        block = load_block(spec, module, source, "cpu", torch.float32)
        profile, x = measured(block, x, Settings(batch_rows=4))
        theirs = golden[profile.entry_key]
        assert isinstance(theirs, ModuleProfile)
        assert profile.options is not None
        assert theirs.options is not None
        assert [o.total_bits for o in profile.options] == [o.total_bits for o in theirs.options]
        assert [dict(o.params) for o in profile.options] == [dict(o.params) for o in theirs.options]
        ours, their = (np.array([o.accuracy for o in p]) for p in (profile.options, theirs.options))
        assert np.corrcoef(ours, their)[0, 1] > 0.99
        assert np.corrcoef(np.log(1 - ours), np.log(1 - their))[0, 1] > 0.99
        assert np.all(np.abs(np.log((1 - ours) / (1 - their))) < 0.4)
