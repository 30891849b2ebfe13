"""A group whose members are threads of the test's process."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WAITING_SECONDS = 300.0  # for another member, on a machine that is busy with other things


class Threads:
    """A Comm between threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=WAITING_SECONDS)
        self.said: list[Any] = [None] * size
        self.mail: dict[tuple[int, int], queue.Queue[Tensor]] = {
            (a, b): queue.Queue() for a in range(size) for b in range(size)
        }

    def member(self, rank: int) -> Any:
        return _Member(self, rank)


class _Underway:
    def __init__(
        self, member: _Member, number: int, sent: list[tuple[Tensor, Tensor]], receives: list[tuple[Tensor, int]]
    ) -> None:
        self._member, self._number, self._sent, self._receives = member, number, sent, receives
        for t, _ in receives:
            assert t.is_contiguous()
            t.zero_()  # not there yet

    def wait(self) -> None:
        member = self._member
        assert self._number == member.waited, "exchanges are waited for in the order in which they were started"
        member.waited += 1
        for t, as_sent in self._sent:
            same = torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (t, as_sent)))  # NaN is like NaN
            assert same, "what is on its way must not change"
        for t, source in self._receives:
            t.copy_(member._mail[source, member.rank].get(timeout=WAITING_SECONDS))
            member.received += t.nbytes


class _Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.rank, self.size, self.received, self._mail = rank, threads.size, 0, threads.mail
        self._threads = threads
        self._started = self.waited = 0

    def gather(self, value: Any) -> list[Any]:
        self._threads.said[self.rank] = value
        self._threads.barrier.wait()
        said = list(self._threads.said)
        self._threads.barrier.wait()
        return said

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        self.start(sends, receives).wait()

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> _Underway:
        sent = [(t, t.clone()) for t, _ in sends]
        for (t, copy), (_, to) in zip(sent, sends, strict=True):
            assert t.is_contiguous()
            self._mail[self.rank, to].put(copy)
        self._started += 1
        return _Underway(self, self._started - 1, sent, list(receives))

    def broadcast(self, t: Tensor, source: int) -> Tensor:
        others = [r for r in range(self.size) if r != source]
        if self.rank == source:
            self.exchange([(t, r) for r in others], [])
        else:
            self.exchange([], [(t, source)])
        return t

    def gather_tensors(self, t: Tensor) -> Tensor:
        out = torch.empty(self.size, *t.shape, dtype=t.dtype, device=t.device)
        for rank in range(self.size):
            out[rank] = self.broadcast(t if rank == self.rank else out[rank], rank)
        return out


def together(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """What each member returns."""
    threads, out = Threads(size), [None] * size

    def run(rank: int) -> None:
        out[rank] = work(threads.member(rank))

    members = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for m in members:
        m.start()
    for m in members:
        m.join()  # whoever waits for one that failed gives up
    return out
