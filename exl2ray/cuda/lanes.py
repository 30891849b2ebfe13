"""Independent small problems side by side on one GPU, each on a stream of its own.

A solver batch is a chain of thousands of dependent kernels. With a few million weights, as an expert has them, each kernel
takes the few microseconds that a kernel takes at least, and most of the GPU idles. Several chains at once fill it. Which
lane a problem is on changes nothing about its result: recorded batches have buffers per lane.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from exl2ray.cuda.graphs import CACHE

COUNT = 4
_streams: dict[torch.device, list[torch.cuda.Stream]] = {}


class Lanes:
    """Takes turns: work inside the n-th ``turn()`` runs on lane n modulo their number.

    A context manager; work before it is finished for all lanes, and on leaving it the current stream waits for all of them.
    Inside, a turn must not use what another turn made. On CPUs, and with one lane, work runs where it would anyway.
    """

    def __init__(self, device: torch.device, count: int = COUNT) -> None:
        self._lanes: list[torch.cuda.Stream] = []
        self._turns = 0
        if device.type == "cuda" and count > 1:
            made = _streams.setdefault(device, [])
            made += [torch.cuda.Stream(device) for _ in range(count - len(made))]
            self._lanes = made[:count]

    def __enter__(self) -> Lanes:
        for lane in self._lanes:
            lane.wait_stream(torch.cuda.current_stream(lane.device))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self._lanes:
            torch.cuda.current_stream(lane.device).wait_stream(lane)

    @contextmanager
    def turn(self) -> Iterator[None]:
        if not self._lanes:
            yield
            return
        number = self._turns % len(self._lanes)
        self._turns += 1
        before, CACHE.lane = CACHE.lane, number
        try:
            with torch.cuda.stream(self._lanes[number]):
                yield
        finally:
            CACHE.lane = before
