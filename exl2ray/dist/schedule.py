"""The driver's loop: gives calls to idle workers, takes their results, and decides what a loss means.

What is to be done, and in which order, is the business of a `Flow` (`exl2ray.dist.fan`, `exl2ray.dist.chains`). Here are the
rules that hold for all of them:

* a call has a deadline, from the rates measured so far; past it the worker is killed;
* a call that was lost goes back to its flow; the one that loses three workers is at fault itself and stops the job;
* a call that ran out of memory is tried once more with smaller batches;
* a failure of the storage may be that of one machine: it is tried again elsewhere, three times at most;
* any other exception is deterministic and is raised;
* the first Ctrl-C (or SIGTERM, or SIGHUP) stops the submitting and waits for calls in flight, the second ends at once.
"""

from __future__ import annotations

import contextlib
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from types import FrameType
from typing import Any

from exl2ray import stopping
from exl2ray.dist.faults import GroupBroken, WorkerOutOfMemory
from exl2ray.dist.items import ItemResult
from exl2ray.dist.session import Lost, MissingArgument, Session
from exl2ray.errors import ClusterError, Exl2RayError, StoreError

POLL_SECONDS = 0.5
MAX_SHRINK = 64  # of the batches of an item that ran out of memory; then a single row does not fit


@dataclass(frozen=True)
class Limits:
    """When to give up. Seconds, except ``losses`` and ``factor``."""

    losses: int = 3  # workers that one item may take down
    first: float = 6 * 3600.0  # deadline of a kind of call that nobody has finished yet
    floor: float = 300.0  # least deadline
    factor: float = 20.0  # deadline over the time expected from the slowest rate seen
    grace: float = 10.0  # for the other members of a broken group to notice
    patience: float = 20.0  # for a replacement to start before a group goes on without it
    rest: float = 2.0  # for a worker whose storage failed, doubled every time


@dataclass(frozen=True)
class Call:
    """One call on a worker. ``key`` names the item for people and for counting losses; ``cost`` is in weights."""

    method: str
    args: tuple[Any, ...]
    key: str
    cost: float = 1.0
    returns: int = 1
    attempt: int = field(default_factory=count().__next__)  # calls of one group on one item share theirs


class Flow(ABC):
    """Work and its order. ``shrink[key]``: divisor of batch sizes of items that ran out of memory."""

    def __init__(self) -> None:
        self.shrink: dict[str, int] = {}

    @property
    @abstractmethod
    def done(self) -> bool: ...

    @abstractmethod
    def dispatch(self, idle: Sequence[int]) -> list[tuple[int, Call]]:
        """Calls for idle workers, one each at most."""

    @abstractmethod
    def finished(self, worker: int, call: Call, result: Any, second: Any) -> None: ...

    @abstractmethod
    def lost(self, worker: int, call: Call, alive: bool) -> None:
        """A call without a result. ``alive``: the worker is well, but has given up what it held for the call."""

    def missing(self, worker: int, call: Call) -> None:
        """The states that came with the call are gone; the worker is well."""
        self.lost(worker, call, True)

    def broken(self, worker: int, call: Call) -> None:
        """The worker is well and says that another member of its group is gone."""
        self.lost(worker, call, True)

    def overdue(self) -> list[int]:
        """Workers to kill, for reasons of the flow's own."""
        return []


@dataclass
class _Running:
    call: Call
    deadline: float
    began: float = field(default_factory=time.monotonic)


class Scheduler:
    """Runs flows on a session. ``event(name, fields)`` is told what happens: started, finished, lost, note, retry."""

    def __init__(
        self, session: Session, limits: Limits | None = None, event: Callable[..., None] = lambda name, **fields: None
    ) -> None:
        self.session, self.limits, self.event = session, limits or Limits(), event
        self._running: dict[int, _Running] = {}
        self._losses: Counter[str] = Counter()
        self._counted: set[int] = set()  # attempts that have been counted as a loss
        self._last_error: dict[str, str] = {}
        self._rates: dict[str, float] = {}  # method -> slowest seconds per cost
        self._resting: dict[int, float] = {}
        self._tired: Counter[int] = Counter()
        self._stopping = False
        self._stalls = 0

    @property
    def busy(self) -> int:
        return len(self._running)

    def run(self, flow: Flow, tick: Callable[[], None] = lambda: None) -> None:
        """Until the flow is done. ``tick`` is called about twice a second. KeyboardInterrupt after a first Ctrl-C."""
        with self._interruptible():
            while not flow.done or self._running:
                tick()
                if self._stopping and not self._running:
                    raise KeyboardInterrupt
                if not self._stopping:
                    self._submit(flow)
                self._note_losses()
                outcome = self.session.wait(POLL_SECONDS)
                self._note_losses()
                if outcome is not None:
                    self._settle(flow, outcome.worker, outcome.value, outcome.second)
                self._enforce(flow)

    # ---- submitting --------------------------------------------------------------------------------------------

    def _submit(self, flow: Flow) -> None:
        now = time.monotonic()
        idle = [w for w in self.session.idle() if self._resting.get(w, 0.0) <= now]
        calls = flow.dispatch(idle) if idle else []
        for worker, call in calls:
            self._running[worker] = _Running(call, now + self._allowed(call))
            bits = getattr(call.args[0], "bits", None) if call.args else None
            self.event("started", method=call.method, key=call.key, bits=bits, worker=self.session.name(worker))
            self.session.submit(worker, call.method, *call.args, returns=call.returns)
        waiting = self.session.starting() or len(idle) < len(self.session.idle())
        if not self._running and not waiting and idle and not calls and not flow.done and not flow.overdue():
            self._stalls += 1
            time.sleep(0.05)
            if self._stalls > 20 * max(self.limits.patience, self.limits.grace) + 200:
                raise ClusterError("nothing is running and nothing can be started", "this is a defect: please report it")
        else:
            self._stalls = 0

    def _allowed(self, call: Call) -> float:
        rate = self._rates.get(call.method)
        return self.limits.first if rate is None else max(self.limits.floor, self.limits.factor * rate * call.cost)

    # ---- outcomes ----------------------------------------------------------------------------------------------

    def _settle(self, flow: Flow, worker: int, value: Any, second: Any) -> None:
        running = self._running.pop(worker, None)
        if running is None:
            return
        call = running.call
        if isinstance(value, Lost):
            self._count(call, worker, value.reason, None)
            flow.lost(worker, call, False)
        elif isinstance(value, MissingArgument):
            self.event("retry", key=call.key, reason=value.message)
            flow.missing(worker, call)
        elif isinstance(value, GroupBroken):
            self._last_error[call.key] = value.message
            flow.broken(worker, call)
        elif isinstance(value, WorkerOutOfMemory):
            tried = flow.shrink.get(call.key, 1)
            if tried >= MAX_SHRINK:
                raise value
            flow.shrink[call.key] = 4 * tried
            self.event("retry", key=call.key, reason=f"{value.message}; once more with batches {4 * tried} times smaller")
            flow.lost(worker, call, True)
        elif isinstance(value, StoreError):
            self._count(call, worker, value.message, value)
            self._tired[worker] += 1
            self._resting[worker] = time.monotonic() + self.limits.rest * 2 ** (self._tired[worker] - 1)
            flow.lost(worker, call, True)
        elif isinstance(value, BaseException):
            raise value
        else:
            seconds = value.seconds if isinstance(value, ItemResult) else time.monotonic() - running.began
            rate = seconds / max(call.cost, 1e-9)
            self._rates[call.method] = max(rate, self._rates.get(call.method, 0.0))
            received = value.received if isinstance(value, ItemResult) else 0
            self.event("finished", method=call.method, key=call.key, worker=self.session.name(worker), seconds=seconds,
                       received=received)  # fmt: skip
            flow.finished(worker, call, value, second)

    def _count(self, call: Call, worker: int, reason: str, error: Exl2RayError | None) -> None:
        if call.attempt not in self._counted:  # a group that goes down with its machine is one loss
            self._counted.add(call.attempt)
            self._losses[call.key] += 1
        self._last_error[call.key] = reason
        self.event("lost", key=call.key, method=call.method, reason=reason, times=self._losses[call.key])
        if self._losses[call.key] >= self.limits.losses:
            if error is not None:
                raise error
            raise ClusterError(
                f"{call.key} ({call.method}) lost its workers {self.limits.losses} times; the last time: {reason}",
                f"see {self.session.log_place()}; running out of memory is the usual cause",
            )

    def last_error(self, key: str) -> str:
        return self._last_error.get(key, "")

    def _enforce(self, flow: Flow) -> None:
        """Kills workers past their deadline, and those that the flow gives up."""
        now = time.monotonic()
        for worker, running in list(self._running.items()):
            if now > running.deadline:
                self.session.kill(worker)
                seconds = now - running.began
                self._settle(flow, worker, Lost(f"no answer for {seconds:.0f} s, far beyond what such items take"), None)
        for worker in flow.overdue():
            running_call = self._running.pop(worker, None)
            self.session.kill(worker)
            if running_call is not None:
                flow.lost(worker, running_call.call, False)

    def _note_losses(self) -> None:
        while self.session.notes:
            self.event("note", message=self.session.notes.pop(0))

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
