"""Packed linears on their way into the work directory, while the next ones are computed.

Copying what a GPU has made straight to ordinary memory holds a lock of the driver from beginning to end (0.1 s for 120 MB),
and no thread of the process can launch a kernel meanwhile. A copy to page-locked memory does not, but locking enough of it
for a whole module takes as long. So bytes go through a small page-locked buffer; the straight way took 0.29 of the 1.25 s of
a 70B MLP. Files are written in pieces and hashed beside: serialising a module at one go held the interpreter's lock for 0.1
to 0.3 s, during which the other members of a group waited.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.model.weights import pinned
from exl2ray.store.fs import Store
from exl2ray.store.records import FileRef, item_file
from exl2ray.store.tensors import put_tensors

LEAST_BYTES = 32 << 20  # of a file: every one is made durable by itself, and a layer may have hundreds of experts
BUFFER_BYTES = 32 << 20  # page-locked, on the way from a GPU
ALIGNMENT = 64  # of tensors in the buffer
WRITERS = 3  # threads that write; hashing keeps one busy at 1 to 2 GB/s


class HostCopies:
    """For one thread. Copies are made on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffer = pinned(BUFFER_BYTES)

    def copy(
        self, tensors: dict[str, Tensor], ready: torch.cuda.Event, into: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The tensors in ordinary memory, of any shape and dtype. ready: recorded when they were complete. into: tensors
        there that may be written over, by name: memory that was used before is written several times faster.

        What fits into the buffer together is waited for once: hundreds of experts have thousands of small tensors.
        """
        out: dict[str, Tensor] = {}
        staged: list[tuple[Tensor, Tensor]] = []  # bytes that are on their way to the buffer, and where they go from there
        used = 0
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            for name, t in tensors.items():
                out[name] = t if t.device.type == "cpu" else _place(t, (into or {}).get(name))
                if t.device.type == "cpu":
                    continue
                source, target = (x.reshape(-1).view(torch.uint8) for x in (t, out[name]))
                for start in range(0, len(source), BUFFER_BYTES):
                    part = slice(start, min(start + BUFFER_BYTES, len(source)))
                    size = part.stop - part.start
                    if used + size > BUFFER_BYTES:
                        self._arrive(staged)
                        used = 0
                    place = self._buffer[used : used + size]
                    place.copy_(source[part], non_blocking=True)
                    staged.append((place, target[part]))
                    used += -(-size // ALIGNMENT) * ALIGNMENT
            self._arrive(staged)
        return out

    def _arrive(self, staged: list[tuple[Tensor, Tensor]]) -> None:
        """Empties the buffer."""
        self._stream.synchronize()
        for place, target in staged:
            target.copy_(place)
        staged.clear()


def recorded() -> torch.cuda.Event:
    """When all is done that this thread's stream was given so far."""
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _place(like: Tensor, old: Tensor | None) -> Tensor:
    """``old`` if it can take the values of ``like``, else new memory."""
    fits = old is not None and old.shape == like.shape and old.dtype == like.dtype and old.is_contiguous()
    return old if fits and old is not None else torch.empty(like.shape, dtype=like.dtype)


class Writers:
    """Threads that write tensors to the work directory; the GPU goes on, also while they are copied from it."""

    def __init__(self, store: Store, device: torch.device) -> None:
        self._store, self._on_gpu = store, device.type == "cuda"
        self._copies = threading.local()  # of each thread
        copies = [HostCopies(device) for _ in range(WRITERS)] if self._on_gpu else []
        self._threads = ThreadPoolExecutor(WRITERS, "write", _begin, (self._copies, copies))

    def write(self, rel: str, tensors: dict[str, Tensor]) -> Future[FileRef]:
        ready = recorded() if self._on_gpu else None
        return self._threads.submit(self._write, rel, tensors, ready)

    def _write(self, rel: str, tensors: dict[str, Tensor], ready: torch.cuda.Event | None) -> FileRef:
        if ready is not None:
            tensors = self._copies.own.copy(tensors, ready)
        return put_tensors(self._store, rel, tensors)


def _begin(of_thread: threading.local, copies: list[HostCopies]) -> None:
    """In each thread, at first. No method: a thread holds what it began with, and would keep its own pool alive for good."""
    if copies:
        of_thread.own = copies.pop()


class PackedFiles:
    """Files of one module, on one worker. Large linears have one each, so that several are written at a time."""

    def __init__(self, writers: Writers, kind: str, key: str, inputs_hash: str) -> None:
        self._writers, self._kind, self._key, self._hash = writers, kind, key, inputs_hash
        self._name = ""
        self._tensors: dict[str, Tensor] = {}
        self._writing: dict[str, Future[FileRef]] = {}

    def add(self, packed: Mapping[str, PackedLinear]) -> None:
        """Begins to write as soon as there is enough."""
        for key, p in packed.items():
            self._name = self._name or key
            self._tensors.update(p.tensors())
            if sum(t.nbytes for t in self._tensors.values()) >= LEAST_BYTES:
                self.flush()

    def flush(self) -> dict[str, Future[FileRef]]:
        """Begins to write what is left. All files by the key of the first linear in each."""
        if self._tensors:
            name = self._name.removeprefix(f"{self._key}.")
            rel = item_file(self._kind, "tensors", f"{self._key}.{name}", self._hash)
            self._writing[self._name] = self._writers.write(rel, self._tensors)
            self._name, self._tensors = "", {}
        return self._writing
