"""Workers as Ray actors: started, heard, replaced when they are lost.

Ray's own retries are off (max_restarts=0, max_task_retries=0): what a lost worker had in hand comes back as `Lost`, another
actor takes its number, and the policy decides what becomes of the rest. A worker that waits for a GPU (a node that joins
late, an autoscaler) is a pending actor; it takes part as soon as it runs. A pass is one call, a generator whose values stream
to the driver; a second thread of the actor hears requests to end it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exl2ray import stopping
from exl2ray.driver.policy import Lost
from exl2ray.driver.starting import expected_workers, is_of_a_cluster, start_ray, stop_ray
from exl2ray.driver.worker_actor import Host, first_lines, own_error
from exl2ray.driver.workers import InlineWorkers, Over, Said, Workers
from exl2ray.errors import ClusterError
from exl2ray.store.file_names import LOGS
from exl2ray.team.comm import serve_rendezvous
from exl2ray.team.messages import DeviceFailed, Meeting, Pass, WorkerSetup

START_SECONDS = 600  # until the first worker runs, or until one runs again after all were lost
GATHER_SECONDS = 5.0  # at the start, for more workers than the first
GATHER_GPUS_SECONDS = 30.0  # the same where the GPUs for all of them are there: whoever is late begins alone
GROW_SECONDS = 10.0  # between two looks for GPUs that have joined
MAX_START_FAILURES = 5  # in a row
CONTROL = "control"  # the actors' second thread
_SERIALS = itertools.count(1)  # of meetings


@dataclass
class _Slot:
    """One worker. starting: reference of its start, until it runs; stream: of what its call says."""

    actor: Any
    starting: Any = None
    stream: Any = None
    name: str = ""

    @property
    def waited_for(self) -> Any:
        return self.starting if self.starting is not None else self.stream


class RayWorkers:
    """`Workers` on one Ray actor per GPU, or CPU actors.

    workers: how many; None: one per GPU that Ray offers, more as GPUs join, or one on CPUs. claim: resources of an actor
    in place of one GPU (or one CPU).
    """

    def __init__(
        self,
        setup: WorkerSetup,
        make: Callable[[WorkerSetup], Any],
        workers: int | None = None,
        address: str | None = None,
        claim: dict[str, Any] | None = None,
    ) -> None:
        self._ray = start_ray(address, expected_workers(setup.device, workers))
        self.notes: list[str] = []
        self._setup, self._make = setup, make
        self._slots: dict[int, _Slot] = {}
        self._meetings: dict[tuple[str, ...], tuple[Any, Meeting]] = {}  # names of workers by rank -> (store, meeting)
        self._failures = 0
        self._alive_at = self._grown_at = time.monotonic()
        try:
            cuda = setup.device == "cuda"
            if cuda and self._gpus() == 0 and workers is None:
                raise ClusterError(
                    "Ray offers no GPU", "check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu"
                )
            self._grow = cuda and workers is None
            count = workers or (self._gpus() if cuda else 1)
            self._setup = replace(setup, alone=count == 1)
            # A Ray of our own has as many processors as it was told: GPUs are what counts there.
            options = claim or ({"num_gpus": 1, "num_cpus": int(is_of_a_cluster())} if cuda else {"num_cpus": 1})
            # Ray ships the class by value; wrapping a factory lets tests use workers of their own.
            self._actor = self._ray.remote(
                max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", concurrency_groups={CONTROL: 1}, **options
            )(Host)
            for worker in range(count):
                self._start(worker)
            there = cuda and count <= self._gpus()  # else an autoscaler may take minutes
            self._await_first(GATHER_GPUS_SECONDS if there else GATHER_SECONDS)
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

    @property
    def size(self) -> int:
        return len(self._slots)

    def _gpus(self) -> int:
        return int(self._ray.cluster_resources().get("GPU", 0))

    # ---- calls -------------------------------------------------------------------------------------------------

    def idle(self) -> list[int]:
        return [w for w, s in self._slots.items() if s.waited_for is None]

    def starting(self) -> int:
        return sum(s.starting is not None for s in self._slots.values())

    def name(self, worker: int) -> str:
        return self._slots[worker].name

    def now(self) -> float:
        return time.monotonic()

    def start(self, worker: int, work: Pass) -> None:
        slot = self._slots[worker]
        slot.stream = slot.actor.run.options(num_returns="streaming").remote(work)

    def end_before(self, worker: int, index: int) -> None:
        self._slots[worker].actor.end_before.options(concurrency_group=CONTROL).remote(index)

    def wait(self, seconds: float) -> tuple[int, Said] | None:
        self._look_after()
        waited = {id(s.waited_for): w for w, s in self._slots.items() if s.waited_for is not None}
        if not waited:
            time.sleep(min(seconds, 0.05))
            return None
        streams = [self._slots[w].waited_for for w in waited.values()]
        ready, _ = self._ray.wait(streams, num_returns=1, timeout=seconds, fetch_local=False)
        if not ready:
            return None
        worker = waited[id(ready[0])]
        slot = self._slots[worker]
        value = self._value(slot)
        if slot.starting is not None:
            slot.starting = None
            self._end_start(worker, slot, value)
            return None
        if isinstance(value, DeviceFailed):
            value = Lost(value.message)
        if isinstance(value, (Lost, Exception, Over)):
            slot.stream = None
        if isinstance(value, (Lost, Exception)):
            self._leave_groups(worker)
        if isinstance(value, Lost):
            self._replace(worker)
        return worker, value

    def _value(self, slot: _Slot) -> Any:
        """What a worker said, the exception that it raised, or Lost."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(slot.starting if slot.starting is not None else next(slot.stream))
        except StopIteration:
            return Over()
        except errors.RayTaskError as e:
            return own_error(e)
        except errors.RayError as e:
            return Lost(first_lines(e) if isinstance(e, errors.RayActorError) else f"{type(e).__name__}: {first_lines(e)}")

    def _end_start(self, worker: int, slot: _Slot, value: Any) -> None:
        """A worker that runs now; or one that could not start: an error of the set-up, or a process that died."""
        if isinstance(value, str):
            slot.name = value
            self._failures, self._alive_at = 0, time.monotonic()
            return
        if isinstance(value, Exception):
            if not any(s.name for s in self._slots.values()):
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
        if any(s.starting is None for s in self._slots.values()):
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
        self._leave_groups(worker)
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

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        names = tuple(self.name(w) for w in workers)
        # Who goes elsewhere leaves its group; a store that a group has met at once still has their old addresses.
        self._meetings = {n: m for n, m in self._meetings.items() if n == names or not {*n} & {*names}}
        if len(workers) == 1:
            return [Meeting()]
        if names not in self._meetings:
            address = str(self._ray.util.get_node_ip_address())
            store, port = serve_rendezvous(address)
            self._meetings[names] = (store, Meeting((address, port), 0, len(names), next(_SERIALS)))
        _, meeting = self._meetings[names]
        return [replace(meeting, rank=rank) for rank in range(len(names))]

    def _leave_groups(self, worker: int) -> None:
        """A call of this worker failed, so it has left its group (`Host.run`); the others need another one."""
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


def open_workers(
    setup: WorkerSetup,
    make: Callable[[WorkerSetup], Any],
    executor: str,
    workers: int | None = None,
    address: str | None = None,
) -> Workers:
    """A worker in this process, or ``workers`` Ray actors (None: one per GPU, or one on CPUs)."""
    if executor == "inline":
        return InlineWorkers(setup, make)
    return RayWorkers(setup, make, workers, address)
