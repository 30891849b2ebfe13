"""The backward pass: its gradients against autograd over the whole model, its sensitivities against the divergence that noise
in a linear's outputs really causes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quant_helpers import load, states
from torch import Tensor

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import Block, load_block
from exl2ray.quant import warm
from exl2ray.quant.sensitivity import (
    POSITIONS,
    Sums,
    add,
    column_weights,
    fisher_root,
    head_backward,
    module_backward,
    token_weights,
)

FAMILIES = ["Llama", "Mixtral", "Cohere", "Gemma2"]  # sequential, experts, parallel, softcaps and post norms


def blocks_of(directory: Path) -> list[Block]:
    source = SourceModel(directory)
    spec = load_spec(source)
    return [load_block(spec, m, source, "cpu", torch.float32, torch.float32) for m in spec.modules]


def backward(blocks: list[Block], ids: Tensor, seed: int = 0) -> tuple[Tensor, dict[int, Sums]]:
    """Gradient at the embedding, and the sums of every module, as the pass has them."""
    kept = [blocks[0].forward(ids)]
    for block in blocks[1:-1]:
        kept.append(block.forward(kept[-1]))
    generator = torch.Generator().manual_seed(seed)
    head = blocks[-1]
    gradient, sums = head_backward(head, kept.pop().float(), generator, column_weights(head))
    found = {head.module.index: sums}
    for block in blocks[-2:0:-1]:
        gradient, sums = module_backward(block, kept.pop(), gradient, column_weights(block))
        found[block.module.index] = sums
    return gradient, found


def token_ids(blocks: list[Block], rows: int, tokens: int) -> Tensor:
    size = blocks[0].spec.hyper.vocab_size
    return torch.randint(0, size, (rows, tokens), generator=torch.Generator().manual_seed(7))


def mean_kl(p: Tensor, q: Tensor) -> float:
    a, b = (torch.log_softmax(t.double(), -1) for t in (p, q))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("family", FAMILIES)
def test_module_by_module_is_the_gradient_of_the_whole_model(tiny: Callable[[str], Path], family: str) -> None:
    blocks = blocks_of(tiny(family))
    ids = token_ids(blocks, 2, 24)
    found, _ = backward(blocks, ids)
    x = blocks[0].forward(ids).detach().requires_grad_()
    y = x
    for block in blocks[1:]:
        y = block.forward(y)
    generator = torch.Generator().manual_seed(0)
    upstream = torch.cat([fisher_root(row.detach(), generator)[None] for row in y])
    (expected,) = torch.autograd.grad(y, x, upstream)
    assert float(expected.norm()) > 0
    assert float((found - expected).norm() / expected.norm()) < 1e-4


def test_the_head_in_slices_of_positions(tiny: Callable[[str], Path]) -> None:
    """Rows longer than a slice: the states' gradients land where they belong."""
    head = blocks_of(tiny("Llama"))[-1]
    x = states(head.spec, rows=2, tokens=POSITIONS + 30).float()
    gradient, sums = head_backward(head, x, torch.Generator().manual_seed(3), column_weights(head))
    generator = torch.Generator().manual_seed(3)
    weight = next(iter(head.weights.values()))
    for r in range(2):
        for part in (slice(0, POSITIONS), slice(POSITIONS, POSITIONS + 30)):
            g = fisher_root(head.forward(x[r : r + 1, part]).detach(), generator)[0]
            torch.testing.assert_close(gradient[r, part], g @ weight.t(), rtol=1e-4, atol=1e-6)
    assert sums["lm_head"][1] == x.shape[0] * x.shape[1] * weight.shape[1]


def test_random_roots_have_the_second_moment_of_the_fisher_information() -> None:
    logits = torch.tensor([2.0, 0.5, -1.0, 0.0])
    p = torch.softmax(logits, -1)
    draws = fisher_root(logits.expand(200_000, 4), torch.Generator().manual_seed(0))
    found = draws.t() @ draws / len(draws)
    torch.testing.assert_close(found, torch.diag(p) - torch.outer(p, p), rtol=0, atol=2e-3)


# Of experts the last module: noise before another router makes tokens change their experts, which no gradient sees.
CASES = [("Llama", 1), ("Llama", 4), ("Mixtral", 4), ("Cohere", 1), ("Gemma2", 2)]


@pytest.mark.parametrize(("family", "index"), CASES)
def test_sensitivities_tell_the_divergence_that_noise_causes(tiny: Callable[[str], Path], family: str, index: int) -> None:
    """Independent noise with the columns' variances on the outputs of one role: KL = sensitivity times squared error."""
    blocks = blocks_of(tiny(family))
    ids = token_ids(blocks, 4, 32)
    total: Sums = {}
    for seed in range(8):
        add(total, backward(blocks, ids, seed)[1][index])
    reference = ids
    for block in blocks:
        reference = block.forward(reference)
    block, g = blocks[index], torch.Generator().manual_seed(11)
    columns, plain = column_weights(block), block.bank.linear
    for role, (halves, error) in total.items():
        keys = {x.key for x in block.module.linears if x.role == role}
        squares: list[float] = []

        scale = 0.02 * float(reference.std()) * (error / halves / 100) ** 0.5
        scale = min(max(scale, 1e-3), 3e-2)

        def noisy(linear, inputs, weight=None, keys=keys, squares=squares, scale=scale):  # type: ignore[no-untyped-def]
            out = plain(linear, inputs, weight)
            key = linear if isinstance(linear, str) else linear.key
            if key in keys:
                noise = scale * columns[key].sqrt() * torch.randn(out.shape, generator=g)
                squares.append(float(noise.double().square().sum()))
                out = out + noise
            return out

        draws, kl = 30, 0.0
        block.bank.linear = noisy  # type: ignore[method-assign]
        try:
            for _ in range(draws):
                x = ids
                for b in blocks:
                    x = b.forward(x)
                kl += mean_kl(reference, x) / draws
        finally:
            block.bank.linear = plain  # type: ignore[method-assign]
        squared = sum(squares) / draws / ids.numel()
        assert halves / error == pytest.approx(kl / squared, rel=0.25), role


def test_columns_and_dead_weights(tiny: Callable[[str], Path]) -> None:
    _, block = load(tiny("Llama"), 1)
    key, weight = next(iter(block.weights.items()))
    found = column_weights(block)[key]
    torch.testing.assert_close(found, weight.square().mean(0) / weight.square().mean(), rtol=1e-5, atol=1e-7)
    block.set_weight(key, torch.zeros_like(weight))
    assert torch.equal(column_weights(block)[key], torch.ones(weight.shape[1]))


def test_nothing_is_left_behind(tiny: Callable[[str], Path]) -> None:
    """A block that has seen a backward pass computes as before, without recording gradients."""
    spec, block = load(tiny("Mixtral"), 2)
    x = states(spec).float()
    before = block.forward(x)
    module_backward(block, x, torch.ones_like(x), column_weights(block))
    after = block.forward(x)
    assert block.bank.watch is None
    assert not after.requires_grad
    assert torch.equal(before, after)


def test_gradients_of_experts_are_the_same_in_every_run(tiny: Callable[[str], Path]) -> None:
    """Tokens meet in their experts: what they add up must have a fixed order, with several threads too."""
    _, block = load(tiny("Mixtral"), 2)
    g = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(4, 512, block.spec.hyper.hidden_size, generator=g) for _ in range(2))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = [module_backward(block, x, gradient, column_weights(block)) for _ in range(4)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(f[0], found[0][0]) and f[1] == found[0][1] for f in found)


def test_setting_up_gradients_waits_for_no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that measures may be recording a graph, which a wait for the whole device spoils."""
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: waited.append(device))
    warm._run_backward(torch.device("cpu"))
    assert waited == []


def test_tokens_with_next_to_no_input_count_for_little() -> None:
    x = torch.ones(2, 5, 4)
    x[0, 0] = 1e-3  # a millionth of the usual square
    x[1, 4] = 30.0
    x[1, 3] = 0.5
    weights = token_weights(x)
    assert weights.shape == (10,)
    torch.testing.assert_close(weights[0], torch.tensor(1e-5))
    assert weights[1:].tolist() == [1.0] * 9
    assert token_weights(torch.zeros(3, 4)).tolist() == [1.0] * 3
    assert token_weights(x[:1, :1]).tolist() == [1.0]


def test_a_norm_behind_a_linear_does_not_make_small_inputs_count(tiny: Callable[[str], Path]) -> None:
    """Gemma normalises what its MLP says: where that is next to nothing, gradients are immense and errors nothing."""
    block = blocks_of(tiny("Gemma2"))[2]
    (down,) = (x for x in block.module.linears if x.role == "down_proj")
    x = states(block.spec, rows=1, tokens=24).float()
    gradient = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    columns, weights = column_weights(block), dict(block.weights)
    _, usual = module_backward(block, x, gradient, columns)
    gate = next(y for y in block.module.linears if y.role == "gate_proj")
    direction = block.halves[0].pre(x)[0, 0]  # one token's gates close: a thousandth enters the second linear
    shift = torch.outer(direction, weights[gate.key].T @ direction) / direction.square().sum()
    block.set_weight(gate.key, weights[gate.key] - 0.999 * shift)
    _, closed = module_backward(block, x, gradient, columns)
    a, b = (kl / error for kl, error in (usual[down.role], closed[down.role]))
    assert b < 5 * a
