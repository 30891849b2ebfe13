"""What happens after each kind of fault, on one page.

| fault of a call | what happens |
|---|---|
| `Lost`: worker killed, crashed, hung, CUDA error, node gone | another process takes its place; counted |
| `WorkerOutOfMemory` | the module is tried again with batches a quarter as large, down to a single row |
| `StoreError` | the worker rests, each time twice as long; others take over; counted |
| `JobMismatchError`, `GaveUpError` (of the store, too) | trying again would not help: raised, the job stops |
| `GroupBroken`: another member of the group is gone | this worker keeps what it has and joins the next group |
| anything else | it would happen again: raised, the job stops |

Whatever happened, the modules of the call without a result are free again, and whoever is idle takes them; the one in hand
is looked up first, since it may have been committed. A module that is counted three times stops the job, and so does a
group that breaks five times in a row although nobody is lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from exl2ray.errors import ClusterError, JobMismatchError, StoreError
from exl2ray.store.faults import GaveUpError
from exl2ray.team.messages import GroupBroken, WorkerOutOfMemory

MAX_SHRINK = 64  # of the batches of a module that ran out of memory; then a single row does not fit
MAX_BREAKS = 5  # of groups whose members all live on


@dataclass(frozen=True)
class Limits:
    """When to give up. Seconds, except ``losses`` and ``factor``."""

    losses: int = 3  # workers that one module may take down
    first: float = 6 * 3600.0  # deadline of a kind of work that nobody has finished yet
    floor: float = 300.0  # least deadline
    factor: float = 20.0  # deadline over the time expected from the slowest rate seen
    grace: float = 10.0  # for the other members of a broken group to notice
    patience: float = 20.0  # for a replacement to start before a group goes on without it
    rest: float = 2.0  # for a worker whose storage failed, doubled every time


@dataclass(frozen=True)
class Lost:
    """The worker died or hung before it answered. ``reason`` is what is known about it."""

    reason: str


Fault = Lost | Exception


class Policy:
    """Counts faults and says what they mean. ``event(name, fields)`` hears of each: lost, retry."""

    def __init__(self, limits: Limits, event: Callable[..., None], log_place: Callable[[], str]) -> None:
        self.limits, self._event, self._log_place = limits, event, log_place
        self.shrink: dict[str, int] = {}  # profile key -> divisor of batch sizes
        self._losses: Counter[str] = Counter()
        self._counted: set[tuple[int, str]] = set()
        self._tired: Counter[int] = Counter()
        self._breaks = 0

    def after(self, fault: Fault, worker: int, call: int, method: str, key: str) -> float:
        """Seconds that the worker shall rest; raises what stops the job.

        call: number that the members of a group share, so that a group that goes down with its machine is one loss. method,
        key: what the worker had in hand.
        """
        if isinstance(fault, WorkerOutOfMemory):
            self._smaller(fault, key)
            return 0.0
        if isinstance(fault, GroupBroken):
            self._broken(call, key)
            return 0.0
        if not isinstance(fault, (Lost, StoreError)) or isinstance(fault, (JobMismatchError, GaveUpError)):
            raise fault
        self._breaks = 0
        reason = fault.reason if isinstance(fault, Lost) else fault.message
        if (call, key) not in self._counted:
            self._counted.add((call, key))
            self._losses[key] += 1
        times = self._losses[key]
        self._event("lost", key=key, method=method, reason=reason, times=times)
        if times >= self.limits.losses:
            if isinstance(fault, StoreError):
                raise fault
            raise ClusterError(
                f"{key} ({method}) lost its workers {times} times; the last time: {reason}",
                f"see {self._log_place()}; running out of memory is the usual cause",
            )
        if isinstance(fault, Lost):
            return 0.0
        self._tired[worker] += 1
        return self.limits.rest * float(1 << (self._tired[worker] - 1))

    def progress(self) -> None:
        """A module was finished."""
        self._breaks = 0

    def _smaller(self, fault: WorkerOutOfMemory, key: str) -> None:
        tried = self.shrink.get(key, 1)
        if tried >= MAX_SHRINK:
            raise fault
        self.shrink[key] = 4 * tried
        self._event("retry", key=key, reason=f"{fault.message}; once more with batches {4 * tried} times smaller")

    def _broken(self, call: int, key: str) -> None:
        if any(c == call for c, _ in self._counted):
            return  # another member was lost, or has said the same
        self._counted.add((call, ""))
        self._breaks += 1
        if self._breaks >= MAX_BREAKS:
            raise ClusterError(
                f"{key}: a group of workers cannot work together, although all of them are well",
                "check that the machines reach each other (firewall, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME)",
            )
