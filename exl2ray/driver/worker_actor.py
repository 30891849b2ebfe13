"""The actor around a worker, the network interface that it uses, and errors on their way out of it.

Left to itself, gloo publishes the address that the host name resolves to. On many machines this is a loopback address, at
which other machines find only themselves, and the group waits for ever. The node's address in Ray is one at which it has
been reached already.
"""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import socket
import struct
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from exl2ray.errors import ClusterError, Exl2RayError
from exl2ray.store.file_names import LOGS
from exl2ray.store.open import open_store
from exl2ray.team.messages import DeviceFailed, Pass, WorkerSetup, translate


class Host:
    """What Ray makes an actor of: a worker, made in a call of its own so that what goes wrong arrives as it is."""

    def __init__(self, make: Callable[[WorkerSetup], Any], setup: WorkerSetup) -> None:
        self._make, self._setup = make, setup
        self._worker: Any = None

    def start(self) -> str:
        """Makes the worker. Returns host:pid."""
        import ray

        use_interface_of(str(ray.util.get_node_ip_address()))  # type: ignore[no-untyped-call]
        self._worker = self._make(self._setup)
        return f"{socket.gethostname()}:{os.getpid()}"

    def run(self, work: Pass) -> Iterator[Any]:
        """Goes through a pass; yields what the worker says."""
        try:
            yield from self._worker.run(work)
            return
        except Exception as e:
            error = translate(e)
            if not isinstance(e, Exl2RayError):
                _write_log(self._setup.work_root, type(work).__name__, traceback.format_exc())
            if error is e:
                raise
        # Outside of the handler: a traceback would keep the tensors of the frames alive.
        if not isinstance(error, DeviceFailed):
            self._worker.release()
        raise error

    def end_before(self, index: int) -> None:
        """As `Worker.end_before`; answered by another thread than the one that runs a pass."""
        self._worker.end_before(index)


def _write_log(root: str, what: str, text: str) -> None:
    """The traceback of an unexpected error, where everybody can read it."""
    with contextlib.suppress(Exl2RayError):
        name = f"{LOGS}/{socket.gethostname()}-{os.getpid()}-{time.strftime('%Y%m%dT%H%M%S')}.log"
        open_store(root).put(name, f"{what}\n{text}".encode())


def first_lines(e: BaseException) -> str:
    """Ray's reasons are pages long: the first lines that say something."""
    lines = [x.strip() for x in str(e).splitlines() if x.strip()]
    telling = [x for x in lines if "memory" in x.lower() or "exit" in x.lower() or "node" in x.lower()]
    chosen = [*lines[:1], *[x for x in telling[:2] if x not in lines[:1]]]
    return "; ".join(chosen)[:400] or type(e).__name__


def own_error(e: Exception) -> Exception:
    """The exception that the worker raised, rid of Ray's wrapping."""
    cause = getattr(e, "cause", None) or e
    if isinstance(cause, Exl2RayError):
        return type(cause)(cause.lines[0], cause.hint, cause.lines[1:]) if type(cause) in _typed() else cause
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


_SIOCGIFCONF, _IFREQ_BYTES = 0x8912, 40  # netdevice(7), 64-bit Linux
_MAX_ADDRESSES = 1024


def use_interface_of(address: str) -> None:
    """Binds the groups of this process to the interface that has this IPv4 address, unless the user chose one.

    An address that no interface has, or one that is not IPv4, changes nothing: the libraries then choose for themselves.
    """
    interface = interface_of(address)
    if interface is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
        os.environ.setdefault("NCCL_SOCKET_IFNAME", f"={interface}")  # "=": this one, not all whose names begin so


def interface_of(address: str) -> str | None:
    """Name of the interface with an IPv4 address, be it its only one or not; None if there is none."""
    try:
        wanted = socket.inet_pton(socket.AF_INET, address)
    except OSError:
        return None
    buffer = array.array("B", bytes(_MAX_ADDRESSES * _IFREQ_BYTES))
    place, size = buffer.buffer_info()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        answer = fcntl.ioctl(s.fileno(), _SIOCGIFCONF, struct.pack("iP", size, place))
    used: int = struct.unpack("iP", answer)[0]
    data = buffer.tobytes()
    for start in range(0, used, _IFREQ_BYTES):
        if data[start + 20 : start + 24] == wanted:
            return data[start : start + 16].partition(b"\0")[0].decode().partition(":")[0]  # "eth0:1" is eth0 too
    return None
