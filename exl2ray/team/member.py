"""What passes find on their worker: its model, states that it holds, the group that it belongs to, where they shall end."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from torch import Tensor

from exl2ray.quant.group import Comm
from exl2ray.quant.warm import begin_gradients, warm_up
from exl2ray.team.checkpoints import Checkpoints
from exl2ray.team.grouped import Grouped
from exl2ray.team.messages import Begun, ItemResult, Ready, RowSet, SourcePass, WorkerSetup
from exl2ray.team.runner import Runner
from exl2ray.team.source_forward import Found, begin_reading, source_forward
from exl2ray.team.source_states import SourceStates
from exl2ray.timeline import step


class Member(Grouped):
    """A worker as the passes see it. ``kept``: states that a pass leaves for the next one of its kind, or nothing."""

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(setup)
        with step("first weights begun"):
            self.runner = Runner(setup)  # reads the first modules in the background meanwhile
        warm_up(self.device, setup.numerics)
        if setup.gradients:
            begin_gradients(self.device)
        self.check_place(self.runner.store)
        self.checkpoints = Checkpoints(self.runner.records, setup.checkpoint_seconds)
        self.kept: object = None

    def until_taken(self, indices: Iterable[int], comm: Comm | None = None) -> Iterator[int]:
        """The items of a pass, up to where `end_before` has it end; the members of a group end at the same one."""
        for index in indices:
            end = self.end if comm is None else min(comm.gather(self.end))
            if index >= end:
                return
            yield index

    def begin(self, begun: Begun) -> Begun:
        """To be told before the work on an item: batches are as small as this item needs them."""
        self.runner.in_hand = begun.key
        return begun

    def result(
        self, index: int, key: str, begin: float, detail: str, payload: dict[str, Any], *,
        bits: float | None = None, notes: tuple[str, ...] = (), received: int = 0,
    ) -> ItemResult:
        seconds = time.monotonic() - begin
        return ItemResult(index, key, seconds, detail, payload, bits, notes, self.name, received)

    def source_states(self, rows: RowSet, part: SourcePass) -> Generator[Begun | Ready, None, SourceStates]:
        """The worker's place in the source model; at the start of its stretch, if a group goes there together."""
        states = self.kept
        if not isinstance(states, SourceStates) or states.rows != rows:
            self.kept = None
            states = self.kept = SourceStates(self.runner, self.checkpoints, rows)
        if part.stretches:
            yield self.begin(Begun("sweep", -1, "sweep", together=True))
            begin = time.monotonic()
            with begin_reading(self.runner, part.meeting, part.stretches) as reading:
                comm = self.group(part.meeting)
                before = comm.received
                states.adopt(source_forward(self.runner, comm, rows, part.stretches, reading))
            yield Ready("sweep", time.monotonic() - begin, comm.received - before)
        return states

    def stand_before(self, rows: RowSet, index: int, x: Tensor) -> None:
        """Takes x (R, T, hidden) for the source model's states at the entry of a module."""
        self.kept = states = SourceStates(self.runner, self.checkpoints, rows)
        states.adopt(Found(index, self.runner.place(x, rows), {}))

    def let_go(self) -> None:
        """Forgets the states of other passes."""
        self.kept = None

    def release(self) -> None:
        self.let_go()
        super().release()
