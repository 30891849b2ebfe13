"""A step of training: its gradients against autograd over the whole model; integers and gains; sums along the tree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from thread_comm import together
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from exl2ray.evaluate import forward
from exl2ray.evaluate.forward import Ahead
from exl2ray.formats.readahead import ReadAhead
from exl2ray.model.weights import read_ahead
from exl2ray.quant.group import Solo
from exl2ray.quant.pack import dequantize
from exl2ray.tune import divergence, training
from exl2ray.tune.evaluating import Evaluator
from exl2ray.tune.gains import Gain
from exl2ray.tune.grid import REACH
from exl2ray.tune.module import TunedModule
from exl2ray.tune.opening import Pair, load_source, load_tuned, open_pair
from exl2ray.tune.sums import TreeOfSums
from exl2ray.tune.training import Rates, Trainer, schedule

CPU = torch.device("cpu")
FAMILIES = ["Llama", "Mixtral", "Cohere", "Gemma2", "Qwen2"]  # sequential, experts, parallel, softcaps and offsets, biases
Pairs = Callable[..., tuple[Path, Path]]


class Recording(TunedModule):
    """Keeps the gradients instead of taking a step."""

    found: list[Tensor | None]

    def update(self, gradients: Sequence[Tensor | None], rate: Tensor, gain_rate: Tensor) -> None:
        self.found = [None if g is None else g.clone() for g in gradients]


def opened(pair: Pairs, family: str) -> Pair:
    source, exl2 = pair(family)
    return open_pair(exl2, source)


def trainer(found: Pair, recording: bool = True) -> Trainer:
    modules = [load_tuned(found, m, CPU, torch.float32) for m in found.start.spec.modules]
    if recording:
        modules = [Recording(m.block, m.linears, list(m.gains.values())) for m in modules]
    source = [load_source(found, m, CPU) for m in found.start.spec.modules]
    return Trainer(modules, source, CPU, int(found.start.bos_id is not None))


def token_ids(found: Pair, rows: int = 6, length: int = 20) -> Tensor:
    return torch.randint(0, found.start.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


def test_tensors_that_were_read_ahead_are_the_same(pair: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, without its pinned memory; on a CPU nothing is."""
    found = opened(pair, "Llama")
    assert Ahead(found.source, CPU).at(0) is None
    assert Ahead(found.start, torch.device("cuda")).at(0) is None
    monkeypatch.setattr(forward, "read_ahead", lambda source, pin: read_ahead(source, pin=False))
    ahead, taken, plain = Ahead(found.source, torch.device("cuda")), [], ReadAhead.load

    def load(self: ReadAhead, name: str, *rows: slice) -> Tensor:
        taken.append(name)
        return plain(self, name, *rows)

    monkeypatch.setattr(ReadAhead, "load", load)
    for m in found.start.spec.modules:
        early, late = load_source(found, m, CPU, ahead.at(m.index)), load_source(found, m, CPU)
        assert all(torch.equal(early.weights[k], w) for k, w in late.weights.items())
    for m in found.start.spec.modules:
        first = load_tuned(found, m, CPU, torch.float32, ahead=ahead.at(m.index))
        again = load_tuned(found, m, CPU, torch.float32)
        assert all(torch.equal(x.latents, again.linears[k].latents) for k, x in first.linears.items())
    ahead.end()
    assert "model.layers.1.mlp.down_proj.weight" in taken


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_those_of_the_whole_model(pair: Pairs, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(pair, family)
    mine, ids = trainer(found), token_ids(found)
    monkeypatch.setattr(divergence, "LOGITS_AT_ONCE", 7 * found.start.vocab_size)  # a few positions at a time
    loss = mine.step(ids, Rates(1e-3, 1e-3))

    x = y = ids
    for module, block in zip(mine.modules, mine.source, strict=True):
        x, y = module.block.forward(x), block.forward(y)
    p, q = (t[:, mine.skip :].log_softmax(-1) for t in (y, x))
    expected_loss = (p.exp() * (p - q)).sum(-1).mean()
    leaves = [leaf for m in mine.modules for leaf in m.leaves]
    expected = torch.autograd.grad(expected_loss, leaves, allow_unused=True)
    assert float(loss) == pytest.approx(float(expected_loss.detach()), rel=1e-5)
    assert float(loss) > 1e-5
    gradients = [g for m in mine.modules if m.trained for g in m.found]  # type: ignore[attr-defined]
    assert len(gradients) == len(expected) > 10
    for g, e in zip(gradients, expected, strict=True):
        assert g is not None
        if e is None:  # of an expert that saw no token
            assert not g.any()
        else:
            assert float((g - e).norm()) <= 1e-4 * float(e.norm()) + 1e-9
    assert any(e is not None and float(e.norm()) > 0 for e in expected)


def test_the_same_numbers_whether_graphs_are_kept_or_modules_computed_again(
    pair: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, results = opened(pair, "Llama"), []
    for room in (1 << 40, 0):
        monkeypatch.setattr(training, "GRAPH_BYTES_ON_CPU", room)
        one = trainer(found, recording=False)
        for _ in range(2):
            one.step(token_ids(found), Rates(2e-3, 2e-3))
        results.append([p.clone() for m in one.modules for p in m.state().values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_steps_lower_the_divergence(pair: Pairs) -> None:
    found = opened(pair, "Llama")
    one, ids = trainer(found, recording=False), token_ids(found, 8, 32)
    evaluate = Evaluator(ids, one.source, CPU, one.skip, Solo())
    before = evaluate([m.block for m in one.modules]).mean()
    for step in range(12):
        one.step(ids, Rates(2e-2, 5e-3, schedule(step, 12, 2)))
    assert float(evaluate([m.block for m in one.modules]).mean()) < 0.8 * float(before)


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Qwen2"])
def test_a_step_changes_the_weights_where_they_lie(pair: Pairs, family: str) -> None:
    found = opened(pair, family)
    one = trainer(found, recording=False)
    before = [(leaf, leaf.detach().clone()) for m in one.modules for leaf in m.leaves]
    one.step(token_ids(found), Rates(0.3, 0.05))
    assert [leaf.data_ptr() for m in one.modules for leaf in m.leaves] == [leaf.data_ptr() for leaf, _ in before]
    assert sum(not torch.equal(leaf, was) for leaf, was in before) > len(before) // 2
    for module in one.modules:  # what a block computes with is what would be stored
        for key, x in module.linears.items():
            assert torch.equal(module.block.weights[key], x.grid.weight(x.grid.rounded(x.latents)).float())
            assert module.block.weights[key].data_ptr() == module.leaves[list(module.linears).index(key)].data_ptr()


@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_integers_come_back_as_they_were_packed(pair: Pairs, family: str) -> None:
    found = opened(pair, family)
    for module in found.start.spec.modules:
        for key, x in load_tuned(found, module, CPU, torch.float32).linears.items():
            integers = x.grid.integers(x.before)
            columns = x.grid.columns
            assert torch.equal(x.grid.weight(integers), dequantize(x.before)[:, :columns]), key
            assert torch.equal(x.grid.rounded(x.latents.clone()), integers), key
            assert float((x.latents - integers).abs().max()) <= REACH + 1e-6
            assert torch.equal(x.grid.packed(x.before, x.grid.codes(integers)).q_weight, x.before.q_weight), key


def test_integers_that_moved_are_what_the_loader_decodes_and_stay_in_the_range_of_their_width(pair: Pairs) -> None:
    found = opened(pair, "Llama")
    x = load_tuned(found, found.start.spec.modules[-1], CPU, torch.float32).linears["lm_head"]
    moved = x.latents + 40 * torch.randn(x.latents.shape, generator=torch.Generator().manual_seed(0))
    integers = x.grid.rounded(moved)
    assert bool((integers >= x.grid.low).all())
    assert bool((integers <= x.grid.high).all())
    packed = x.grid.packed(x.before, x.grid.codes(integers))
    assert torch.equal(dequantize(packed)[:, : x.grid.columns], x.grid.weight(integers))
    assert not torch.equal(packed.q_weight, x.before.q_weight)
    padded = slice(x.grid.columns, None)
    assert torch.equal(dequantize(packed)[:, padded], dequantize(x.before)[:, padded])


def test_gains_of_heads_that_share_a_weight_stay_shared() -> None:
    stored = torch.tensor([[1.0, -0.5, 0.0]]).half().repeat(4, 1)
    gain = Gain.of("q_norm", "q_norm", stored, 1.0, CPU)
    assert gain.delta.shape == (1, 3)
    assert torch.equal(gain.value(), stored)
    gradient = gain.gradient(torch.ones(4, 3))
    torch.testing.assert_close(gradient, 4 * gain.scale)
    gain.delta += torch.tensor([[0.1, -0.1, 0.2]])
    assert gain.value().shape == (4, 3)
    assert bool((gain.value() == gain.value()[:1]).all())
    torch.testing.assert_close(gain.value()[0].float(), torch.tensor([1.2, -0.55, 0.2]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8])
def test_sums_along_the_tree(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    shares = [[torch.randn(5, generator=g), torch.randn(3, generator=g)] for i in range(count)]
    tree = TreeOfSums()
    for i in torch.randperm(count, generator=g).tolist():
        tree.add(i, [t.clone() for t in shares[i]])
    for found, level in zip(tree.total(), map(list, zip(*shares, strict=True)), strict=True):
        while len(level) > 1:
            level = [level[i] + level[i + 1] if i + 1 < len(level) else level[i] for i in range(0, len(level), 2)]
        assert torch.equal(found, level[0])


@pytest.mark.parametrize("rows", [6, 3])
@pytest.mark.parametrize("family", ["Llama", "Mixtral"])
def test_groups_take_the_same_steps_as_one_worker(
    pair: Pairs, family: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(pair, family)
    skip = int(found.start.bos_id is not None)
    # The members are threads here, and what form of attention is taken is a setting of the whole process.
    monkeypatch.setattr(Trainer, "_attention", lambda self, module: nullcontext())

    def states(comm: Any) -> tuple[dict[str, Tensor], list[float]]:
        modules = [load_tuned(found, m, CPU, torch.float32, rank=comm.rank, size=comm.size) for m in found.start.spec.modules]
        one = Trainer(modules, [load_source(found, m, CPU) for m in found.start.spec.modules], CPU, skip, comm=comm)
        losses = [sum(comm.gather(float(one.step(token_ids(found, rows), Rates(2e-2, 5e-3))))) for _ in range(2)]
        owned = {f"{m.key} {name}": p for m in modules for name, p in m.state().items()}
        leaves = {f"{m.key} {i}": leaf.detach() for m in modules for i, leaf in enumerate(m.leaves)}
        return {**owned, **{f"leaf {n}": t for n, t in leaves.items()}}, losses

    with sdpa_kernel(SDPBackend.MATH):
        alone, losses = states(Solo())
        groups = {size: together(size, states) for size in (2, 3, 4)}
    assert losses[1] < losses[0]
    for size, members in groups.items():
        shared: dict[str, Tensor] = {}
        for mine, said in members:
            assert said == pytest.approx(losses, rel=1e-12)
            for name, t in mine.items():
                assert torch.equal(t, alone[name]), (size, name)
                assert name.startswith("leaf") or name not in shared  # the optimiser's state lies with one of them
                shared[name] = t
        assert shared.keys() == alone.keys()


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule(step, 100, 20) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == rates[19] == 1.0
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert 0 < rates[-1] < 0.01
