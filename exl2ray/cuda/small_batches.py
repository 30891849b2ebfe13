"""Batches of the solver that are too small for a GPU: recorded as CUDA graphs, and several at once on streams.

A solver batch is a chain of thousands of dependent kernels. With a few million weights, as an expert has them, each takes
the few microseconds that a kernel takes at least, and most of the GPU idles: 25 ms per expert of Qwen3-30B-A3B for 6.5 ms
of work. Against that there are two things here.

*Graphs.* A launch costs 7 us from Python (`exl2ray.cuda.launch`) and a small product about 15; replayed they cost about a
microsecond each. Large batches keep the GPU busy for longer than their launches take, and recording one takes as long as
several hundred milliseconds. So batches of a shape of less than `SMALL` weights run launch by launch until `RECORD_AT` of
them have been seen: recording costs what some dozens of replays save, waits for threads that lock memory, and most shapes of
a quantised model come up a few times only. Then one is recorded, if its buffers fit into what is left of `GRAPH_SHARE` of
the device's memory, since they stay allocated. Where memory runs out all the same, `with_room` drops the recordings and
tries once more.

*Streams.* Independent problems take turns on `COUNT` streams, with recordings of their own. The alternative, several experts
in one batch, needs R, U and the act-order per segment in the loop, in both backends and in every kernel with feedback. And
it would bind experts together, across the members of a group: that an input's linears form a batch which shapes alone
prescribe is what makes results independent of the number of workers.

No result depends on either.
"""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from exl2ray.cuda.solver import Batch, Shape, run_batch

GRAPH_SHARE = 0.2  # of the device's memory
SMALL = 100_000_000  # weights of a batch (rows times columns)
RECORD_AT = 16  # batches of one shape; at the first one, libraries would set themselves up inside the capture
CAPTURING = threading.Lock()  # held during a capture, and by whoever allocates pinned memory in another thread
COUNT = 4  # streams
_streams: dict[torch.device, list[torch.cuda.Stream]] = {}
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
    recorded: dict[tuple[Shape, int], _Recorded] = field(default_factory=dict)  # by shape and stream
    stream: int = 0  # number of that of the work that goes on now (`Streams`)
    enabled: bool = True
    limit_bytes: int | None = None  # None: GRAPH_SHARE of the device

    def room(self, shape: Shape) -> bool:
        """Whether a batch is small enough to be recorded, and its buffers fit within the limit."""
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
    torch.cuda.synchronize()  # other streams may be at work in these buffers
    cache.clear()
    cache.enabled = False
    gc.collect()
    torch.cuda.empty_cache()
    return work()


def run_recorded(
    shape: Shape, r: Tensor | None, perm: Tensor, weights: Sequence[Tensor], bits: Tensor, cache: GraphCache = CACHE
) -> Batch:
    """As `exl2ray.cuda.solver.run_batch`, from a recording where there is one; records where that pays."""
    return with_room(lambda: _run_recorded(shape, r, perm, weights, bits, cache), cache)


def _run_recorded(
    shape: Shape, r: Tensor | None, perm: Tensor, weights: Sequence[Tensor], bits: Tensor, cache: GraphCache
) -> Batch:
    found = cache.recorded.get((shape, cache.stream))
    if found is None and cache.enabled and cache.seen[shape] >= cache.record_at - 1 and cache.room(shape):
        found = cache.recorded[shape, cache.stream] = _record(shape, r, perm, weights, bits)
    if found is not None:
        found.batch.load(r, perm, weights, bits)
        found.graph.replay()
        return found.batch
    cache.seen[shape] += 1
    return run_batch(shape, r, perm, weights, bits)


def _record(shape: Shape, r: Tensor | None, perm: Tensor, weights: Sequence[Tensor], bits: Tensor) -> _Recorded:
    """Recorded on the stream that it will run on, unless that is the default one, which cannot be: a recording keeps the
    workspace that cuBLAS has for the stream, and recordings that run at the same time must not share it."""
    with torch.cuda.device(shape.device):
        current = torch.cuda.current_stream(shape.device)
        stream = None if current == torch.cuda.default_stream(shape.device) else current
        batch = Batch(shape, own_factor=True)
        batch.load(r, perm, weights, bits)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(shape.device)
        # Other threads may allocate pinned memory meanwhile: that would spoil a capture in the default mode.
        with CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            batch.run()
    return _Recorded(batch, graph)


def ahead(device: torch.device, wanted: bool = True) -> Streams:
    """A stream for what is needed next, beside what the current one does; where it is not ``wanted``, the current one."""
    return Streams(device, int(wanted), COUNT)


class Streams:
    """Takes turns: work inside the n-th ``turn()`` runs on stream n modulo their number.

    A context manager; work before it is finished for all streams, and on leaving it the current stream waits for all of them.
    Inside, a turn must not use what another turn made. On CPUs, and with one stream, work runs where it would anyway.

    first: number of the first stream. From COUNT on they are nobody else's, so that one of them goes on beside the current
    stream and those of its turns.
    """

    def __init__(self, device: torch.device, count: int, first: int = 0) -> None:
        self._streams: list[torch.cuda.Stream] = []
        self._turns, self._first = 0, first
        if device.type == "cuda" and (count > 1 or (first and count)):
            made = _streams.setdefault(device, [])
            made += [torch.cuda.Stream(device) for _ in range(first + count - len(made))]
            self._streams = made[first : first + count]

    def __enter__(self) -> Streams:
        for stream in self._streams:
            stream.wait_stream(torch.cuda.current_stream(stream.device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for stream in self._streams:
            torch.cuda.current_stream(stream.device).wait_stream(stream)

    @contextmanager
    def turn(self) -> Iterator[None]:
        if not self._streams:
            yield
            return
        number = self._turns % len(self._streams)
        self._turns += 1
        before, CACHE.stream = CACHE.stream, self._first + number
        try:
            with torch.cuda.stream(self._streams[number]):
                yield
        finally:
            CACHE.stream = before


def device_bytes(device: torch.device) -> int:
    """Memory of a GPU in bytes as torch may use it: a per-process fraction counts, what is free at the moment does not."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    total = int(torch.cuda.get_device_properties(index).total_memory)
    fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _: 1.0)(index)
    return int(total * float(fraction))
