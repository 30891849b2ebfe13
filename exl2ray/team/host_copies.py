"""Copying what a GPU has made to ordinary memory, without keeping other threads from the GPU.

A copy straight to ordinary memory holds a lock of the driver from beginning to end (0.1 s for 120 MB), and no thread of the
process can launch a kernel meanwhile. A copy to page-locked memory does not, but locking enough of it for a whole module
takes as long. So bytes go through a small page-locked buffer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exl2ray.model.weights import pinned

BUFFER_BYTES = 32 << 20


class HostCopies:
    """For one thread. Copies are made on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._buffer = pinned(BUFFER_BYTES)

    def copy(self, tensors: dict[str, Tensor], ready: torch.cuda.Event) -> dict[str, Tensor]:
        """The tensors in ordinary memory, of any shape and dtype. ready: recorded when they were complete."""
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            return {name: self._copied(t) for name, t in tensors.items()}

    def _copied(self, t: Tensor) -> Tensor:
        if t.device.type == "cpu":
            return t
        out = torch.empty(t.shape, dtype=t.dtype)
        source, target = (x.reshape(-1).view(torch.uint8) for x in (t, out))
        for start in range(0, len(source), BUFFER_BYTES):
            part = source[start : start + BUFFER_BYTES]
            staged = self._buffer[: len(part)]
            staged.copy_(part, non_blocking=True)
            self._stream.synchronize()
            target[start : start + len(part)] = staged
        return out
