"""Connecting to a Ray cluster, or starting a private one on this machine; and leaving it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import site
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2ray import stopping
from exl2ray.driver import private
from exl2ray.driver.head import PRELOADED, Head, cannot_start
from exl2ray.errors import ClusterError, Exl2RayError, StoreError

OBJECT_STORE_BYTES = 256 << 20  # that a local Ray asks of /dev/shm; what goes through it is small
_MIN_STORE_BYTES = 80 << 20  # Ray refuses to start with less than 75 MiB
CONNECT_SECONDS = 10.0  # to be answered at an address: Ray itself tries for many minutes
TEMPORARY_BYTES, TEMPORARY_FILES = 32 << 20, 256


@dataclass
class _Launched:
    """A private Ray. ``connected``: this process talks to it, or did."""

    place: private.PrivateRay
    head: Head
    connected: bool = False


_private: _Launched | None = None  # of this process, which has one Ray at a time


def expected_workers(device: str, workers: int | None) -> int:
    """How many a private Ray will have, as far as can be told before it runs."""
    if workers is not None or device == "cpu":
        return workers or 1
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    cards = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return max(1, cards if visible is None else len([x for x in visible.split(",") if x]))


def begin_private(workers: int) -> None:
    """Begins to start a private Ray for so many workers; `start_ray` waits for it, `stop_ray` ends it. Raises nothing: what
    goes wrong does so again where the Ray is needed."""
    with contextlib.suppress(Exl2RayError):
        _launch(workers)


def start_ray(address: str | None, workers: int | None = None) -> Any:
    """Connects to a cluster or starts a private local Ray; returns the ray module. ``stop_ray`` ends it.

    ``address``, else $RAY_ADDRESS, else "local": a bare ray.init() would silently attach to any Ray on this machine.
    ``workers``: for how many a private one has processes from the start; None: Ray's own choice, and nothing imported.
    Raises ClusterError; KeyboardInterrupt if a signal arrives meanwhile. Signal handlers are put back afterwards, because
    ray.init replaces them. What makes a private Ray private is in `exl2ray.driver.private`; of a cluster, the user's
    authentication mode and token are used.
    """
    _quiet()
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        return _start_private(workers)
    import ray

    _close_private()  # of a Ray that was left by ray.shutdown
    hint = "check --ray-address and $RAY_ADDRESS; `exl2ray doctor` looks at this machine"
    hint += "; a cluster with token authentication needs RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN"
    _check_answers(address, hint)
    _init(ray, hint, address, address=address)
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


def _quiet() -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A paragraph on standard output for every worker that dies: the scheduler says it in a line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")


def _launch(workers: int | None) -> _Launched:
    """A process that starts a private Ray. Raises StoreError and ClusterError for what is in its way."""
    global _private
    _quiet()
    _close_private()
    check_temporary_folder(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    with stopping.shielded():
        place = private.prepare()
        config: dict[str, Any] = {"enable_metrics_collection": False}
        if workers is not None:
            config["preload_python_modules"] = PRELOADED
        options = {
            **place.options, "object_store_memory": store_bytes(), "num_cpus": workers or os.cpu_count() or 1,
            "_system_config": config,
        }  # fmt: skip
        _private = _Launched(place, Head(options, place.environment(), trusted_folder()))
        return _private


def _start_private(workers: int | None) -> Any:
    made = _private
    if made is None or made.connected:  # of a Ray that was left by ray.shutdown
        made = _launch(workers)
    hint = "`exl2ray doctor` says what stands in Ray's way; one device needs no Ray: --executor inline --gpus 1"
    try:
        import ray

        address = made.head.address("local", hint)
        made.connected = True
        made.place.enter()
        with private.on_loopback():
            _init(ray, hint, "local", address=address, _node_ip_address=private.LOOPBACK)
    except BaseException as e:
        stop_ray(keep_files=isinstance(e, ClusterError))
        raise
    return ray


def stop_ray(keep_files: bool = False) -> None:
    """Leaves the cluster, or ends the private Ray and removes its files; none of this where there is no Ray.

    Ray sets SIGTERM to its default when it disconnects: the handler is put back at once.
    """
    with stopping.shielded():
        if "ray" in sys.modules:
            import ray

            with stopping.kept():
                ray.shutdown()
        _close_private(keep_files)


def _close_private(keep_files: bool = False) -> None:
    global _private
    if _private is not None:
        _private.head.end()
        _private.place.close(keep_files)
        _private = None


def _init(ray: Any, hint: str, name: str, **options: Any) -> None:
    """ray.init with errors of our own, which call the address by this name, and a SIGTERM that means what it means elsewhere.

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
                raise _failed(name, e, hint) from e
            terminated = True
            signal.alarm(0)
            put_back()  # perhaps it was interrupted
        except Exception as e:  # a node that does not come up is a plain Exception
            raise _failed(name, e, hint) from e
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


def _failed(name: str, e: BaseException, hint: str) -> ClusterError:
    return cannot_start(name, f"{type(e).__name__}: {e}", hint)


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
