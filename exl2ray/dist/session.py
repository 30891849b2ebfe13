"""Workers and how to talk to them: inline in this process, or as Ray actors.

The driver submits calls and waits for outcomes; workers are disposable. Ray's own retries are off (max_restarts=0,
max_task_retries=0): a lost item comes back as `Lost`, the session replaces the worker, and the schedule decides what
becomes of the item. A worker that waits for a GPU (a node that joins late, an autoscaler) is a pending actor; it takes part
as soon as it runs. See docs/architecture.md for the facts about Ray behind these choices.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from exl2ray import stopping
from exl2ray.dist.comm import RENDEZVOUS_SECONDS, serve_rendezvous
from exl2ray.dist.faults import DeviceFailed, translate
from exl2ray.dist.items import Meeting, WorkerSetup
from exl2ray.dist.network import use_interface_of
from exl2ray.dist.starting import start_ray, stop_ray
from exl2ray.errors import ClusterError, Exl2RayError
from exl2ray.quant.rows import SHARES
from exl2ray.store.fs import Store
from exl2ray.store.layout import LOGS

START_SECONDS = 600  # until the first worker runs, or until one runs again after all were lost
GATHER_SECONDS = 5.0  # at the start, for more workers than the first
GATHER_GPUS_SECONDS = 30.0  # the same where the GPUs for all of them are there: whoever is late has no part in the sweep
GROW_SECONDS = 10.0
MAX_START_FAILURES = 5  # in a row
_SERIALS = itertools.count(1)  # of meetings


@dataclass(frozen=True)
class Lost:
    """The worker died or hung before it answered. ``reason`` is what is known about it."""

    reason: str


@dataclass(frozen=True)
class Outcome:
    """worker: its number in the session. value: the call's result, an exception that the item raised, or Lost.

    ``second``: where the call returns two values, a handle of the second that later calls take as an argument.
    """

    worker: int
    value: Any
    second: Any = None


class Session(Protocol):
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

    def submit(self, worker: int, method: str, *args: Any, returns: int = 1) -> None:
        """Starts a call on an idle worker. With ``returns=2`` the method returns a pair."""
        ...

    def wait(self, timeout_seconds: float) -> Outcome | None:
        """The next outcome of any worker; None if none came in time."""
        ...

    def kill(self, worker: int) -> None:
        """Ends a worker whatever it does and starts another in its place; its call has no outcome."""
        ...

    def store_bytes(self) -> int | None:
        """Size of the store for states between workers; None where there is none."""
        ...

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        """Where these workers meet as a group, one for each, by rank. Workers that have met and are well need not again."""
        ...

    def log_place(self) -> str: ...

    def close(self) -> None: ...


class InlineSession:
    """One worker in this process: tests, debugging, and machines where Ray cannot run."""

    size = 1

    def __init__(self, setup: WorkerSetup, make: Callable[[WorkerSetup], Any]) -> None:
        self._setup, self._make = setup, make
        self._worker = make(setup)
        self._done: list[Outcome] = []
        self.notes: list[str] = []

    def idle(self) -> list[int]:
        return [] if self._done else [0]

    def starting(self) -> int:
        return 0

    def name(self, worker: int) -> str:
        return f"{socket.gethostname()}:{os.getpid()}"

    def submit(self, worker: int, method: str, *args: Any, returns: int = 1) -> None:
        try:
            value: Any = getattr(self._worker, method)(*args)
        except Exception as e:
            error = translate(e)
            if isinstance(error, DeviceFailed):
                raise error from e  # this process has lost its GPU
            self._done.append(Outcome(worker, error))
            return
        self._done.append(Outcome(worker, *value) if returns == 2 else Outcome(worker, value))

    def wait(self, timeout_seconds: float) -> Outcome | None:
        return self._done.pop(0) if self._done else None

    def kill(self, worker: int) -> None:
        self._done.clear()
        self._worker = self._make(self._setup)

    def store_bytes(self) -> int | None:
        return None

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        return [Meeting()]

    def log_place(self) -> str:
        return "this process"

    def close(self) -> None:
        self._worker = None


@dataclass
class _Slot:
    """One worker of a RaySession. ``call``: reference of what it works on, the start included."""

    actor: Any
    call: Any
    second: Any = None
    ready: bool = False
    name: str = ""
    began: float = field(default_factory=time.monotonic)


class RaySession:
    """One Ray actor per GPU, or CPU actors.

    workers: how many; None: one per GPU that Ray offers, more as GPUs join, or one on CPUs. claim: resources of an actor
    in place of one GPU (or one CPU). state_bytes: size of the states between two modules, for the local object store.
    """

    def __init__(
        self,
        setup: WorkerSetup,
        make: Callable[[WorkerSetup], Any],
        workers: int | None = None,
        address: str | None = None,
        state_bytes: int = 0,
        claim: dict[str, Any] | None = None,
    ) -> None:
        self._ray = start_ray(address, state_bytes)
        self.notes: list[str] = []
        self._setup, self._make = setup, make
        self._slots: dict[int, _Slot] = {}
        self._meetings: dict[tuple[str, ...], tuple[Any, Meeting]] = {}  # names of workers by rank -> (store, meeting)
        self._failures = 0
        self._alive_at = self._grown_at = time.monotonic()
        try:
            if setup.device == "cuda" and self._gpus() == 0 and workers is None:
                raise ClusterError(
                    "Ray offers no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu"
                )
            self._grow = setup.device == "cuda" and workers is None
            count = workers or (self._gpus() if setup.device == "cuda" else 1)
            self._setup = replace(setup, alone=count == 1)
            options = claim or ({"num_gpus": 1, "num_cpus": 1} if setup.device == "cuda" else {"num_cpus": 1})
            # Ray ships the class by value; wrapping a factory lets tests use workers of their own.
            self._actor = self._ray.remote(
                max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **options
            )(_Host)
            for worker in range(count):
                self._start(worker)
            there = setup.device == "cuda" and count <= self._gpus()  # else an autoscaler may take minutes
            self._await_first(GATHER_GPUS_SECONDS if there else GATHER_SECONDS)
            if setup.device == "cuda":
                self._introduce()
        except BaseException:
            self.close()
            raise

    # ---- starting ----------------------------------------------------------------------------------------------

    def _start(self, worker: int) -> None:
        actor = self._actor.remote(self._make, self._setup)
        self._slots[worker] = _Slot(actor, actor.start.remote())

    def _await_first(self, patience: float) -> None:
        """Waits for one worker, and a little for more, so that errors of the set-up show at once and as they are."""
        first: float | None = None
        while self.starting():
            if first is not None and time.monotonic() - first > patience:
                return
            self.wait(0.2)
            if first is None and self.idle():
                first = time.monotonic()

    def _introduce(self, seconds: float = RENDEZVOUS_SECONDS) -> None:
        """Makes one group of the workers of one machine, while they are reading: connecting GPUs takes a second or two.

        seconds: for all of them to meet; whoever has not then is started anew.
        """
        members = self.idle()
        if not 2 <= len(members) <= SHARES or len({host_of(self.name(w)) for w in members}) > 1:
            return
        for worker, meeting in zip(members, self.meeting(members), strict=True):
            self.submit(worker, "meet", meeting)
        deadline = time.monotonic() + seconds
        while busy := [w for w in members if self._slots[w].ready and self._slots[w].call is not None]:
            outcome = self.wait(0.2)
            if outcome is not None and isinstance(outcome.value, (Lost, Exception)):
                reason = outcome.value.reason if isinstance(outcome.value, Lost) else _line(outcome.value)
                self.notes.append(f"worker {outcome.worker} cannot connect to the others: {reason}")
            if time.monotonic() > deadline:
                self.notes.append(f"{len(busy)} workers could not connect to the others in {seconds:g} s: started anew")
                for worker in busy:
                    self.kill(worker)

    @property
    def size(self) -> int:
        return len(self._slots)

    def _gpus(self) -> int:
        return int(self._ray.cluster_resources().get("GPU", 0))

    # ---- calls -------------------------------------------------------------------------------------------------

    def idle(self) -> list[int]:
        return [w for w, s in self._slots.items() if s.ready and s.call is None]

    def starting(self) -> int:
        return sum(not s.ready for s in self._slots.values())

    def name(self, worker: int) -> str:
        return self._slots[worker].name

    def submit(self, worker: int, method: str, *args: Any, returns: int = 1) -> None:
        slot = self._slots[worker]
        refs = slot.actor.call.options(num_returns=returns).remote(method, *args)
        slot.call, slot.second = refs if returns == 2 else (refs, None)

    def wait(self, timeout_seconds: float) -> Outcome | None:
        self._look_after()
        calls = {s.call: w for w, s in self._slots.items() if s.call is not None}
        if not calls:
            time.sleep(min(timeout_seconds, 0.05))
            return None
        ready, _ = self._ray.wait(list(calls), num_returns=1, timeout=timeout_seconds, fetch_local=False)
        if not ready:
            return None
        worker = calls[ready[0]]
        slot = self._slots[worker]
        second, slot.call, slot.second = slot.second, None, None
        value = self._value(ready[0])
        if not slot.ready:
            self._end_start(worker, slot, value)
            return None
        if isinstance(value, DeviceFailed):
            value = Lost(value.message)
        if isinstance(value, (Lost, Exception)):
            self._part(worker)
        if isinstance(value, Lost):
            self._replace(worker)
        return Outcome(worker, value, second)

    def _value(self, ref: Any) -> Any:
        """A call's result, the exception that it raised, or Lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(ref)
        except errors.RayActorError as e:
            return Lost(_line(e))
        except errors.RayTaskError as e:
            if isinstance(getattr(e, "cause", None), errors.RayError):
                return MissingArgument(_line(e))
            return _cause(e)
        except (errors.ObjectLostError, errors.OwnerDiedError, errors.ObjectFetchTimedOutError) as e:
            return MissingArgument(_line(e))
        except errors.RayError as e:
            return Lost(f"{type(e).__name__}: {_line(e)}")

    def _end_start(self, worker: int, slot: _Slot, value: Any) -> None:
        """A worker that runs now; or one that could not start: an error of the set-up, or a process that died."""
        if isinstance(value, str):
            slot.ready, slot.name = True, value
            self._failures, self._alive_at = 0, time.monotonic()
            return
        if isinstance(value, Exception):
            others = any(s.ready for s in self._slots.values())
            if not others:
                raise value
            self.notes.append(f"a worker cannot take part: {value}")
            self._ray.kill(slot.actor, no_restart=True)
            del self._slots[worker]
            self._grow = False
            return
        self._failures += 1
        reason = value.reason if isinstance(value, Lost) else str(value)
        if self._failures >= MAX_START_FAILURES:
            raise ClusterError(
                f"{self._failures} workers in a row died while starting; the last: {reason}",
                f"see {self.log_place()}; running out of memory is the usual cause",
            )
        self._replace(worker)

    def _look_after(self) -> None:
        """Notices when no worker has been running for too long, and GPUs that joined."""
        now = time.monotonic()
        if any(s.ready for s in self._slots.values()):
            self._alive_at = now
        elif now - self._alive_at > START_SECONDS:
            raise ClusterError(
                f"no worker has been running for {START_SECONDS} s",
                "Ray may lack free CPUs or GPUs: see `ray status`",
            )
        if self._grow and now - self._grown_at > GROW_SECONDS:
            self._grown_at = now
            for _ in range(self._gpus() - len(self._slots)):
                self._start(max(self._slots, default=-1) + 1)

    # ---- endings -----------------------------------------------------------------------------------------------

    def kill(self, worker: int) -> None:
        self._replace(worker)

    def _replace(self, worker: int) -> None:
        """Whatever kind of loss was reported: the process must be gone before another takes its place."""
        slot = self._slots[worker]
        self._part(worker)
        self._ray.kill(slot.actor, no_restart=True)
        host, _, pid = slot.name.rpartition(":")
        if pid.isdigit() and host == socket.gethostname() and self._is_ours(int(pid)):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)  # a stopped process does not hear of ray.kill
        self._start(worker)

    @staticmethod
    def _is_ours(pid: int) -> bool:
        try:
            return b"ray::" in Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def store_bytes(self) -> int | None:
        nodes = [n for n in self._ray.nodes() if n.get("Alive")]
        sizes = [n["Resources"].get("object_store_memory", 0) for n in nodes]
        return int(min(sizes)) if sizes else None

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        if len(workers) == 1:
            return [Meeting()]
        names = tuple(self.name(w) for w in workers)
        if names not in self._meetings:
            address = str(self._ray.util.get_node_ip_address())
            store, port = serve_rendezvous(address)
            place = (address, port)
            self._meetings[names] = (store, Meeting(place, 0, len(names), next(_SERIALS)))
        _, meeting = self._meetings[names]
        return [replace(meeting, rank=rank) for rank in range(len(names))]

    def _part(self, worker: int) -> None:
        """A call of this worker failed, so it has left its group (`_Host.call`); the others need another one."""
        self._meetings = {names: m for names, m in self._meetings.items() if self.name(worker) not in names}

    def log_place(self) -> str:
        try:
            folder = self._ray._private.worker._global_node.get_logs_dir_path()
        except AttributeError:
            folder = "/tmp/ray/session_latest/logs"
        return f"{folder} on the worker's machine and {self._setup.work_root}/{LOGS}"

    def close(self) -> None:
        with stopping.shielded():
            with contextlib.suppress(Exception):  # the cluster may be gone
                for slot in self._slots.values():
                    self._ray.kill(slot.actor, no_restart=True)
            self._slots.clear()
            stop_ray()


class MissingArgument(ClusterError):
    """States that a call was to take are gone with the machine that had them."""


class _Host:
    """The actor: a worker behind one generic method, so that new items need no new actor code."""

    def __init__(self, make: Callable[[WorkerSetup], Any], setup: WorkerSetup) -> None:
        self._make, self._setup = make, setup
        self._worker: Any = None

    def start(self) -> str:
        """Makes the worker, in a call of its own: what it raises arrives as it is. Returns host:pid."""
        import ray

        use_interface_of(str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
        self._worker = self._make(self._setup)
        return f"{socket.gethostname()}:{os.getpid()}"

    def call(self, method: str, *args: Any) -> Any:
        try:
            return getattr(self._worker, method)(*args)
        except Exception as e:
            error = translate(e)
            if not isinstance(e, Exl2RayError):
                _write_log(self._setup.work_root, method, traceback.format_exc())
            if error is e:
                raise
        # Outside of the handler: a traceback would keep the tensors of the frames alive.
        release = getattr(self._worker, "release", None)
        if release is not None and not isinstance(error, DeviceFailed):
            release()
        raise error


def _write_log(root: str, method: str, text: str) -> None:
    """The traceback of an unexpected error, where everybody can read it."""
    with contextlib.suppress(Exl2RayError):
        name = f"{LOGS}/{socket.gethostname()}-{os.getpid()}-{time.strftime('%Y%m%dT%H%M%S')}.log"
        Store.open(root).put(name, f"{method}\n{text}".encode())


def host_of(name: str) -> str:
    """Of host:pid."""
    return name.rpartition(":")[0]


def _line(e: BaseException) -> str:
    """Ray's reasons are pages long: the first lines that say something."""
    lines = [x.strip() for x in str(e).splitlines() if x.strip()]
    telling = [x for x in lines if "memory" in x.lower() or "exit" in x.lower() or "node" in x.lower()]
    chosen = [*lines[:1], *[x for x in telling[:2] if x not in lines[:1]]]
    return "; ".join(chosen)[:400] or type(e).__name__


def _cause(e: Exception) -> Exception:
    """The exception that the worker raised, rid of Ray's wrapping."""
    cause = getattr(e, "cause", None) or e
    if isinstance(cause, Exl2RayError):
        return type(cause)(cause.message, cause.hint) if type(cause) in _typed() else cause
    if isinstance(cause, Exception):
        return cause
    return ClusterError(str(e))


def _typed() -> set[type[Exl2RayError]]:
    """All error classes of exl2ray; Ray raises dynamic subclasses of them."""
    found, todo = set(), [Exl2RayError]
    while todo:
        kind = todo.pop()
        found.add(kind)
        todo += [k for k in kind.__subclasses__() if k.__module__.startswith("exl2ray.")]
    return found


def open_session(
    setup: WorkerSetup,
    make: Callable[[WorkerSetup], Any],
    executor: str,
    workers: int | None = None,
    address: str | None = None,
    state_bytes: int = 0,
) -> Session:
    """An inline session or a Ray session with ``workers`` workers (None: one per GPU, or one on CPUs)."""
    if executor == "inline":
        return InlineSession(setup, make)
    return RaySession(setup, make, workers, address, state_bytes)
