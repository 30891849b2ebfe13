"""Probes: what they perturb, what they leave alone, and that one of them tells what smaller errors do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quant_helpers import correlated_inputs, load, states, weights
from torch import Tensor

from exl2ray.quant.sensitivity import advanced, divergences, head_probe, perturbed, probes_of

CPU = torch.device("cpu")


def reference_kl(p: Tensor, q: Tensor) -> float:
    """Mean over positions, from logits, in float64."""
    a, b = (torch.log_softmax(t.double(), -1) for t in (p, q))
    return float((a.exp() * (a - b)).sum(-1).mean())


def test_the_error_is_that_of_rounding_and_not_along_the_mean_input() -> None:
    k, n = 96, 48
    x, w = correlated_inputs(k) + 3.0, weights(k, n)
    mean = x.mean(0)
    error = perturbed(w.half(), mean) - w
    assert torch.allclose(mean @ error, torch.zeros(n), atol=1e-4 * float(mean.norm() * error.norm()))
    relative = float(error.norm() / w.norm())
    assert 0.1 < relative < 0.35
    assert torch.isfinite(perturbed(torch.zeros(k, n), mean)).all()
    assert torch.isfinite(perturbed(w, torch.zeros(k))).all()


CASES = [("Llama", 1, 4), ("Llama", 2, 3), ("Mixtral", 2, 3), ("Cohere", 1, 7)]


@pytest.mark.parametrize(("family", "index", "roles"), CASES)
def test_probes_of_a_module(tiny: Callable[[str], Path], family: str, index: int, roles: int) -> None:
    spec, block = load(tiny(family), index)
    before = {k: w.clone() for k, w in block.weights.items()}
    x = states(spec).float()
    out, probes = probes_of(block, x, CPU, len(x))
    assert len(probes) == roles == len({p.role for p in probes})
    assert all(torch.equal(block.weights[k], w) for k, w in before.items())
    assert torch.equal(out, advanced(block, x, CPU, len(x)))
    for p in probes:
        assert p.states.shape == x.shape
        assert p.error > 0
        assert not torch.equal(p.states, out)


def test_the_error_is_the_squared_error_of_the_outputs_per_token(tiny: Callable[[str], Path]) -> None:
    spec, block = load(tiny("Llama"), 2)
    x = states(spec).float()
    inputs: list[Tensor] = []
    block.forward(x, lambda group, n: inputs.append(n) if group == "down" else None)
    down = block.module.linear("down_proj")
    w = block.weights[down.key]
    error = perturbed(w, inputs[0].mean(0)) - w
    expected = float((inputs[0] @ error).double().square().sum() / len(inputs[0]))
    probe = next(p for p in probes_of(block, x, CPU, len(x))[1] if p.role == "down_proj")
    assert probe.error == pytest.approx(expected, rel=1e-5)


def test_divergence_of_equal_near_and_far(tiny: Callable[[str], Path]) -> None:
    spec, head = load(tiny("Llama"), len(load(tiny("Llama"), 0)[0].modules) - 1)
    x = states(spec, rows=2, tokens=300).float()  # more than one slice of positions
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(x.shape, generator=g)
    others = [x, x + 1e-4 * noise, x + 0.1 * noise, 30 * noise]
    found = divergences(head, x, others)
    assert found[0] == 0.0
    for kl, other in zip(found[1:], others[1:], strict=True):
        assert kl == pytest.approx(reference_kl(head.forward(x), head.forward(other)), rel=1e-3)
    assert found[1] < 1e-6


def test_the_head_is_probed_and_left_as_it_was(tiny: Callable[[str], Path]) -> None:
    spec, head = load(tiny("Llama"), len(load(tiny("Llama"), 0)[0].modules) - 1)
    key = head.module.linears[0].key
    x, w = states(spec).float(), head.weights[key].clone()
    kl, error = head_probe(head, x)
    assert torch.equal(head.weights[key], w)
    changed = perturbed(w, x.flatten(0, 1).mean(0))
    assert kl == pytest.approx(reference_kl(x @ w, x @ changed), rel=1e-3)
    assert error == pytest.approx(float((x @ (changed - w)).square().sum(-1).mean()), rel=1e-4)


def test_a_quarter_of_the_squared_error_is_a_quarter_of_the_divergence(tiny: Callable[[str], Path]) -> None:
    """What one number per linear rests on."""
    spec, head = load(tiny("Llama"), len(load(tiny("Llama"), 0)[0].modules) - 1)
    key = head.module.linears[0].key
    x, w = states(spec, rows=8).float(), head.weights[key].clone()
    kl, error = head_probe(head, x)
    half = w + (perturbed(w, x.flatten(0, 1).mean(0)) - w) / 2
    assert reference_kl(x @ w, x @ half) == pytest.approx(kl / error * error / 4, rel=0.1)
