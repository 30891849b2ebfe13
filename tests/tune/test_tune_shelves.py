"""Modules that come and go: what is kept of them, when it comes back, and what is read meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from exl2ray.evaluate import forward
from exl2ray.evaluate.forward import Ahead
from exl2ray.tune import memory
from exl2ray.tune.module import TunedModule
from exl2ray.tune.opening import load_tuned, open_pair
from exl2ray.tune.shelves import Homes

CPU = torch.device("cpu")
Pairs = Callable[..., tuple[Path, Path]]


def gradients(module: TunedModule, seed: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(leaf.shape, generator=g) for leaf in module.leaves]


@pytest.mark.parametrize("room", [1 << 30, 0], ids=["memory", "file"])
def test_a_module_that_was_away_takes_the_steps_of_one_that_stayed(pair: Pairs, tmp_path: Path, room: int) -> None:
    source, exl2 = pair("Qwen2")
    found = open_pair(exl2, source)
    spec = found.start.spec.modules[1]
    rate = torch.tensor(0.05)
    stayed, homes = load_tuned(found, spec, CPU, torch.float32), Homes(tmp_path, room)
    homes.keep(load_tuned(found, spec, CPU, torch.float32))
    for step in range(3):
        module = load_tuned(found, spec, CPU, torch.float32, latents=homes.latents(stayed.key))
        homes.back(module, step)
        for ours, plain in zip(module.leaves, stayed.leaves, strict=True):
            assert torch.equal(ours, plain)
        for each in (stayed, module):
            each.update(gradients(each, step), rate, rate)
            each.updated(each)
    assert stayed.state().keys() == homes.state(stayed.key).keys()
    for name, tensor in homes.state(stayed.key).items():
        assert torch.equal(tensor, stayed.state()[name]), name


def test_moments_come_back_only_for_a_step(pair: Pairs, tmp_path: Path) -> None:
    source, exl2 = pair("Llama")
    found = open_pair(exl2, source)
    spec = found.start.spec.modules[1]
    homes, rate = Homes(tmp_path, 1 << 30), torch.tensor(0.05)
    first = load_tuned(found, spec, CPU, torch.float32)
    first.update(gradients(first, 0), rate, rate)
    homes.keep(first)
    module = load_tuned(found, spec, CPU, torch.float32, latents=homes.latents(first.key))
    homes.back(module, 1)
    moments = [name for name in module.state() if not name.startswith("now/")]
    assert moments
    assert not any(module.state()[name].any() for name in moments)
    module.updating(module)
    assert all(torch.equal(module.state()[name], first.state()[name]) for name in moments)


@pytest.mark.parametrize("room", [1 << 14, 1 << 18, 1 << 22, 1 << 26])
def test_memory_is_taken_in_powers_of_two_and_no_more_than_there_is(
    room: int, pair: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch rounds page-locked memory up: 48 GB that were counted took 64."""
    source, exl2 = pair("Llama")
    found, taken, empty = open_pair(exl2, source), list[int](), torch.empty

    def counted(*shape: Any, pin_memory: bool | None = None, **given: Any) -> Tensor:
        if pin_memory is not None:
            taken.append(4 * shape[0])
        return empty(*shape, **given)

    monkeypatch.setattr(torch, "empty", counted)
    homes, kept = Homes(tmp_path, room), 0
    for spec in found.start.spec.modules[1:-1]:
        homes.keep(module := load_tuned(found, spec, CPU, torch.float32))
        kept += sum(4 * t.numel() for t in module.state().values())
    assert sum(taken) <= room
    assert all(n.bit_count() == 1 for n in taken)
    in_memory = kept - homes.file_bytes
    assert in_memory > (room / 4 if room < kept else kept - 1)
    assert sum(taken) < 3 * in_memory, "for a small model no block as for a large one"


@pytest.mark.parametrize("again", [True, False])
def test_the_first_modules_are_read_behind_the_last(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Sequence[str]] = []
    monkeypatch.setattr(forward, "read_ahead", lambda source, pin: SimpleNamespace(fetch=asked.append))
    monkeypatch.setattr(forward, "whole_tensors", lambda module: [module])
    model: Any = SimpleNamespace(spec=SimpleNamespace(modules=["a", "b", "c", "d"]), quantized=False, source=None)
    ahead = Ahead(model, torch.device("cuda"), again=again)
    for index in range(4):
        ahead.at(index)
    assert [list(names) for names in asked] == [
        ["a", "b", "c"], ["b", "c", "d"], ["c", "d", *("a" * again)], ["d", *("ab" if again else "")]
    ]  # fmt: skip


def test_a_part_of_a_gpu_is_as_small_as_a_small_gpu(pair: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    source, exl2 = pair("Llama")
    spec = open_pair(exl2, source).start.spec
    least = memory.needed_bytes(spec)
    for total, streamed in ((least, False), (least - 1, True)):
        monkeypatch.setattr(memory, "device_bytes", lambda device, total=total: total)
        assert memory.room_for(spec, torch.device("cuda"), None).streamed is streamed


def test_integers_that_are_latents_are_not_read_again(pair: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    source, exl2 = pair("Llama")
    found = open_pair(exl2, source)
    spec = found.start.spec.modules[1]
    key = spec.linears[0].key
    whole, without = found.exl2.linear(key), found.exl2.linear(key, integers=False)
    assert without.q_weight.is_meta
    assert (without.layout, without.out_features) == (whole.layout, whole.out_features)
    module = load_tuned(found, spec, CPU, torch.float32)
    latents = {name: x.latents for name, x in module.linears.items() if x.latents is not None}
    read: list[str] = []
    plain = found.exl2.load
    monkeypatch.setattr(found.exl2, "load", lambda name, *given, **named: read.append(name) or plain(name, *given, **named))
    again = load_tuned(found, spec, CPU, torch.float32, latents=latents)
    assert read
    assert not [name for name in read if name.endswith("q_weight")]
    for ours, theirs in zip(again.leaves, module.leaves, strict=True):
        assert torch.equal(ours, theirs)
