"""The driver's loop: gives passes to idle workers, hears what they finish, and starts again what was lost.

What is to be done, and by whom, is the business of a `Work` (`independent`, `sequential`). What a fault means is in
`policy`. Here are calls, deadlines and signals:

* whatever a worker begins has a deadline, from the rates measured so far; past it the worker is killed;
* if a member of a group fails at what all do together, the others get a little time to notice, and are killed then;
* the first Ctrl-C (or SIGTERM, or SIGHUP) lets every worker finish the module in hand, the second ends at once.

The driver never tells a worker what is next; it only moves the end of a pass: to give the rest to a worker that joins or
idles, to take a free worker into a group, or to stop. Taken out, since no gain could be measured (docs/log.md, 2026-11-29):
shipping states between CPU workers through Ray's object store, splitting the options of a module for idle workers, and
rehearsing first modules, which moved their cost out of the measured time and saved none.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from types import FrameType
from typing import Protocol

from exl2ray import stopping
from exl2ray.driver.policy import Fault, Limits, Lost, Policy
from exl2ray.driver.workers import Over, Said, Workers
from exl2ray.errors import ClusterError, Exl2RayError
from exl2ray.team.messages import Begun, ItemResult, Pass, Ready

POLL_SECONDS = 0.5
NOTHING = "start"  # method of a call that has not begun anything yet
STALL_SECONDS = 60.0  # beyond patience and grace: nothing runs, and nothing is given to idle workers


class Work(Protocol):
    """Items and who does them. A worker that is not named in ``left`` or ``finished`` still has its call."""

    @property
    def done(self) -> bool: ...

    def assign(self, idle: Sequence[int]) -> list[dict[int, Pass]]:
        """Calls for idle workers. Those in one dictionary are members of a group. May ask others to end earlier."""
        ...

    def begun(self, worker: int, begun: Begun) -> None: ...

    def finished(self, worker: int, result: ItemResult) -> None:
        """An item is finished; perhaps for the second time."""
        ...

    def left(self, worker: int, fault: Fault | None) -> None:
        """The worker's call is over: what it did not finish is to be done by somebody. fault: why, if something is wrong."""
        ...

    def found(self, begun: Begun) -> ItemResult | None:
        """The result of what a lost worker had in hand, if it is in the work directory after all."""
        ...

    def cost(self, begun: Begun) -> float:
        """Of what was begun, in weights: deadlines are in proportion to it."""
        ...


@dataclass
class _Call:
    number: int  # of the group's call
    begun: Begun
    since: float
    told_to_end: bool = False
    give_up: float | None = None  # when it is ended, for what another member of its group did


class Supervisor:
    """Runs works on workers. ``event(name, fields)`` is told what happens: started, finished, found, lost, note, retry."""

    def __init__(
        self, workers: Workers, limits: Limits | None = None, event: Callable[..., None] = lambda name, **fields: None
    ) -> None:
        self.workers, self.limits, self.event = workers, limits or Limits(), event
        self.policy = Policy(self.limits, event, workers.log_place)
        self._calls: dict[int, _Call] = {}
        self._numbers = count()
        self._rates: dict[str, float] = {}  # method -> slowest seconds per cost
        self._resting: dict[int, float] = {}
        self._stopping = False
        self._active = workers.now()  # when something ran or started last

    def run(self, work: Work, tick: Callable[[], None] = lambda: None) -> None:
        """Until the work is done. ``tick`` is called about twice a second. KeyboardInterrupt after a first Ctrl-C."""
        self._active = self.workers.now()
        with self._interruptible():
            while self._calls or not work.done:
                tick()
                if self._stopping:
                    self._stop()
                else:
                    self._assign(work)
                self._tell_notes()
                said = self.workers.wait(POLL_SECONDS)
                self._tell_notes()
                if said is not None:
                    self._hear(work, *said)
                self._enforce(work)

    # ---- giving work -------------------------------------------------------------------------------------------

    def _assign(self, work: Work) -> None:
        now = self.workers.now()
        idle = [w for w in self.workers.idle() if self._resting.get(w, 0.0) <= now]
        for members in work.assign(idle) if idle else []:
            number = next(self._numbers)
            for worker, part in members.items():
                nothing = Begun(NOTHING, -1, "start of a pass", together=len(members) > 1)
                self._calls[worker] = _Call(number, nothing, now)
                self.workers.start(worker, replace(part, shrink=dict(self.policy.shrink)))
        if self._calls or self.workers.starting() or len(idle) < len(self.workers.idle()) or work.done:
            self._active = now
        elif now - self._active > STALL_SECONDS + self.limits.patience + self.limits.grace:
            raise ClusterError("nothing is running and nothing can be started", "this is a defect: please report it")

    def _stop(self) -> None:
        if not self._calls:
            raise KeyboardInterrupt
        for worker, call in self._calls.items():
            if not call.told_to_end:
                call.told_to_end = True
                self.workers.end_before(worker, 0)

    # ---- hearing -----------------------------------------------------------------------------------------------

    def _hear(self, work: Work, worker: int, said: Said) -> None:
        call = self._calls.get(worker)
        if call is None:
            return
        if isinstance(said, Begun):
            call.begun, call.since = said, self.workers.now()
            call.give_up = call.give_up if said.together else None
            self.event("started", method=said.method, key=said.key, bits=said.bits, worker=self.workers.name(worker))
            work.begun(worker, said)
        elif isinstance(said, Ready):
            self._finished(work, worker, call, said.method, call.begun.key, said.seconds, said.received)
        elif isinstance(said, ItemResult):
            self._finished(work, worker, call, call.begun.method, said.key, said.seconds, said.received)
            self.policy.progress()
            work.finished(worker, said)
        elif isinstance(said, Over):
            del self._calls[worker]
            work.left(worker, None)
        else:
            self._failed(work, worker, said)

    def _finished(
        self, work: Work, worker: int, call: _Call, method: str, key: str, seconds: float, received: int
    ) -> None:
        rate = seconds / max(work.cost(call.begun), 1e-9)
        self._rates[method] = max(rate, self._rates.get(method, 0.0))
        name = self.workers.name(worker)
        self.event("finished", method=method, key=key, worker=name, seconds=seconds, received=received)

    def _failed(self, work: Work, worker: int, fault: Fault, counts: bool = True) -> None:
        """counts: unless the worker was killed for what another member of its group did."""
        call = self._calls.pop(worker)
        now, begun = self.workers.now(), call.begun
        if begun.together:
            for other in self._calls.values():
                if other.number == call.number and other.begun.together:
                    other.give_up = other.give_up or now + self.limits.grace
        rest = 0.0
        if counts:
            rest = self.policy.after(fault, worker, call.number, begun.method, begun.key)
        if rest:
            self._resting[worker] = now + rest
        found = work.found(begun)
        if found is not None:
            self.event("found", key=found.key, bits=found.bits)
            work.finished(worker, found)
        work.left(worker, fault)

    def _allowed(self, work: Work, begun: Begun) -> float:
        """Seconds for what was begun, by the rates that are known now."""
        rate = self._rates.get(begun.method)
        if begun.method == NOTHING:
            return self.limits.floor
        if rate is None:
            return self.limits.first
        return max(self.limits.floor, self.limits.factor * rate * work.cost(begun))

    def _enforce(self, work: Work) -> None:
        """Kills workers past their deadline."""
        now = self.workers.now()
        for worker, call in list(self._calls.items()):
            given_up = call.give_up is not None and now > call.give_up
            took = now - call.since
            if given_up or (took > self.limits.floor and took > self._allowed(work, call.begun)):
                self.workers.kill(worker)
                reason = f"no answer for {took:.0f} s, far beyond what such items take"
                self._failed(work, worker, Lost(reason), counts=not given_up)

    def _tell_notes(self) -> None:
        while self.workers.notes:
            self.event("note", message=self.workers.notes.pop(0))

    # ---- signals -----------------------------------------------------------------------------------------------

    @contextmanager
    def _interruptible(self) -> Iterator[None]:
        """While inside, the first signal to stop asks for it; the second raises KeyboardInterrupt on the spot."""

        def ask(number: int, frame: FrameType | None) -> None:
            if self._stopping:
                stopping.interrupt(number, frame)
            self._stopping = True
            # In a thread, since this one may be in the middle of writing a line.
            threading.Thread(target=self._announce_stop, daemon=True).start()

        with stopping.handled(ask):
            yield

    def _announce_stop(self) -> None:
        with contextlib.suppress(Exl2RayError):  # nobody reads it any more
            self.event("note", message="stopping: waiting for work in flight (once more to stop at once)")
