"""One worker in this process: one device needs no Ray, and neither do tests and debugging."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from exl2ray.driver.workers import Over, Said
from exl2ray.team.faults import DeviceFailed, translate
from exl2ray.team.messages import Meeting, Pass, WorkerSetup


class InlineWorkers:
    """`Workers` of one. A pass goes on, up to the next thing it says, while somebody waits for it."""

    size = 1

    def __init__(self, setup: WorkerSetup, make: Callable[[WorkerSetup], Any]) -> None:
        self._setup, self._make = setup, make
        self._worker = make(setup)
        self._call: Iterator[Said] | None = None
        self.notes: list[str] = []

    def idle(self) -> list[int]:
        return [] if self._call is not None else [0]

    def starting(self) -> int:
        return 0

    def name(self, worker: int) -> str:
        return f"{socket.gethostname()}:{os.getpid()}"

    def start(self, worker: int, work: Pass) -> None:
        self._call = self._worker.run(work)

    def wait(self, seconds: float) -> tuple[int, Said] | None:
        if self._call is None:
            time.sleep(min(seconds, 0.05))
            return None
        try:
            return 0, next(self._call)
        except StopIteration:
            error: Exception | None = None
        except Exception as e:
            error = translate(e)
            kept = error is e
            if isinstance(error, DeviceFailed):
                raise error from e  # this process has lost its GPU
        # Outside of the handler: a traceback would keep the tensors of the frames alive.
        self._call = None
        if error is None:
            return 0, Over()
        if not kept:
            self._worker.release()
        return 0, error

    def end_before(self, worker: int, index: int) -> None:
        self._worker.end_before(index)

    def kill(self, worker: int) -> None:
        self._call = None
        self._worker = self._make(self._setup)

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        return [Meeting()]

    def now(self) -> float:
        return time.monotonic()

    def log_place(self) -> str:
        return "this process"

    def close(self) -> None:
        self._call = self._worker = None
