"""How the members of a group of processes exchange tensors (`exl2ray.quant.group`): through torch.distributed.

NCCL between GPUs, gloo between CPUs and for small Python objects. Members meet at a TCPStore that the driver serves. A call
that fails because another member is gone raises GroupBroken; nothing here tries again.

Everything between two members goes through batched calls: those share one NCCL communicator, while single sends make a
communicator for every pair of members, for some tenths of a second each.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as torch_dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from exl2ray.quant.group import Arrived, Exchange
from exl2ray.team.messages import GroupBroken

RENDEZVOUS_SECONDS = 120  # for answers of the store at which a group meets
STEP_SECONDS = 6 * 3600  # the driver's deadlines are the ones that matter


class Group:
    """Several processes. All members must make the same calls in the same order."""

    def __init__(self, address: tuple[str, int], rank: int, size: int, device: torch.device) -> None:
        self.rank, self.size, self.received = rank, size, 0
        self._cuda = device.type == "cuda"
        backend = "cpu:gloo,cuda:nccl" if self._cuda else "gloo"
        with _broken_if_it_fails():
            host, port = address
            store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=RENDEZVOUS_SECONDS))
            with _counted_only_if_it_succeeds():
                torch_dist.init_process_group(
                    backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=STEP_SECONDS)
                )
            if self._cuda:  # communicators and connections are made on first use: now, while there is nothing to wait for
                torch_dist.all_reduce(torch.zeros(1, device=device))
                self.gather_tensors(self.broadcast(torch.zeros(1, device=device), 0))
                greetings = [torch.zeros(1, device=device) for _ in range(2 * size)]
                others = [r for r in range(size) if r != rank]
                self.exchange([(greetings[r], r) for r in others], [(greetings[size + r], r) for r in others])
                torch.cuda.synchronize(device)
        self.received = 0

    def gather(self, value: Any) -> list[Any]:
        out: list[Any] = [None] * self.size
        with _broken_if_it_fails():
            torch_dist.all_gather_object(out, value)
        return out

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        self.start(sends, receives).wait()

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Exchange:
        plan = [torch_dist.P2POp(torch_dist.isend, _bytes_of(t), to) for t, to in sends if t.numel()]
        plan += [torch_dist.P2POp(torch_dist.irecv, _bytes_of(t), source) for t, source in receives if t.numel()]
        if not plan:
            return Arrived()
        self.received += sum(t.nbytes for t, _ in receives)
        with _broken_if_it_fails():
            return _Underway(torch_dist.batch_isend_irecv(plan), plan)

    def broadcast(self, t: Tensor, source: int) -> Tensor:
        with _broken_if_it_fails():
            torch_dist.broadcast(t, source)
        if self.rank != source:
            self.received += t.nbytes
        return t

    def gather_tensors(self, t: Tensor) -> Tensor:
        out = torch.empty(self.size, *t.shape, dtype=t.dtype, device=t.device)
        with _broken_if_it_fails():
            torch_dist.all_gather(list(out), t)
        self.received += (self.size - 1) * t.nbytes
        return out

    def close(self) -> None:
        """Leaves without waiting for the others: some of them may be gone."""
        if not torch_dist.is_initialized():
            return
        with suppress(RuntimeError):
            if self._cuda:  # destroying an NCCL group waits for its members, aborting does not
                torch_dist.distributed_c10d._abort_process_group()
        if torch_dist.is_initialized():
            with suppress(RuntimeError):
                torch_dist.destroy_process_group()


class _Underway:
    """``plan``: has the tensors, which have to stay until they have arrived."""

    def __init__(self, works: Sequence[Any], plan: Sequence[Any]) -> None:
        self._works, self._plan = list(works), list(plan)

    def wait(self) -> None:
        with _broken_if_it_fails():
            for work in self._works:
                work.wait()
        self._works, self._plan = [], []


def _bytes_of(t: Tensor) -> Tensor:
    """The memory of a contiguous tensor: not every backend knows every dtype."""
    return t.view(-1).view(torch.uint8)


def serve_rendezvous(address: str) -> tuple[Any, int]:
    """The store at which a group meets, served by this process for as long as it is referenced, and its port.

    address: of this machine; the store, which asks nobody who they are, listens there and at no other.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.bind((address, 0))
        listening.listen()
        port = int(listening.getsockname()[1])
        store = TCPStore(address, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach())
    return store, port


@contextmanager
def _counted_only_if_it_succeeds() -> Iterator[None]:
    """torch numbers the groups of a process, and members look for each other under the number. A group that could not be
    formed has been counted, so that this process would wait for ever for members that count from the start."""
    try:
        yield
    except BaseException:
        with suppress(AttributeError):
            torch_dist.distributed_c10d._world.group_count = 0
        raise


@contextmanager
def _broken_if_it_fails() -> Iterator[None]:
    try:
        yield
    except RuntimeError as e:  # gloo, NCCL and the store all raise RuntimeErrors
        text = str(e).strip().splitlines()
        if "out of memory" in str(e).lower():
            raise
        raise GroupBroken(f"a member of the group is gone: {text[0] if text else type(e).__name__}") from e
