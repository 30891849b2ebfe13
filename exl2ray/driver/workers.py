"""Workers as the driver sees them: what starts a pass on one and hears what it says; and a worker in this process, since one
device needs no Ray, and neither do tests and debugging. `actors` has those of Ray.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exl2ray.driver.policy import Fault
from exl2ray.team.messages import Begun, DeviceFailed, ItemResult, Meeting, Pass, Ready, WorkerSetup, translate


@dataclass(frozen=True)
class Over:
    """A call came to its end: the pass is done, or as much of it as was not taken away."""


Said = Begun | Ready | ItemResult | Over | Fault


class Workers(Protocol):
    """Numbered workers, each with one call at a time. Those that are lost are replaced under their number."""

    notes: list[str]  # what happened to workers, in words; whoever shows them empties the list

    @property
    def size(self) -> int:
        """Workers, those that are starting included."""
        ...

    def idle(self) -> list[int]:
        """Workers that run and have no call."""
        ...

    def starting(self) -> int:
        """Workers that do not run yet."""
        ...

    def name(self, worker: int) -> str:
        """host:pid, where known."""
        ...

    def start(self, worker: int, work: Pass) -> None:
        """Starts a pass on an idle worker."""
        ...

    def wait(self, seconds: float) -> tuple[int, Said] | None:
        """What some worker says next; None if nobody says anything in time. After Over or a fault it has no call."""
        ...

    def end_before(self, worker: int, index: int) -> None:
        """Asks a worker to end its call before module ``index``, or after the one in hand. It may come too late."""
        ...

    def kill(self, worker: int) -> None:
        """Ends a worker whatever it does, and starts another in its place. Nothing more is heard of its call."""
        ...

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        """Where these workers meet as a group, one for each, by rank. Workers that have met and are well need not again."""
        ...

    def now(self) -> float:
        """Seconds of a clock that only goes forward."""
        ...

    def log_place(self) -> str: ...

    def close(self) -> None: ...


def host_of(name: str) -> str:
    """Of host:pid."""
    return name.rpartition(":")[0]


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
