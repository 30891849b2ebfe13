"""Connecting to a Ray cluster, or starting a private one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import tempfile
from typing import Any

from exl2ray.errors import ClusterError, StoreError

OBJECT_STORE_BYTES = 256 << 20  # beside the states that travel
_MIN_STORE_BYTES = 80 << 20
TEMPORARY_BYTES, TEMPORARY_FILES = 32 << 20, 256


def start_ray(address: str | None, state_bytes: int = 0) -> Any:
    """Connects to a cluster or starts a private local Ray; returns the ray module.

    ``address``, else $RAY_ADDRESS, else "local": a bare ray.init() would silently attach to any Ray on this machine.
    Raises ClusterError. Signal handlers are put back afterwards, because ray.init replaces them.

    A private Ray has a token of its own. Left to itself, Ray (from 2.59 on) would write one to ~/.ray/auth_token, and a
    `ray start` later on this machine would find it and refuse nodes that do not have it. The token stays for the life of
    the process, since Ray reads it once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A paragraph on standard output for every worker that dies: the scheduler says it in a line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "A worker died or was killed while executing a task")
    import ray

    address = address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        hint = "check --ray-address and $RAY_ADDRESS; `exl2ray doctor` looks at this machine"
        hint += "; a cluster with token authentication needs RAY_AUTH_MODE=token and its RAY_AUTH_TOKEN"
    else:
        hint = "`exl2ray doctor` says what stands in Ray's way; one device needs no Ray: --executor inline --gpus 1"
        check_temporary_folder(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
        if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        options.update(
            include_dashboard=False,
            object_store_memory=store_bytes(state_bytes),
            num_cpus=max(1, os.cpu_count() or 1),
        )
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(**options)
    except (SystemExit, Exception) as e:  # a node that does not come up is a plain Exception, a stale address an exit
        reason = f"{type(e).__name__}: {str(e).strip()[:300]}"
        raise ClusterError(f"cannot start or reach Ray at {address!r}: {reason}", hint) from e
    finally:
        with contextlib.suppress(ValueError):  # not in the main thread: nobody touched the handlers
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)
    return ray


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


def store_bytes(state_bytes: int) -> int:
    """Object store for a few sets of states that fits /dev/shm: too large a store is a hard error of ray.init."""
    wanted = OBJECT_STORE_BYTES + 8 * state_bytes
    try:
        stats = os.statvfs("/dev/shm")
        free = stats.f_bavail * stats.f_frsize
    except OSError:
        return OBJECT_STORE_BYTES
    return max(_MIN_STORE_BYTES, min(wanted, int(free * 0.6)))
