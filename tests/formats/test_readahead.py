"""Reading in the background: the same tensors, memory used again, errors where they are understood."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exl2ray.errors import SourceError
from exl2ray.formats import readahead
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.readahead import ReadAhead

TENSORS = {name: torch.full((4, 8), float(i)) for i, name in enumerate("abcd")}


@pytest.fixture
def source(tmp_path: Path) -> SourceModel:
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"]}))
    return SourceModel(tmp_path)


class Memory(bytearray):
    """What a tensor is read into; can be watched."""


class Memories:
    """Allocates, and counts what is alive at every allocation."""

    def __init__(self) -> None:
        self.made: list[weakref.ref[Memory]] = []
        self.alive: list[int] = []

    def __call__(self, nbytes: int) -> torch.Tensor:
        gc.collect()
        self.alive.append(sum(m() is not None for m in self.made))
        memory = Memory(nbytes)
        self.made.append(weakref.ref(memory))
        return torch.frombuffer(memory, dtype=torch.uint8)


def test_fetched_tensors_are_handed_out_once(source: SourceModel) -> None:
    memories = Memories()
    ahead = ReadAhead(source, check=lambda name, t: None, allocate=memories)
    ahead.fetch(["a", "b"])
    for _ in range(2):  # the second time it is read anew
        assert torch.equal(ahead.load("a"), TENSORS["a"])
    assert not ahead.checked("a")
    assert torch.equal(ahead.load("b"), TENSORS["b"])
    assert ahead.checked("b")
    assert torch.equal(ahead.load("c", slice(1, 3)), TENSORS["c"][1:3])
    assert len(memories.made) == 2


class AtOnce:
    """A pool whose threads are as fast as can be."""

    def __init__(self, threads: int, thread_name_prefix: str) -> None: ...

    def submit(self, call: Callable[[str], torch.Tensor], name: str) -> Future[torch.Tensor]:
        done: Future[torch.Tensor] = Future()
        done.set_result(call(name))
        return done


def test_what_is_dropped_is_free_before_more_is_read(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Page-locked memory is taken from what was given back, if there is any; locking more stops the GPU."""
    monkeypatch.setattr(readahead, "ThreadPoolExecutor", AtOnce)
    memories = Memories()
    ahead = ReadAhead(source, allocate=memories)
    ahead.fetch(["a", "b"])
    ahead.wait()
    ahead.fetch(["b", "c"])
    ahead.wait()
    assert memories.alive == [0, 1, 1]  # a is gone, b is kept
    ahead.fetch(["c", "b"])
    ahead.wait()
    assert len(memories.made) == 3
    assert torch.equal(ahead.load("c"), TENSORS["c"])
    assert torch.equal(ahead.load("b"), TENSORS["b"])


def test_errors_come_up_when_the_tensor_is_used(source: SourceModel) -> None:
    def check(name: str, tensor: torch.Tensor) -> None:
        raise SourceError("in the background")

    def refuse(nbytes: int) -> torch.Tensor:
        raise RuntimeError("no memory to lock")

    for ahead in (ReadAhead(source, check), ReadAhead(source, allocate=refuse)):
        ahead.fetch(["a", "missing"])
        assert torch.equal(ahead.load("a"), TENSORS["a"])
        assert not ahead.checked("a")
        with pytest.raises(SourceError, match="missing"):
            ahead.load("missing")
