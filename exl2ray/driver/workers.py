"""Workers as the driver sees them: what starts a pass on one and hears what it says. `inline` and `actors` implement it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from exl2ray.driver.policy import Fault
from exl2ray.team.messages import Begun, ItemResult, Meeting, Pass, Ready


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
