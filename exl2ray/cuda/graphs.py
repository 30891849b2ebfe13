"""CUDA graphs of the solver: the launches of a batch are recorded once per shape and replayed.

A launch costs 7 us from Python (`exl2ray.cuda.launch`) and a small product about 15, and a batch has thousands; replayed they
cost about a microsecond each. That matters for small batches only: experts, single options of narrow linears. Large ones keep
the GPU busy for longer than their launches take, and recording one takes as long as several hundred milliseconds.

Policy: batches of a shape of less than `SMALL` weights run launch by launch until `RECORD_AT` of them have been seen:
recording costs what some dozens of replays save, and most shapes of a quantised model come up a few times only. Then one is
recorded, if its buffers fit into what is left of `GRAPH_SHARE` of the device's memory, since they stay allocated. All others
go on launch by launch, with the same results. Where memory runs out all the same, `with_room` drops the recordings and tries
once more.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from exl2ray.cuda.device import device_bytes
from exl2ray.cuda.solver import Batch, Shape

GRAPH_SHARE = 0.2  # of the device's memory
SMALL = 100_000_000  # weights of a batch (rows times columns)
RECORD_AT = 16  # batches of one shape; at the first one, libraries would set themselves up inside the capture
CAPTURING = threading.Lock()  # held during a capture, and by whoever allocates pinned memory in another thread
T = TypeVar("T")


@dataclass
class _Recorded:
    batch: Batch
    graph: torch.cuda.CUDAGraph


@dataclass
class GraphCache:
    """Recorded batches of one process."""

    seen: Counter[Shape] = field(default_factory=Counter)
    record_at: int = RECORD_AT
    recorded: dict[tuple[Shape, int], _Recorded] = field(default_factory=dict)  # by shape and lane
    lane: int = 0  # of the work that goes on now (`exl2ray.cuda.lanes`)
    enabled: bool = True
    limit_bytes: int | None = None  # None: GRAPH_SHARE of the device

    def room(self, shape: Shape) -> bool:
        if shape.in_features * shape.columns > SMALL:
            return False
        limit = self.limit_bytes
        if limit is None:
            limit = int(device_bytes(shape.device) * GRAPH_SHARE)
        used = sum(s.nbytes for s, _ in self.recorded if s.device == shape.device)
        return used + shape.nbytes <= limit

    def clear(self) -> None:
        """Drops all recordings and their buffers."""
        self.seen.clear()
        self.recorded.clear()


CACHE = GraphCache()


def with_room(work: Callable[[], T], cache: GraphCache = CACHE) -> T:
    """``work()``; if the GPU runs out of memory, once more without recorded batches, whose buffers are then free.

    Nothing is recorded from then on. Recorded or launched one by one, a batch has the same results.
    """
    try:
        return work()
    except torch.OutOfMemoryError:
        if not cache.recorded:
            raise
    torch.cuda.synchronize()  # other lanes may be at work in these buffers
    cache.clear()
    cache.enabled = False
    gc.collect()
    torch.cuda.empty_cache()
    return work()


def run_batch(
    shape: Shape, r: Tensor | None, perm: Tensor, weights: Sequence[Tensor], bits: Tensor, cache: GraphCache = CACHE
) -> Batch:
    """Loads a problem into a batch of its shape and runs it; the results are in the batch's workspace."""
    return with_room(lambda: _run_batch(shape, r, perm, weights, bits, cache), cache)


def _run_batch(
    shape: Shape, r: Tensor | None, perm: Tensor, weights: Sequence[Tensor], bits: Tensor, cache: GraphCache
) -> Batch:
    found = cache.recorded.get((shape, cache.lane))
    if found is None and cache.enabled and cache.seen[shape] >= cache.record_at - 1 and cache.room(shape):
        found = cache.recorded[shape, cache.lane] = _record(shape, r, perm, weights, bits)
    if found is not None:
        found.batch.load(r, perm, weights, bits)
        found.graph.replay()
        return found.batch
    cache.seen[shape] += 1
    batch = Batch(shape)
    batch.load(r, perm, weights, bits)
    batch.run()
    return batch


def _record(shape: Shape, r: Tensor | None, perm: Tensor, weights: Sequence[Tensor], bits: Tensor) -> _Recorded:
    with torch.cuda.device(shape.device):
        batch = Batch(shape, own_factor=True)
        batch.load(r, perm, weights, bits)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(shape.device)
        # Other threads may allocate pinned memory meanwhile: that would spoil a capture in the default mode.
        with CAPTURING, torch.cuda.graph(graph, capture_error_mode="thread_local"):
            batch.run()
    return _Recorded(batch, graph)
