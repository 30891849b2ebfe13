"""When a batch is recorded: often enough seen, small, and with room for its buffers. Recording itself needs a GPU."""

from __future__ import annotations

from typing import Any

import kernel_checks as checks
import pytest
import torch

from exl2ray.cuda import small_batches
from exl2ray.cuda.small_batches import GraphCache, run_recorded
from exl2ray.cuda.solver import Shape
from exl2ray.quant.hessian import prepare


class Replayed:
    def __init__(self, batch: Any) -> None:
        self.batch, self.graph = batch, self

    def replay(self) -> None:
        self.batch.run()


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[Shape]:
    """Shapes in the order in which they are recorded; what is recorded runs as usual."""
    found: list[Shape] = []

    def record(shape: Shape, *problem: Any) -> Replayed:
        found.append(shape)
        return Replayed(small_batches.Batch(shape, own_factor=True))

    monkeypatch.setattr(small_batches, "_record", record)
    return found


def rounds(cache: GraphCache, count: int, columns: int = 32) -> list[torch.Tensor]:
    """Weights of the same problem, solved ``count`` times."""
    h, (w,) = checks.problem(64, [columns], 1)
    factor = prepare(h)
    shape = Shape(64, (32, 32), (columns,), (1,), True, False, w.device)
    bits = torch.tensor([[4, 3]], dtype=torch.int32)
    return [run_recorded(shape, factor.r, factor.perm, [w], bits, cache).ws.dq.clone() for _ in range(count)]


def test_a_shape_is_recorded_once_it_has_come_up_often(recordings: list[Shape]) -> None:
    cache = GraphCache(limit_bytes=1 << 30)
    found = rounds(cache, small_batches.RECORD_AT - 1)
    assert not recordings
    found += rounds(cache, 3)
    assert len(recordings) == 1
    assert all(torch.equal(found[0], other) for other in found[1:])
    rounds(cache, 2, columns=64)  # another shape has its own count
    assert len(recordings) == 1


def test_no_recording_without_room_or_of_large_batches(recordings: list[Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    rounds(GraphCache(limit_bytes=1000), small_batches.RECORD_AT + 2)
    monkeypatch.setattr(small_batches, "SMALL", 64 * 32 - 1)
    rounds(GraphCache(limit_bytes=1 << 30), small_batches.RECORD_AT + 2)
    assert not recordings


def test_without_memory_recordings_are_dropped(recordings: list[Shape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Once more then; and nothing is recorded from then on."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    cache = GraphCache(limit_bytes=1 << 30)
    rounds(cache, small_batches.RECORD_AT)
    tried: list[int] = []

    def work() -> str:
        tried.append(len(cache.recorded))
        if len(tried) == 1:
            raise torch.OutOfMemoryError("none left")
        return "done"

    assert small_batches.with_room(work, cache) == "done"
    assert tried == [1, 0]
    rounds(cache, small_batches.RECORD_AT + 1)
    assert len(recordings) == 1

    def hopeless() -> None:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError):
        small_batches.with_room(hopeless, cache)
