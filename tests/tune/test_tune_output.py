"""Tensors of the output are made while the ones before them are written."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from exl2ray.formats.shards import TensorEntry
from exl2ray.tune.output import SIDE_BY_SIDE, ahead

COUNT = 3 * SIDE_BY_SIDE + 5


def test_tensors_come_in_their_order_and_few_at_a_time() -> None:
    made: list[int] = []
    lock = threading.Lock()

    def make(i: int) -> Tensor:
        with lock:
            made.append(i)
        return torch.full((2,), i)

    entries = [TensorEntry(f"t{i}", "I64", (2,), lambda i=i: make(i)) for i in range(COUNT)]  # type: ignore[misc]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        for i, entry in enumerate(ahead(entries, pool)):
            assert (entry.name, entry.dtype, entry.shape) == (f"t{i}", "I64", (2,))
            assert torch.equal(entry.load(), torch.full((2,), i))
            with lock:
                assert max(made) <= i + SIDE_BY_SIDE
    assert sorted(made) == list(range(COUNT))


def test_what_cannot_be_made_is_told_where_it_is_written() -> None:
    def fail() -> Tensor:
        raise ValueError("broken")

    zeros = torch.zeros(2, dtype=torch.int64)
    entries = [TensorEntry("sound", "I64", (2,), lambda: zeros), TensorEntry("not", "I64", (2,), fail)]
    with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
        sound, broken = ahead(entries, pool)
        assert torch.equal(sound.load(), zeros)
        with pytest.raises(ValueError, match="broken"):
            broken.load()
