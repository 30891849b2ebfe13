"""Workers and how to talk to them: inline in this process, or as Ray actors. The only module that imports ray.

The driver submits calls and waits for outcomes; workers are disposable. Ray's own retries are off (max_restarts=0,
max_task_retries=0): a lost item comes back as `Lost`, and the schedule decides. See docs/architecture.md for the facts
about Ray behind these choices.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from exl2ray.dist.items import WorkerSetup
from exl2ray.errors import ClusterError, Exl2RayError

OBJECT_STORE_BYTES = 256 << 20  # items and results are small; states stay in the workers
_MIN_STORE_BYTES = 80 << 20
ACTOR_START_SECONDS = 300


@dataclass(frozen=True)
class Lost:
    """The worker died or hung before it answered. ``reason`` is what is known about it."""

    reason: str


@dataclass(frozen=True)
class Outcome:
    """worker: index in the session. value: the call's result, an exception that the item raised, or Lost."""

    worker: int
    value: Any


class Session(Protocol):
    size: int

    def submit(self, worker: int, method: str, *args: Any) -> None:
        """Starts a call on an idle worker."""
        ...

    def wait(self, timeout_seconds: float | None = None) -> Outcome | None:
        """The next outcome of any worker; None if none came in time."""
        ...

    def renew(self, worker: int) -> None:
        """Replaces a lost worker by a fresh one."""
        ...

    def close(self) -> None: ...


class InlineSession:
    """One worker in this process: tests, debugging, and machines where Ray cannot run."""

    size = 1

    def __init__(self, setup: WorkerSetup, make: Callable[[WorkerSetup], Any]) -> None:
        self._setup, self._make = setup, make
        self._worker = make(setup)
        self._done: list[Outcome] = []

    def submit(self, worker: int, method: str, *args: Any) -> None:
        try:
            value: Any = getattr(self._worker, method)(*args)
        except Exception as e:
            value = e
        self._done.append(Outcome(worker, value))

    def wait(self, timeout_seconds: float | None = None) -> Outcome | None:
        return self._done.pop(0) if self._done else None

    def renew(self, worker: int) -> None:
        self._worker = self._make(self._setup)

    def close(self) -> None:
        self._worker = None


class RaySession:
    """One Ray actor per GPU, or one on CPUs."""

    def __init__(
        self,
        setup: WorkerSetup,
        make: Callable[[WorkerSetup], Any],
        workers: int | None = None,
        address: str | None = None,
        log_dir: Path | None = None,
    ) -> None:
        self._ray = start_ray(address, log_dir)
        try:
            gpus = int(self._ray.cluster_resources().get("GPU", 0))
            if setup.device == "cuda" and gpus == 0:
                raise ClusterError(
                    "Ray offers no GPU",
                    "check nvidia-smi and CUDA_VISIBLE_DEVICES, or run with --device cpu",
                )
            if setup.device == "cuda":
                self.size = min(workers or gpus, gpus)
                options = {"num_gpus": 1, "num_cpus": 1}
            else:
                self.size = workers or 1
                cpus = self._ray.cluster_resources().get("CPU", 1)
                options = {"num_gpus": 0, "num_cpus": max(1, int(cpus) // self.size)}
                if setup.threads is None:
                    setup = replace(setup, threads=max(1, (os.cpu_count() or 1) // self.size))
            self._setup = setup
            # Ray ships the class by value; wrapping a factory lets tests use workers of their own.
            self._actor = self._ray.remote(max_restarts=0, max_task_retries=0, **options)(_Host)
            self._make = make
            self._actors: list[Any] = [self._actor.remote(make, self._setup) for _ in range(self.size)]
            self._calls: dict[Any, int] = {}
            self._await_start(range(self.size))
        except BaseException:
            self._ray.shutdown()
            raise

    def _await_start(self, workers: Any) -> None:
        """Waits until the actors are alive, so that set-up errors show at once and with their own type."""
        refs = [self._actors[w].call.remote("ping") for w in workers]
        try:
            self._ray.get(refs, timeout=ACTOR_START_SECONDS)
        except self._ray.exceptions.GetTimeoutError as e:
            raise ClusterError(
                f"workers did not start within {ACTOR_START_SECONDS} s",
                "Ray may lack free CPUs or GPUs: see `ray status`",
            ) from e
        except self._ray.exceptions.RayError as e:
            raise _cause(e) from e

    def submit(self, worker: int, method: str, *args: Any) -> None:
        self._calls[self._actors[worker].call.remote(method, *args)] = worker

    def wait(self, timeout_seconds: float | None = None) -> Outcome | None:
        if not self._calls:
            return None
        ready, _ = self._ray.wait(list(self._calls), num_returns=1, timeout=timeout_seconds)
        if not ready:
            return None
        worker = self._calls.pop(ready[0])
        try:
            return Outcome(worker, self._ray.get(ready[0]))
        except self._ray.exceptions.RayActorError as e:
            return Outcome(worker, Lost(str(e).strip().splitlines()[0]))
        except self._ray.exceptions.RayTaskError as e:
            return Outcome(worker, _cause(e))
        except self._ray.exceptions.RayError as e:
            return Outcome(worker, Lost(f"{type(e).__name__}: {e}"))

    def renew(self, worker: int) -> None:
        self._ray.kill(self._actors[worker], no_restart=True)
        self._actors[worker] = self._actor.remote(self._make, self._setup)
        self._await_start([worker])

    def close(self) -> None:
        for actor in self._actors:
            self._ray.kill(actor, no_restart=True)
        self._ray.shutdown()


class _Host:
    """The actor: a worker behind one generic method, so that new items need no new actor code."""

    def __init__(self, make: Callable[[WorkerSetup], Any], setup: WorkerSetup) -> None:
        self._worker = make(setup)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)


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
        todo += [k for k in kind.__subclasses__() if k.__module__ == Exl2RayError.__module__]
    return found


def start_ray(address: str | None, log_dir: Path | None) -> Any:
    """Connects to a cluster or starts a private local Ray; returns the ray module.

    ``address``, else $RAY_ADDRESS, else "local": a bare ray.init() would silently attach to any Ray on this machine.
    Raises ClusterError. Signal handlers are put back afterwards, because ray.init replaces them.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options.update(
            include_dashboard=False,
            object_store_memory=_store_bytes(),
            num_cpus=max(1, os.cpu_count() or 1),
        )
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except (SystemExit, ConnectionError, RuntimeError, ValueError, OSError) as e:
        raise ClusterError(
            f"cannot start or reach Ray at {address!r}: {type(e).__name__}: {str(e).strip()[:300]}",
            "check --ray-address and $RAY_ADDRESS; `exl2ray doctor` looks at this machine",
        ) from e
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
    return ray


def _store_bytes() -> int:
    """Object store size that fits /dev/shm: too large a store is a hard error of ray.init."""
    try:
        stats = os.statvfs("/dev/shm")
        free = stats.f_bavail * stats.f_frsize
    except OSError:
        return OBJECT_STORE_BYTES
    return max(_MIN_STORE_BYTES, min(OBJECT_STORE_BYTES, int(free * 0.8)))


def open_session(
    setup: WorkerSetup,
    make: Callable[[WorkerSetup], Any],
    executor: str,
    workers: int | None = None,
    address: str | None = None,
) -> Session:
    """An inline session or a Ray session with ``workers`` workers (None: one per GPU, or one on CPUs)."""
    if executor == "inline":
        return InlineSession(setup, make)
    return RaySession(setup, make, workers, address)


def now() -> float:
    return time.monotonic()
