"""A group of workers as the numerics see it: who belongs to it, and how tensors get from one member to another.

A group of one is a group: everything that is done by a group is written once, and a worker alone sends nothing.
`exl2ray.team.comm` has groups of processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor


class Exchange(Protocol):
    """Tensors on their way."""

    def wait(self) -> None:
        """Until what was received may be read, and what was sent be changed, by what is computed from now on."""
        ...


class Comm(Protocol):
    """The connection of one member. All members make the same calls in the same order."""

    rank: int
    size: int
    received: int  # bytes of tensors that came from other members; gathered objects are small and do not count

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, by rank."""
        ...

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        """Sends tensors (tensor, to), fills others (tensor, source), all contiguous and on the group's device, at one go.

        What two members send each other arrives in the order in which it is listed.
        """
        ...

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Exchange:
        """`exchange` that goes on while other things are computed. All members wait for their exchanges in the order in
        which they were started."""
        ...

    def broadcast(self, t: Tensor, source: int) -> Tensor:
        """Fills ``t`` (contiguous) everywhere with the source's values."""
        ...

    def gather_tensors(self, t: Tensor) -> Tensor:
        """Everybody's ``t`` (contiguous), by rank: (size, *t.shape). Shapes are equal."""
        ...

    def close(self) -> None: ...


class Solo:
    """A group of one."""

    rank, size, received = 0, 1, 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        self.start(sends, receives)

    def start(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> Exchange:
        if sends or receives:
            raise AssertionError("a group of one has no other members")
        return Arrived()

    def broadcast(self, t: Tensor, source: int) -> Tensor:
        return t

    def gather_tensors(self, t: Tensor) -> Tensor:
        return t[None]

    def close(self) -> None:
        pass


class Arrived:
    """An `Exchange` with nothing to wait for."""

    def wait(self) -> None:
        pass
