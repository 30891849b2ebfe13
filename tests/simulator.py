"""Numba's CUDA simulator with threads that take turns: ``take_turns()`` before the first kernel runs.

The simulator runs each GPU thread as a Python thread and looks at all of them in a loop, to see who waits: that loop holds
the interpreter's lock most of the time, and the threads wait for it. Here one thread runs until it has to wait for its
block, and hands on to the next; after the last one's turn all of them are at the same barrier, and the first goes on.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numba import cuda
from numba.cuda.simulator import kernel


class Turn(kernel.BlockThread):  # type: ignore[misc]
    """One GPU thread; runs while it has the turn."""

    next: Turn  # of those that have not ended, in a ring
    previous: Turn

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.turn = threading.Lock()
        self.turn.acquire()

    def run(self) -> None:
        self.turn.acquire()
        super().run()  # keeps what the kernel raises
        if self.exception:
            self._manager.failed.append(self.exception)
        self.previous.next, self.next.previous = self.next, self.previous
        self.next.turn.release()

    def syncthreads(self) -> None:
        self.next.turn.release()
        self.turn.acquire()
        if self._manager.failed:
            raise RuntimeError("another thread of the block has failed")


class Block(kernel.BlockManager):  # type: ignore[misc]
    """One block, run to its end."""

    def run(self, grid_point: Any, *args: Any) -> None:
        self.failed: list[Any] = []  # (exception, traceback), the first that failed first
        points = np.ndindex(*self._block_dim)
        threads = [Turn(lambda: self._f(*args), self, grid_point, point, self._debug) for point in points]
        for i, thread in enumerate(threads):
            thread.previous, thread.next = threads[i - 1], threads[(i + 1) % len(threads)]
            thread.start()
        threads[0].turn.release()
        for thread in threads:
            thread.join()
        if self.failed:
            raise self.failed[0][0].with_traceback(self.failed[0][1])


_call = kernel.FakeCUDAKernel.__call__
_lent: list[dict[str, Any]] = []  # globals of modules whose `cuda` is the simulator's during a launch


def _launch(self: Any, *args: Any) -> Any:
    """A device function finds the simulated `cuda` in its module from its first call on to the end of the launch; the
    simulator itself looks through the module at each call."""
    if not self._device:
        try:
            return _call(self, *args)
        finally:
            while _lent:
                _lent.pop()["cuda"] = cuda
    names = self.fn.__globals__
    if names.get("cuda") is cuda:
        names["cuda"] = kernel._get_kernel_context()
        _lent.append(names)
    return self.fn(*args)


def take_turns() -> None:
    kernel.BlockManager = Block
    kernel.FakeCUDAKernel.__call__ = _launch
