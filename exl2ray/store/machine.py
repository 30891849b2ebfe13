"""Who is this process, and does that other one still live? Identity of the holder of a lock."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """A process, told apart from others of its number: after a reboot, in another container, on another machine.

    ``boot_id`` and ``pid_namespace`` are empty and ``start_ticks`` 0 where the system does not tell (not Linux).
    """

    host: str
    pid: int
    boot_id: str
    pid_namespace: str
    start_ticks: int


def this_process() -> Process:
    pid = os.getpid()
    state = _state_and_start(pid)
    return Process(
        host=socket.gethostname(),
        pid=pid,
        boot_id=_read_text(Path("/proc/sys/kernel/random/boot_id")).strip(),
        pid_namespace=_pid_namespace(),
        start_ticks=state[1] if state else 0,
    )


def same_machine(a: Process, b: Process) -> bool:
    """Whether process numbers of ``a`` and ``b`` can be compared. Equal host names alone prove nothing."""
    return (a.host, a.boot_id, a.pid_namespace) == (b.host, b.boot_id, b.pid_namespace)


def is_alive(process: Process) -> bool:
    """Whether a process of this machine still runs. A zombie does not; nor does a later owner of its number count."""
    try:
        os.kill(process.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, but there
    found = _state_and_start(process.pid)
    if found is None:
        return True  # /proc is missing or hidden: believe kill
    state, start_ticks = found
    return state not in "ZX" and (process.start_ticks == 0 or start_ticks == process.start_ticks)


def _state_and_start(pid: int) -> tuple[str, int] | None:
    """Fields 3 and 22 of /proc/<pid>/stat; the name before them may contain anything but ends with the last ')'."""
    fields = _read_text(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else None


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
