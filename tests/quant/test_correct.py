"""Corrected targets: against the least-squares problem written out, and on blocks of all kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from quant_helpers import Packed, hessian, load, states
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.model import blocks
from exl2ray.model.blocks import Block, check_states
from exl2ray.model.moe import ExpertBank, Routing, route
from exl2ray.quality import Numerics, Settings
from exl2ray.quant import module as module_room
from exl2ray.quant.correct import (
    can_correct,
    corrected_weights,
    first_linears,
    first_sums,
    second_linears,
    second_sums,
    solve_damped,
)
from exl2ray.quant.hessian import Factor, HessianAccumulator, prepare, round_to_nearest
from exl2ray.quant.module import cut, pack_input, quantize_module, solve_input
from exl2ray.quant.pack import Decoded
from exl2ray.quant.qparams import parse
from exl2ray.quant.rows import reference_pass

SETTINGS = Settings(batch_rows=2)
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
# plain residual; post-norms; residual multiplier; parallel attention and MLP; experts
FAMILIES = [
    *(("Llama", 1), ("Llama", 2), ("Gemma2", 1), ("Gemma2", 2)),
    *(("Granite", 1), ("Granite", 2), ("Cohere", 1), ("Mixtral", 2)),
]
ROWS = 24


def two_chains(spec: object, noise: float = 0.2) -> tuple[Tensor, Tensor]:
    """States at the entry in a quantised and in the source model: the first are what noise and a drift made of the second."""
    source = states(spec, rows=ROWS)  # type: ignore[arg-type]
    other = states(spec, rows=ROWS, seed=1)  # type: ignore[arg-type]
    drift = torch.linspace(0.8, 1.1, source.shape[-1])
    return (source * drift + noise * other).to(source.dtype), source


def corrected_stage(block: Block, x: Tensor, other: Tensor, strength: float, second: bool, source: dict[str, Tensor]) -> None:
    """Puts the corrected targets of one stage into the block, unquantised."""
    if second:
        sums, _ = second_sums(block, x, other, source, SETTINGS, check_states)
    else:
        sums = first_sums(block, x, other, SETTINGS)
    for group, linears in (second_linears(block) if second else first_linears(block)).items():
        factor = prepare(sums[group].hessian.finish(), 1e-4)
        for key, w in corrected_weights(block, linears, factor, sums[group].cross, strength).items():
            block.set_weight(key, w)


def test_damped_solution() -> None:
    h = hessian(96, 2)
    factor = prepare(h, 0.05)
    m = torch.randn(96, 40, generator=torch.Generator().manual_seed(0))
    expected = torch.linalg.solve(h.double() + factor.damping * torch.eye(96), m.double())
    assert torch.allclose(solve_damped(factor, m.clone()).double(), expected, rtol=1e-3, atol=1e-6)
    with pytest.raises(NumericError, match="without a factor"):
        solve_damped(round_to_nearest(h.diagonal()), m)


def test_products_of_two_tensors() -> None:
    """Sums of X^T Y over batches; the plain Hessian is the case Y = X."""
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(4, 5, 7, generator=g), torch.randn(4, 5, 3, generator=g)
    whole, parts, plain, same = (HessianAccumulator(7, columns=c) for c in (3, 3, None, None))
    whole.add(x, 4, y=y)
    for i in range(4):
        parts.add(x[i], 1, y=y[i])
    plain.add(x, 4)
    same.add(x, 4, y=x)
    assert torch.allclose(whole.h, x.flatten(0, 1).T @ y.flatten(0, 1), atol=1e-5)
    assert torch.allclose(whole.h, parts.h, atol=1e-5)
    assert (whole.rows, whole.tokens) == (parts.rows, parts.tokens) == (4, 20)
    assert torch.equal(plain.h, same.h)


@pytest.mark.parametrize("module", [1, 2])
def test_full_strength_solves_the_least_squares_problem(tiny: Callable[[str], Path], module: int) -> None:
    """The output with the corrected second linear comes as close to the source's states as any weights allow."""
    spec, block = load(tiny("Llama"), module)
    x, other = two_chains(spec)
    half = block.halves[0]
    w = block.weights[half.second.key].double()
    caught: dict[str, Tensor] = {}
    block.forward(x, lambda group, t: caught.update({group: t}))
    wanted: dict[str, Tensor] = {}
    target = block.forward(other, lambda group, t: wanted.update({group: t}))
    inputs = caught[half.second.input_group].double()
    missing = (wanted[half.second.input_group].double() - inputs) @ w + (other - x).flatten(0, 1).double()
    step = torch.linalg.lstsq(inputs, missing).solution
    corrected_stage(block, x, other, 1.0, True, dict(block.weights))
    found = block.weights[half.second.key].double() - w
    assert float((found - step).norm() / step.norm()) < 0.02
    after = (block.forward(x) - target).double().norm()
    best = (missing - inputs @ step).norm()
    assert float(after) == pytest.approx(float(best), rel=1e-3)


@pytest.mark.parametrize(("family", "module"), FAMILIES)
def test_correction_brings_the_output_closer(tiny: Callable[[str], Path], family: str, module: int) -> None:
    """Both stages, without quantisation: the distance to the source model's states falls with the strength."""
    spec, block = load(tiny(family), module)
    x, other = two_chains(spec)
    assert can_correct(block)
    plain = dict(block.weights)
    target = block.forward(other)
    distances = []
    for strength in (0.0, 0.5, 1.0):
        for key, w in plain.items():
            block.set_weight(key, w)
        corrected_stage(block, x, other, strength, False, plain)
        sums, after = second_sums(block, x, other, plain, SETTINGS, check_states)
        assert torch.allclose(after.float(), target.float(), rtol=1e-4, atol=1e-4)
        assert {g: s.cross.rows for g, s in sums.items()} == dict.fromkeys(sums, ROWS)
        corrected_stage(block, x, other, strength, True, plain)
        if strength == 0:
            assert all(torch.equal(block.weights[k], w) for k, w in plain.items())
        distances.append(float((block.forward(x) - target).float().norm() / (x - other).float().norm()))
    assert distances[0] > distances[1] > distances[2], distances


def test_sums_do_not_depend_on_batches(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Cohere"), 1)
    x, other = two_chains(spec)
    source = dict(block.weights)
    for rows in (1, 5):
        a, after_a = second_sums(block, x, other, source, Settings(batch_rows=rows), check_states)
        b, after_b = second_sums(block, x, other, source, Settings(batch_rows=ROWS), check_states)
        assert a.keys() == b.keys() == {"o", "down"}
        assert torch.allclose(after_a, after_b, rtol=1e-4, atol=1e-5)
        for group in a:
            for name in ("hessian", "cross"):
                one, other_sum = (getattr(s[group], name).h for s in (a, b))
                assert torch.allclose(one, other_sum, rtol=1e-3, atol=1e-3 * float(other_sum.abs().max()))


def test_equal_chains_need_no_correction(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Llama"), 1)
    x = states(spec, rows=ROWS)
    plain = dict(block.weights)
    corrected_stage(block, x, x, 1.0, False, plain)
    corrected_stage(block, x, x, 1.0, True, plain)
    assert all(torch.equal(block.weights[k], w) for k, w in plain.items())


@pytest.mark.parametrize("all_experts", [False, True])
def test_experts_are_fitted_to_their_tokens(tiny: Callable[[str], Path], all_experts: bool) -> None:
    """Hessians and counts are those of the plain pass; the missing part of an expert by hand."""
    spec, block = load(tiny("Mixtral"), 2)
    x, other = two_chains(spec)
    settings = Settings(batch_rows=2, all_experts=all_experts)
    _, plain = reference_pass(block, x, settings, check_states)
    source = dict(block.weights)
    sums = {**first_sums(block, x, other, settings), **second_sums(block, x, other, source, settings, check_states)[0]}
    assert sums.keys() == plain.keys()
    for group, own in sums.items():
        for a in (own.hessian, own.cross):
            assert (a.rows, a.tokens, a.routed) == (plain[group].rows, plain[group].tokens, plain[group].routed)
        assert torch.allclose(own.hessian.h, plain[group].h, rtol=1e-3, atol=1e-3 * float(plain[group].h.abs().max()))
    n, f = (block.pre(s).flatten(0, -2) for s in (x, other))
    routing = block.route(n)
    expert, count = block.experts.experts[0], routing.counts[0]
    tokens = torch.arange(len(n)) if all_experts else routing.tokens[:count]
    a, b = (block.experts.mid(expert, s[tokens]) for s in (n, f))
    missing = (b - a) @ block.weights[expert.down.key] + (other - x).flatten(0, -2)[tokens].float()
    expected = a.T @ missing
    assert torch.allclose(sums["w2.0"].cross.h, expected, rtol=1e-2, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("starved", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_experts_in_runs_have_the_sums_of_experts_one_by_one(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, device: str, starved: bool
) -> None:
    """Sums, counts, and the source's states, with first linears that are quantised; an expert without tokens among them."""
    dtype, far = (torch.float32, 1.0) if device == "cpu" else (torch.float16, 100.0)
    spec, block = load(tiny("Mixtral"), 2, dtype, device)
    x, other = (states.to(device) for states in two_chains(spec))
    if starved:  # the first one

        def among_others(router: Tensor, h: Tensor, per_token: int) -> Routing:
            found = route(router[1:], h, per_token)
            return replace(found, experts=found.experts + 1, counts=(0, *found.counts))

        monkeypatch.setattr(blocks, "route", among_others)
    source = {linear.key: block.weights[linear.key] for linears in first_linears(block).values() for linear in linears}
    generator = torch.Generator().manual_seed(1)
    for key, w in source.items():
        noise = torch.randn(w.shape, generator=generator).to(w)
        block.set_weight(key, w + 0.05 * noise * w.std())
    settings = Settings(batch_rows=2)
    plain, after = second_sums(block, x, other, source, settings, check_states)
    stored = dict(block.weights)
    monkeypatch.setattr(ExpertBank, "runs_pay", lambda self, slots, device: True)
    found, after_runs = second_sums(block, x, other, source, settings, check_states)
    assert all(block.weights[key] is w for key, w in stored.items())
    assert torch.allclose(after.float(), after_runs.float(), rtol=1e-4 * far, atol=1e-5 * far)
    assert found.keys() == plain.keys()
    assert (min(s.hessian.tokens for s in plain.values()) == 0) == starved
    for group, own in found.items():
        for a, b in ((own.hessian, plain[group].hessian), (own.cross, plain[group].cross)):
            assert (a.rows, a.tokens, a.routed) == (b.rows, b.tokens, b.routed)
            assert torch.allclose(a.h, b.h, rtol=1e-4 * far, atol=1e-5 * far * max(1.0, float(b.h.abs().max()))), group


def test_heads_keep_their_targets(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Llama"), 6)
    assert block.module.kind == "head"
    assert not can_correct(block)
    assert spec.modules[6] is block.module


def test_without_a_factor_or_tokens_the_targets_are_the_weights(tiny: Callable[[str], Path]) -> None:
    _, block = load(tiny("Llama"), 1)
    linears = first_linears(block)["qkv"]
    cross = HessianAccumulator(64)
    h = hessian(64)
    for factor in (prepare(h), round_to_nearest(h.diagonal())):
        found = corrected_weights(block, linears, factor, cross, 1.0)
        assert all(found[x.key] is block.weights[x.key] for x in linears)


def test_states_beyond_all_bounds_are_refused(tiny: Callable[[str], Path]) -> None:
    _, block = load(tiny("Llama"), 1)
    cross = HessianAccumulator(64)
    cross.add(torch.full((4, 64), 1e30))
    factor = Factor(torch.arange(64), torch.eye(64) * 1e-8, 0.0, 1)
    with pytest.raises(NumericError, match=r"layers\.0\.self_attn\.q_proj: corrected weights are not finite"):
        corrected_weights(block, first_linears(block)["qkv"], factor, cross, 1.0)


def test_the_linear_whose_corrected_weights_are_infinite_is_named(tiny: Callable[[str], Path]) -> None:
    _, block = load(tiny("Llama"), 1)
    linears = first_linears(block)["qkv"]
    block.weights[linears[1].key].fill_(1e33)
    cross = HessianAccumulator(64)
    cross.add(torch.full((4, 64), 1e3))
    factor = Factor(torch.arange(64), torch.eye(64) * 1e-2, 0.0, 1)
    with pytest.raises(NumericError, match=r"layers\.0\.self_attn\.k_proj: corrected weights are not finite"):
        corrected_weights(block, linears, factor, cross, 1.0)


@pytest.mark.parametrize("device", DEVICES)
def test_rounds_of_experts_side_by_side_give_the_same_bytes(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Solved and packed by turns, two inputs before all are waited for; against one after the other."""
    found = []
    for lanes in (2, 1):
        spec, block = load(tiny("Mixtral"), 2, torch.float32 if device == "cpu" else torch.float16, device)
        x, other = (states.to(device) for states in two_chains(spec))
        monkeypatch.setattr(module_room, "lanes_of", lambda block, lanes=lanes: lanes)
        monkeypatch.setattr(module_room, "ROUNDS", 1)
        packed, params = Packed(), {linear.key: parse("1:4b_32g") for linear in block.module.linears}
        settings = replace(SETTINGS, numerics=Numerics(0.5, "feedback", 2))
        quantize_module(block, cut(x), cut(other), len(x), params, settings, check_states, packed)
        found.append(packed)
    assert found[0].keys() == found[1].keys() == {linear.key for linear in block.module.linears}
    for key, p in found[0].items():
        expected = found[1][key].tensors()
        assert all(torch.equal(t.cpu(), expected[name].cpu()) for name, t in p.tensors().items()), key


def test_targets_are_what_is_quantised(tiny: Callable[[str], Path]) -> None:
    """8 bits reproduce the targets, not the weights of the block."""
    _, block = load(tiny("Llama"), 1)
    linears = second_linears(block)["o"]
    key = linears[0].key
    target = block.weights[key] + 0.1
    solved = solve_input(linears, {key: target}, prepare(hessian(64)), {key: parse("1:8b_32g")}, SETTINGS)
    decoded = Decoded()
    pack_input(block, solved, decoded)
    decoded.check()
    assert float((block.weights[key] - target).abs().max()) < 0.01


@pytest.mark.parametrize(("family", "module"), FAMILIES)
def test_what_enters_the_second_linear_is_computed_once(tiny: Callable[[str], Path], family: str, module: int) -> None:
    """Kept, where there is room and a module has one half, it gives the bits that computing it again gives."""
    spec, block = load(tiny(family), module)
    x, other = two_chains(spec)
    plain = dict(block.weights)
    params = {linear.key: parse("1:4b_32g") for linear in block.module.linears}
    runs = []
    for keep in (0, 1 << 30):
        for key, w in plain.items():
            block.set_weight(key, w)
        settings = replace(SETTINGS, numerics=Numerics(target_correction=0.5), keep_bytes=keep)
        seen: list[str] = []
        block.bank.watch = lambda key, x, out, seen=seen: seen.append(key)
        packed = Packed()
        result = quantize_module(block, cut(x), cut(other), ROWS, params, settings, check_states, packed)
        block.bank.watch = None
        runs.append((torch.cat(list(result.x.values())), result.error, packed, len(seen)))
    (out, error, packed, products), (again, same_error, same, fewer) = runs
    assert torch.equal(out, again)
    assert error == same_error
    assert all(torch.equal(p.q_weight, same[key].q_weight) for key, p in packed.items())
    assert (fewer < products) == (block.module.kind in ("attention", "mlp"))
