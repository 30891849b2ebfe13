"""Inputs with little to write share a file."""

from __future__ import annotations

import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2ray.formats.layout import GroupLayout
from exl2ray.quant.gptq import Quantized
from exl2ray.quant.pack import pack
from exl2ray.store.open import open_store
from exl2ray.store.tensors import get_tensors, put_tensors
from exl2ray.team import packed_files
from exl2ray.team.packed_files import PackedFiles, Writers


class AtOnce:
    """Writers that write at once."""

    def __init__(self, root: Path) -> None:
        self.store = open_store(str(root))

    def write(self, rel: str, tensors: dict[str, torch.Tensor]) -> Any:
        return put_tensors(self.store, rel, tensors)


def linear(key: str) -> Any:
    codes = torch.randint(0, 16, (64, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(len(key)))
    layout = GroupLayout((4, 4), (32, 32))
    scale_max = torch.ones(2, dtype=torch.float16)
    scales = torch.ones(2, 32, dtype=torch.uint8)
    return pack(key, Quantized(layout, torch.arange(64), codes, scales, scale_max, codes.half()))


@pytest.mark.parametrize(("least", "count"), [(1, 7), (2000, 4), (1 << 20, 1)])
def test_everything_is_written_once(least: int, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_files, "LEAST_BYTES", least)
    run = AtOnce(tmp_path)
    made = {f"w{i}": linear(f"expert.{i}") for i in range(7)}
    files = PackedFiles(run, "quant/4.0", "model.layers.0.mlp", "ab" * 32)  # type: ignore[arg-type]
    for pair in (("w0", "w1", "w2"), ("w3", "w4"), ("w5",), ("w6",)):
        files.add({made[name].key: made[name] for name in pair})
    found = files.flush()
    assert len(found) == count
    assert set(found) <= {p.key for p in made.values()}
    read: dict[str, torch.Tensor] = {}
    for ref in found.values():
        tensors = get_tensors(run.store, ref.rel, expect=ref)  # type: ignore[attr-defined, arg-type]
        assert not read.keys() & tensors.keys()
        read.update(tensors)
    expected = {name: t for p in made.values() for name, t in p.tensors().items()}
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], t) for name, t in expected.items())
    assert files.flush() is found  # nothing is left


def test_threads_that_write_end_with_their_pool(tmp_path: Path) -> None:
    """One that converts many models in a process would gather them, and on GPUs their pinned memory."""
    before = set(threading.enumerate())
    writers = Writers(open_store(str(tmp_path)), torch.device("cpu"))
    writers.write("a.safetensors", {"a": torch.zeros(3)}).result()
    own = set(threading.enumerate()) - before
    assert own
    del writers
    gc.collect()
    for thread in own:
        thread.join(60)
        assert not thread.is_alive()
