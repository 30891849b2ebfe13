"""A Ray of a conversion's own: nobody else may talk to it, reach it from another machine, or look into its files.

Ray runs code for whoever can talk to it. So a private one

* has a token of its own, and the mode in which it is asked for: Ray of the versions that pyproject allows uses the one
  only together with the other. Whether strangers are turned away is tried out before any work is given to it;
* listens on the loopback interface only. `_node_ip_address` alone does not do that: Ray replaces a loopback address by
  one that other machines can reach, except where it believes that it cannot have any (Windows, macOS), and there is a
  variable to make it believe so;
* has its session folder, whose sockets and logs everybody may write by Ray's own modes, inside a directory that only this
  user can enter. It goes when the Ray is stopped; what killed ones left, goes when the next one starts.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import struct
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from exl2ray.errors import ClusterError
from exl2ray.store.temporary import abandoned, hold

# The first that turns away whoever has no token: 2.51 ignores the settings; 2.52 and 2.53 follow them in gRPC, but the HTTP
# server of the agent (with ray[default]) takes jobs from everybody.
FIRST_RAY = (2, 54)
LOOPBACK = "127.0.0.1"
TEMP_PREFIX = "exl2ray-ray-"
HEAD = b"exl2ray.driver.head"  # in the command line of the process that starts it
LOCK = "in-use"  # held by the process whose Ray it is
_SOCKET_BYTES = 107  # longest path of a Unix socket
_BELOW = len("/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store.sock")
_PROBE_SECONDS = 60.0  # an answer takes a millisecond, on a machine that is not busy with other things
_END_SECONDS = 10.0  # that a process has to end in once it is killed
_LOOPBACK_ONLY = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


@dataclass
class PrivateRay:
    """The place of a private Ray. ``options``: for ray.init; ``settings``: variables of its environment, None: not set."""

    folder: Path
    lock: int  # descriptor of the locked file in the folder
    options: dict[str, Any]
    settings: dict[str, str | None]
    before: dict[str, str | None] = field(default_factory=dict)  # this process's variables as they were

    def environment(self) -> dict[str, str]:
        """That of this process, with the settings."""
        return {name: value for name, value in {**os.environ, **self.settings}.items() if value is not None}

    def enter(self) -> None:
        """Applies the settings to this process, which is about to talk to the Ray."""
        self.before = {name: os.environ.get(name) for name in self.settings}
        _set_environment(self.settings)

    def close(self, keep_files: bool = False) -> None:
        """Undoes everything. keep_files: they say why Ray failed, and the next private Ray removes them."""
        _set_environment(self.before)
        _read_environment_again()
        _end_processes(self.folder)
        if not keep_files:
            _remove(self.folder)
        with contextlib.suppress(OSError):
            os.close(self.lock)


def prepare() -> PrivateRay:
    """A new folder, and the settings with which a private Ray may be started in it. Raises ClusterError."""
    folder, lock = _own_folder()
    settings = {
        "RAY_AUTH_MODE": "token",  # whatever the user has chosen for clusters
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_AUTH_TOKEN_PATH": None,
        _LOOPBACK_ONLY: "0",
    }
    return PrivateRay(folder, lock, {"_node_ip_address": LOOPBACK, "_temp_dir": str(folder / "r")}, settings)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def refuse_old(ray: ModuleType) -> None:
    """Raises ClusterError for a Ray that does not ask for tokens."""
    parts = str(ray.__version__).split(".")
    try:
        version = int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return  # a build of somebody's own: what counts is tried out
    if version < FIRST_RAY:
        wanted = ".".join(map(str, FIRST_RAY))
        raise ClusterError(
            f"Ray {ray.__version__} lets others run code: it asks for no token, or not everywhere",
            f"pip install 'ray>={wanted}'; one device needs no Ray: --executor inline --gpus 1",
        )


@contextlib.contextmanager
def on_loopback() -> Iterator[None]:
    """While inside, a Ray that is started listens on the loopback interface; also where Ray was imported long ago."""
    _read_environment_again()
    constants: Any = None
    with contextlib.suppress(ImportError):
        from ray._private import ray_constants as constants
    before = getattr(constants, "ENABLE_RAY_CLUSTER", None)
    if before is not None:
        constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        if before is not None:
            constants.ENABLE_RAY_CLUSTER = before


def _read_environment_again() -> None:
    """Ray reads its token and mode once per process."""
    with contextlib.suppress(ImportError, AttributeError):
        import ray._raylet

        raylet: Any = ray._raylet

        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()


# ---- files ----------------------------------------------------------------------------------------------------------


def _own_folder() -> tuple[Path, int]:
    """A new directory that only this user can enter, and the descriptor of the lock in it. Ray's sockets fit in."""
    wanted = os.environ.get("RAY_TMPDIR")
    places = [wanted] if wanted else [tempfile.gettempdir(), "/tmp", "/var/tmp"]
    room = _SOCKET_BYTES - _BELOW - len(f"/{TEMP_PREFIX}12345678")
    complaint = ""
    for place in places:
        if len(os.path.abspath(place)) > room:
            complaint = complaint or f"{place} is too long a path for Ray's sockets (AF_UNIX path)"
            continue
        try:
            _sweep(Path(os.path.abspath(place)))
            folder = Path(tempfile.mkdtemp(prefix=TEMP_PREFIX, dir=os.path.abspath(place)))  # mode 0700
            return folder, hold(folder, LOCK)
        except OSError as e:
            complaint = complaint or f"{place}: {e.strerror}"
    raise ClusterError(
        f"no place for the files of a private Ray: {complaint}",
        "export RAY_TMPDIR to a directory of your own with a short name, such as /tmp",
    )


def _end_processes(folder: Path) -> None:
    """Kills what is left of the Ray of this folder. Agents wait a minute for a raylet that was killed, and what had been made
    when a signal interrupted the start would go on, and write its logs into a folder that is gone. Looks again until nothing
    is left, since what is killed may just have started something.
    """
    end = time.monotonic() + _END_SECONDS
    while (killed := _kill_those_of(folder)) and time.monotonic() < end:
        while any(map(_runs, killed)) and time.monotonic() < end:  # one that is not gone yet may still make a file
            time.sleep(0.01)


def _kill_those_of(folder: Path) -> list[Path]:
    """What it killed, as folders of /proc."""
    inside, killed = f"{folder}/", list[Path]()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if process.stat().st_uid != os.getuid() or int(process.name) == os.getpid():
                continue
            command = (process / "cmdline").read_bytes()
            if not command.startswith(b"ray::") and b"/ray/" not in command and HEAD not in command:
                continue  # somebody who reads a log
            if os.fsencode(f"{inside}r") in command or any(f.startswith(inside) for f in _open_files(process)):
                os.kill(int(process.name), signal.SIGKILL)
                killed.append(process)
    return killed


def _runs(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _open_files(process: Path) -> Iterator[str]:
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):
            yield os.readlink(descriptor)


def _remove(folder: Path) -> None:
    """The lock goes last: where a process that is about to end still writes into the rest, the next sweep finds it."""
    rest = folder / "r"
    shutil.rmtree(rest, ignore_errors=True)
    if not rest.exists():
        shutil.rmtree(folder, ignore_errors=True)


def _sweep(place: Path) -> None:
    """Removes what killed processes of this user left in ``place``: folders of ours whose lock nobody holds."""
    for folder in abandoned(place, TEMP_PREFIX, LOCK):
        _end_processes(folder)
        _remove(folder)


# ---- trying it out --------------------------------------------------------------------------------------------------

_METHOD = b"/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
_UNAUTHENTICATED = (b"grpc-status\x0216", b"grpc-status\x82\x0b\x9f")  # 16, as it is and in HPACK's Huffman code


def refuse_open(address: str) -> None:
    """Raises ClusterError unless the Ray at ``address`` (host:port) turns away a request without a token."""
    if not turns_away(address):
        raise ClusterError(
            f"the Ray that was started at {address} does not turn away who has no token; it was stopped again",
            "install another Ray (pip install -U ray); one device needs no Ray: --executor inline --gpus 1",
        )


def turns_away(address: str, method: bytes = _METHOD) -> bool:
    """Whether the gRPC server at ``address`` answers a call without a token with "unauthenticated" (RFC 9113 by hand)."""
    host, _, port = address.rpartition(":")
    headers = b"".join(
        _header(name, value)
        for name, value in (
            (b":method", b"POST"), (b":scheme", b"http"), (b":path", method), (b":authority", host.encode()),
            (b"content-type", b"application/grpc"), (b"te", b"trailers"),
        )
    )  # fmt: skip
    request = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b"")
    request += _frame(1, 4, 1, headers) + _frame(0, 1, 1, bytes(5))  # headers that end here; an empty message, the last
    answer = b""
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _PROBE_SECONDS) as connection:
            connection.sendall(request)
            while b"grpc-status" not in answer or len(answer) - answer.index(b"grpc-status") < 14:
                data = connection.recv(1 << 16)
                if not data or len(answer) > 1 << 20:
                    break
                answer += data
    except OSError:
        pass  # no answer, or half of one
    return any(sign in answer for sign in _UNAUTHENTICATED)


def _header(name: bytes, value: bytes) -> bytes:
    """Literal without indexing (RFC 7541, 6.2.2); both shorter than 127 bytes."""
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload
