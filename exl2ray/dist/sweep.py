"""Running the source model as a group, so that every member gets the states that its work begins with.

Work on reference states is independent but for the states at the entry of a module (`exl2ray.dist.fan`). A worker alone has to
run every module before its own, and to read it, which takes longer. A group shares both out: every member runs its own rows
(`exl2ray.quant.rows`), and reads its own part of each weight, the rest of which comes from the others. Between GPUs of one
machine that is many times faster than reading. Batches are those of a worker alone, so the states have the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.dist.comm import Comm
from exl2ray.dist.items import SweepItem
from exl2ray.dist.runner import Runner
from exl2ray.dist.tree import owner_shares
from exl2ray.model.spec import ModuleSpec
from exl2ray.model.weights import READERS, pinned, whole_tensors
from exl2ray.quant.rows import SHARES, share_rows

AHEAD = 6  # modules of which parts are read in advance
SHARED_BYTES = 1 << 20  # smaller tensors are read by everybody


class SharedReading:
    """Weights of a model for all members of a group, which load the same tensors in the same order.

    Stands in for a SourceModel. Tensors that were fetched in advance come complete, on the device; the others are read as usual.
    """

    def __init__(self, run: Runner, comm: Comm) -> None:
        self._source, self._comm, self._device = run.source, comm, run.device
        self._modules: Sequence[ModuleSpec] = run.spec.modules
        self._allocate = pinned if run.device.type == "cuda" else None
        self._pool = ThreadPoolExecutor(READERS, thread_name_prefix="read-shared")
        self._parts: dict[str, Future[Tensor]] = {}
        self.path: Path = run.source.path

    def expect(self, index: int, stop: int | None = None) -> None:
        """Starts to read this member's parts of the modules from ``index`` on, up to ``stop``."""
        for module in self._modules[index : index + AHEAD][: None if stop is None else max(0, stop - index)]:
            for name in whole_tensors(module):
                if name not in self._parts and name in self._source and self._shared(name):
                    self._parts[name] = self._pool.submit(self._read, name)

    def wait(self) -> None:
        """Until all parts that were asked for have been read, or have failed."""
        wait(self._parts.values())

    def _shared(self, name: str) -> bool:
        info = self._source.info(name)
        return info.nbytes >= SHARED_BYTES and info.shape[0] >= self._comm.size**2

    def _read(self, name: str) -> Tensor:
        return self._source.load(name, self._rows(name, self._comm.rank), self._allocate)

    def _rows(self, name: str, rank: int) -> slice:
        """The first dimension's part of a member; none is empty."""
        rows = self._source.shape(name)[0]
        size = -(-rows // self._comm.size)
        return slice(rank * size, min((rank + 1) * size, rows))

    def load(self, name: str, rows: slice | None = None) -> Tensor:
        future = self._parts.pop(name, None) if rows is None else None
        if future is None:
            return self._source.load(name, rows)
        part, comm = future.result(), self._comm
        whole = torch.empty(self._source.shape(name), dtype=part.dtype, device=self._device)
        mine = whole[self._rows(name, comm.rank)]
        mine.copy_(part, non_blocking=True)
        others = [r for r in range(comm.size) if r != comm.rank]
        comm.exchange([(mine, r) for r in others], [(whole[self._rows(name, r)], r) for r in others])
        return whole

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def dtype(self, name: str) -> str:
        return self._source.dtype(name)

    def __contains__(self, name: object) -> bool:
        return name in self._source

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._parts.clear()


def states_at(run: Runner, comm: Comm, reading: SharedReading, item: SweepItem) -> tuple[int, Tensor] | None:
    """(index of a module, states at its entry) of this member's stop; None if it has none. All members call it."""
    own = next((index for index, rank in item.stops if rank == comm.rank), None)
    if own is not None:
        run.expect(own)  # what this member goes on with
    last = max(index for index, _ in item.stops)
    reading.expect(0, last)
    states = run.embedded(item.rows, run.load_from(reading, run.spec.modules[0]))
    ranges = share_rows(len(states))
    shares = {s: states[ranges[s].start : ranges[s].stop].clone() for s in owner_shares(comm.rank, comm.size)}
    del states
    found = None
    for module in run.spec.modules[1 : last + 1]:
        for index, rank in item.stops:
            if index == module.index:
                collected = _collect(run, comm, shares, ranges, rank)
                found = found if collected is None else (index, collected)
        if module.index == last:
            break
        reading.expect(module.index, last)
        block = run.load_from(reading, module)
        shares = {
            s: run.advance(block, x, run.settings(module, x, item.shrink)) if len(x) else x for s, x in shares.items()
        }
    reading.close()
    return found


def _collect(run: Runner, comm: Comm, shares: dict[int, Tensor], ranges: list[range], to: int) -> Tensor | None:
    """All rows of the states, for one member; None for the others."""
    if comm.rank != to:
        comm.exchange([(x.to(run.device).contiguous(), to) for x in shares.values()], [])
        return None
    some = next(iter(shares.values()))
    rows, (_, tokens, hidden) = ranges[SHARES - 1].stop, some.shape
    nbytes = rows * tokens * hidden * some.element_size()
    out = torch.empty(rows, tokens, hidden, dtype=some.dtype, device=run.home(nbytes))
    for source in range(comm.size):
        own = owner_shares(source, comm.size)
        places = [out[ranges[s].start : ranges[s].stop] for s in own]
        if source == comm.rank:
            for s, place in zip(own, places, strict=True):
                place.copy_(shares[s])
            continue
        received = [torch.empty_like(p, device=run.device) if p.device.type != run.device.type else p for p in places]
        comm.exchange([], [(t, source) for t in received])
        for t, place in zip(received, places, strict=True):
            if t is not place:
                place.copy_(t)
    return out
