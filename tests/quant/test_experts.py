"""Mixture of experts: Hessians from all tokens, coverage, warnings, scoring in pieces, and memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quant_helpers import load, measured, quantized, states

from exl2ray.cuda.small_batches import CACHE
from exl2ray.model.blocks import check_states
from exl2ray.model.spec import LinearSpec, ModuleSpec, Stored
from exl2ray.quality import Numerics, Settings
from exl2ray.quant import solve
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.measure_moe import STARVED_SHARE, coverage, describe_coverage, shares_of, starved_experts
from exl2ray.quant.memory import peak_bytes, settings_within, states_fit_within
from exl2ray.quant.qparams import parse
from exl2ray.quant.rows import TreeSum, reference_pass

GB = 10**9


def test_all_experts_collect_from_all_tokens_and_nothing_else_changes(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Mixtral"), 2)
    x = states(spec)
    y, routed = reference_pass(block, x, Settings(batch_rows=2), check_states)
    y_all, every = reference_pass(block, x, Settings(batch_rows=2, all_experts=True), check_states)
    assert torch.equal(y, y_all)
    assert coverage(block, every) == coverage(block, routed)  # of the router, not of the Hessians
    h = block.pre(x).flatten(0, -2).float()
    for e, expert in enumerate(block.experts.experts):
        assert every[f"w13.{e}"].tokens == every[f"w2.{e}"].tokens == x.shape[0] * x.shape[1]
        assert every[f"w13.{e}"].rows == x.shape[0]
        assert torch.allclose(every[f"w13.{e}"].h, h.T @ h, rtol=1e-4, atol=1e-3)
        gate, up = (h @ block.weights[m.key] for m in (expert.gate, expert.up))
        mid = torch.nn.functional.silu(gate) * up
        assert torch.allclose(every[f"w2.{e}"].h, mid.T @ mid, rtol=1e-4, atol=1e-3)
        assert routed[f"w13.{e}"].tokens == routed[f"w13.{e}"].routed < every[f"w13.{e}"].tokens


def test_pieces_of_an_experts_tokens_give_the_same_scores(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Mixtral"), 2)
    x, settings = states(spec), Settings(batch_rows=2)
    whole, pieces = (measured(block, x, s)[0] for s in (settings, replace(settings, expert_tokens=7)))
    extra = whole.extra
    for a, b in zip(whole.slots()[0], pieces.slots()[0], strict=True):
        assert 1 - a.accuracy == pytest.approx(1 - b.accuracy, rel=1e-3)
    tokens = [e["tokens"] for e in extra["experts"]]
    assert sum(tokens) == 2 * x.shape[0] * x.shape[1]
    assert f"{min(tokens)} tokens (expert {tokens.index(min(tokens))})" in extra["notes"][0]


def test_quantised_module_reports_its_coverage(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Mixtral"), 2)
    params = {x.key: parse("1:4b_32g s4") for x in block.module.linears}
    module, _, _ = quantized(block, states(spec), params, Settings(batch_rows=2))
    assert sum(e["tokens"] for e in module.experts) == 2 * 3 * 40
    assert sum(e["share"] for e in module.experts) == pytest.approx(1)
    assert module.notes[0] == describe_coverage(module.experts)


def test_starved_experts_are_named() -> None:
    assert starved_experts(shares_of([100, 100, 100, 100])) == ""
    limit = STARVED_SHARE * 1000 / 10
    assert starved_experts(shares_of([int(limit), 110, *[110] * 8])) == ""
    text = starved_experts(shares_of([9, 0, *[120] * 8]))
    assert text.startswith("2 of 10 experts got less than 10% of a fair share")
    assert "tokens: 0 (9 tokens), 1 (0 tokens);" in text
    assert "--moe-all-experts" in text
    assert starved_experts(shares_of([0] * 20 + [10] * 20)).count("tokens)") == 5
    assert starved_experts([]) == ""


def test_sums_of_shares_keep_the_routed_tokens() -> None:
    tree = TreeSum()
    for share in range(8):
        h = HessianAccumulator(4)
        h.add(torch.ones(5, 4), 1, routed=share)
        tree.add(share, h)
    assert (tree.total().tokens, tree.total().routed) == (40, 28)


def expert_layer(experts: int, hidden: int, width: int) -> ModuleSpec:
    def linear(role: str, k: int, n: int, e: int) -> LinearSpec:
        group = f"w2.{e}" if role == "w2" else f"w13.{e}"
        return LinearSpec(role, f"{role}.{e}", k, n, group, Stored("", (n, k)), expert=e)

    shapes = (("w1", hidden, width), ("w3", hidden, width), ("w2", width, hidden))
    return ModuleSpec(0, "moe", "model.layers.0", 0, tuple(linear(r, k, n, e) for e in range(experts) for r, k, n in shapes))


@pytest.mark.parametrize(("rows", "experts", "hidden", "width"), [
    (16, 8, 4096, 14336), (100, 8, 4096, 14336), (16, 128, 2048, 768), (100, 128, 2048, 768),
])  # fmt: skip
def test_expert_layers_fit_20_gb(rows: int, experts: int, hidden: int, width: int) -> None:
    """Shapes of Mixtral 8x7B and Qwen3-30B-A3B on a GPU of 20 GB, 2048 tokens per row."""
    module, total = expert_layer(experts, hidden, width), 20 * GB
    settings = settings_within(module, rows, 2048, total, 0.12)
    states_bytes = rows * 2048 * hidden * 2
    resident = states_bytes if states_fit_within([module], states_bytes, 2048, total) else 0
    peak = peak_bytes(module, settings, 2048, resident)
    assert set(peak) == {"reference", "solve", "score"}
    assert max(peak.values()) < total
    assert settings.offload
    assert settings.batch_rows >= 2
    kept = peak_bytes(module, replace(settings, offload=False), 2048, resident)
    assert kept["solve"] - peak["solve"] == experts * 40 * hidden * width * 2  # what offloading spares


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
def test_experts_side_by_side_on_a_gpu_have_the_same_results(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three times each: the later runs replay what was recorded, on every lane."""
    found = []
    monkeypatch.setattr(CACHE, "record_at", 2)
    for lanes in (1, 1, 1, 4, 4, 4):
        monkeypatch.setattr(solve, "COUNT", lanes)
        spec, block = load(tiny("Mixtral"), 2, torch.float16, "cuda")
        x, settings = states(spec).half().cuda(), Settings(batch_rows=2, numerics=Numerics(0.0, "feedback", 1))
        profile, _ = measured(block, x, settings)
        params = {x.key: parse("0.5:4b_32g/0.5:3b_32g s4") for x in block.module.linears}
        _, made, out = quantized(block, x, params, replace(settings, numerics=Numerics(0.0, "feedback", 1)))
        packed = [t for p in made.values() for t in p.tensors().values()]
        found.append((profile, [t.tolist() for t in packed], out.tolist()))
    assert all(f == found[0] for f in found[1:])
