"""Connecting to a Ray cluster, or starting a private one on this machine; and leaving it."""

from __future__ import annotations

import logging
import os
import signal
import site
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from exl2ray import stopping
from exl2ray.driver import private
from exl2ray.errors import ClusterError, StoreError

OBJECT_STORE_BYTES = 256 << 20
_MIN_STORE_BYTES = 80 << 20
CONNECT_SECONDS = 10.0
TEMPORARY_BYTES, TEMPORARY_FILES = 32 << 20, 256
_private: private.PrivateRay | None = None  # of this process, which has one Ray at a time


def start_ray(address: str | None) -> Any:
    """Connects to a cluster or starts a private local Ray; returns the ray module. ``stop_ray`` ends it.

    ``address``, else $RAY_ADDRESS, else "local": a bare ray.init() would silently attach to any Ray on this machine.
    Raises ClusterError; KeyboardInterrupt if a signal arrives meanwhile. Signal handlers are put back afterwards, because
    ray.init replaces them. What makes a private Ray private is in `exl2ray.driver.private`; of a cluster, the user's
    authentication mode and token are used.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A paragraph on standard output for every worker that dies: the scheduler says it in a line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        return _start_private()
    import ray

    _close_private()  # of a Ray that was left by ray.shutdown
    hint = "check --ray-address and $RAY_ADDRESS; `exl2ray doctor` looks at this machine"
    hint += "; a cluster with token authentication needs RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN"
    _check_answers(address, hint)
    _init(ray, hint, address=address)
    return ray


def is_of_a_cluster() -> bool:
    """Whether the Ray of this process, if there is one, is a cluster's, not one that was started for it alone."""
    return _private is None


def _check_answers(address: str, hint: str) -> None:
    """ClusterError if nobody listens there: Ray would try for many minutes. "auto" is Ray's to find."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as e:
        raise _failed(address, e, hint) from e


def _start_private() -> Any:
    global _private
    _close_private()
    check_temporary_folder(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    _private = private.prepare()
    try:
        import ray

        private.refuse_old(ray)
        hint = "`exl2ray doctor` says what stands in Ray's way; one device needs no Ray: --executor inline --gpus 1"
        with private.on_loopback():
            _init(
                ray, hint, address="local", include_dashboard=False, object_store_memory=store_bytes(),
                num_cpus=max(1, os.cpu_count() or 1), _system_config={"enable_metrics_collection": False},
                **_private.options,
            )  # fmt: skip
        private.refuse_open(str(ray.get_runtime_context().gcs_address))
    except BaseException as e:
        stop_ray(keep_files=isinstance(e, ClusterError))
        raise
    return ray


def stop_ray(keep_files: bool = False) -> None:
    """Leaves the cluster, or ends the private Ray and removes its files; none of this where there is no Ray.

    Ray sets SIGTERM to its default when it disconnects, a second before its processes have ended: the handler is put back in
    between, so that the signal does not end this process in the middle of it.
    """
    import ray

    with stopping.shielded(), stopping.kept() as put_back:
        node: Any = getattr(ray._private.worker, "_global_node", None)
        kill = getattr(node, "kill_all_processes", None)
        if kill is not None:
            node.kill_all_processes = _after(put_back, kill)
        ray.shutdown()
        _close_private(keep_files)


def _after(first: Callable[[], None], then: Callable[..., Any]) -> Callable[..., Any]:
    def both(*args: Any, **kwargs: Any) -> Any:
        first()
        return then(*args, **kwargs)

    return both


def _close_private(keep_files: bool = False) -> None:
    global _private
    if _private is not None:
        _private.close(keep_files)
        _private = None


def _init(ray: Any, hint: str, **options: Any) -> None:
    """ray.init with errors of our own, and a SIGTERM that means what it means elsewhere.

    While it runs, Ray's handler turns SIGTERM into SystemExit(SIGTERM). Ray's C++ part has one in front of it for some
    milliseconds, which prints a stack, hands on to the handler before, and sets an alarm that aborts the process three
    seconds later: that one is called off.
    """
    terminated = False
    handler = signal.getsignal(signal.SIGTERM)
    with stopping.kept() as put_back:
        try:
            try:
                with _away_from_here():
                    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
            finally:
                put_back()
        except SystemExit as e:  # of a signal; or a stale address
            if e.code != signal.SIGTERM:
                raise _failed(options["address"], e, hint) from e
            terminated = True
            signal.alarm(0)
            put_back()  # perhaps it was interrupted
        except Exception as e:  # a node that does not come up is a plain Exception
            raise _failed(options["address"], e, hint) from e
    if terminated:
        if callable(handler):
            handler(signal.SIGTERM, None)
        raise KeyboardInterrupt


def trusted_folder() -> str:
    """A folder from which Python may import: what it starts looks into the current directory first, and that may be the
    folder of a model, in which there may be a numpy.py. It is Python's own, or that of a checkout that was not installed.
    """
    package = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    known = [*os.environ.get("PYTHONPATH", "").split(os.pathsep), *site.getsitepackages(), site.getusersitepackages()]
    return sys.prefix if package in (os.path.abspath(path) for path in known if path) else package


@contextmanager
def _away_from_here() -> Iterator[None]:
    """While inside, the current directory is a trusted one: Ray hands it to its workers as the first place of modules."""
    here = os.open(".", getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(trusted_folder())
        yield
    finally:
        os.fchdir(here)
        os.close(here)


def _failed(address: str, e: BaseException, hint: str) -> ClusterError:
    reason = f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"
    return ClusterError(f"cannot start or reach Ray at {address!r}: {reason}", hint)


def check_temporary_folder(folder: str) -> None:
    """StoreError if there is no room for Ray's sockets and logs: it would wait for its own files, and name one of them."""
    try:
        stats = os.statvfs(folder)
    except OSError:
        return  # Ray takes another one
    full = stats.f_bavail * stats.f_frsize < TEMPORARY_BYTES or (stats.f_files > 0 and stats.f_favail < TEMPORARY_FILES)
    if full:
        raise StoreError(
            f"{folder}: the folder for temporary files is full, and Ray keeps sockets and logs there",
            "free space, or name another folder with TMPDIR; then run the same command again",
        )


def store_bytes() -> int:
    """Object store that fits /dev/shm: too large a one is a hard error of ray.init. What workers say goes past it."""
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return OBJECT_STORE_BYTES
    return max(_MIN_STORE_BYTES, min(OBJECT_STORE_BYTES, int(stats.f_bavail * stats.f_frsize * 0.6)))
