"""Reading weights as a group: every member reads a part of each tensor, and gets the rest from the others."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from exl2ray.formats.readahead import Reading
from exl2ray.model.blocks import Block
from exl2ray.model.spec import ModuleSpec
from exl2ray.model.weights import READERS, pinned, whole_tensors
from exl2ray.quant.group import Comm
from exl2ray.team.runner import Runner

AHEAD = 6  # modules of which parts are read in advance
SHARED_BYTES = 1 << 20  # smaller tensors are read by everybody


class SharedReading(Reading):
    """Weights of a model for all members of a group, which load the same tensors in the same order.

    Tensors that were fetched in advance come complete, on the device; others are read as usual.
    Reading may begin before the group has met (`meet`), which takes most of a second between GPUs.
    """

    def __init__(self, run: Runner, rank: int, size: int) -> None:
        super().__init__(run.source)
        self._rank, self._size, self._device = rank, size, run.device
        self._comm: Comm | None = None
        self._modules: Sequence[ModuleSpec] = run.spec.modules
        self._allocate = pinned if run.device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-shared")
        self._parts: dict[str, Future[Tensor]] = {}

    def meet(self, comm: Comm) -> SharedReading:
        """From now on tensors can be loaded."""
        if (comm.rank, comm.size) != (self._rank, self._size):
            raise AssertionError("parts are read for another group")
        self._comm = comm
        return self

    def expect(self, index: int, stop: int | None = None) -> None:
        """Starts to read this member's parts of the modules from ``index`` on, up to ``stop``."""
        for module in self._modules[index : index + AHEAD][: None if stop is None else max(0, stop - index)]:
            for name in whole_tensors(module):
                if name not in self._parts and name in self.source and self._shared(name):
                    self._parts[name] = self._pool.submit(self._read, name)

    def _shared(self, name: str) -> bool:
        info = self.source.info(name)
        return info.nbytes >= SHARED_BYTES and info.shape[0] >= self._size**2

    def _read(self, name: str) -> Tensor:
        return self.source.load(name, self._rows(name, self._rank), self._allocate)

    def _rows(self, name: str, rank: int) -> slice:
        """The first dimension's part of a member; none is empty."""
        rows = self.source.shape(name)[0]
        size = -(-rows // self._size)
        return slice(rank * size, min((rank + 1) * size, rows))

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        future = self._parts.pop(name, None) if rows is None else None
        if future is None:
            return self.source.load(name, rows)
        if self._comm is None:
            raise AssertionError("the group has not met")
        part, comm = future.result(), self._comm
        whole = torch.empty(self.source.shape(name), dtype=part.dtype, device=self._device)
        mine = whole[self._rows(name, comm.rank)]
        mine.copy_(part, non_blocking=True)
        others = [r for r in range(comm.size) if r != comm.rank]
        comm.exchange([(mine, r) for r in others], [(whole[self._rows(name, r)], r) for r in others])
        return whole

    def __enter__(self) -> SharedReading:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._parts.clear()


def shared_embedding(run: Runner, comm: Comm) -> Block:
    """Module 0, of which every member of a group reads a part; all members call it."""
    module = run.spec.modules[0]
    if comm.size == 1:
        return run.load(module)
    with SharedReading(run, comm.rank, comm.size) as reading:
        reading.meet(comm).expect(0, 1)
        return run.load_from(reading, module)
