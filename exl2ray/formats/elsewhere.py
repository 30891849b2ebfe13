"""Folders of models whose weights are elsewhere: on the Hub, in an object store.

Such a folder, a temporary one, holds the small files. Its shards are known by name and size, and read in pieces from where
they are. Whoever makes one (`exl2ray.remote`) registers it here for this process; nothing inside a folder can make it one.
Everything else goes on working with paths: ``open_binary`` reads a shard wherever it is.
"""

from __future__ import annotations

import io
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from exl2ray.formats.regular import open_regular

STAMP = "etag:"  # in front of the stamps of remote files, which follow the content
HEAD_BYTES = 1 << 18  # of a remote file that are read at once for its header: most of them fit
NEAR_BYTES = 1 << 14  # that are read at once for a sample: the next one may lie near
THREADS = 32  # that wait for small pieces of remote files


@dataclass(frozen=True)
class RemoteFile:
    """A file that is read in pieces. ``read(buffer, offset, keep)`` fills the buffer; raises typed errors, as ``now`` does.

    keep: whether what is read will be read again, so that it is worth disk.
    stamp: changes when the file does. now: the stamp at this moment. sha256 (hex) where the place tells it.
    """

    size: int
    stamp: str
    read: Callable[[memoryview, int, bool], None] = field(compare=False, repr=False)
    now: Callable[[], str] = field(compare=False, repr=False)
    sha256: str | None = None


@dataclass(frozen=True)
class Mount:
    """A folder, the address that it stands for (with the commit, on the Hub), and what is not in it.

    files: shards by name. others, folders: names of what nobody needs.
    """

    folder: Path
    address: str
    files: dict[str, RemoteFile]
    others: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()


_MOUNTS: dict[Path, Mount] = {}
_lock = threading.Lock()


def register(mount: Mount) -> None:
    with _lock:
        _MOUNTS[mount.folder] = mount


def mount_at(folder: str | Path) -> Mount | None:
    """The mount of a folder; None for an ordinary one."""
    return _MOUNTS.get(Path(os.path.abspath(folder))) if _MOUNTS else None


def remote_file(path: str | Path) -> RemoteFile | None:
    """The remote file that a path stands for; None for a path on this disk."""
    mount = mount_at(Path(path).parent)
    return None if mount is None else mount.files.get(Path(path).name)


def place_of(folder: str | Path) -> str:
    """Where a model is, for whoever comes later: its address, or the absolute path."""
    mount = mount_at(folder)
    return str(Path(folder).resolve()) if mount is None else mount.address


def named(text: str) -> str:
    """``text`` with addresses in place of the folders that stand for them."""
    for mount in list(_MOUNTS.values()):  # folders before those in them: the result is the same
        text = text.replace(str(mount.folder), mount.address)
    return text


def open_binary(path: str | Path, ahead: int = 0) -> BinaryIO:
    """For reading tensors, or headers and samples with ``ahead``: bytes that a remote file gives at once."""
    file = remote_file(path)
    if file is None:
        return open_regular(path) if ahead else open_regular(path, buffering=0)
    raw = _Raw(file, keep=not ahead)
    return io.BufferedReader(raw, ahead) if ahead else raw  # type: ignore[return-value]


class Pieces:
    """A file of which pieces are read, by several threads if need be. A context manager. OSError for one on this disk."""

    def __init__(self, path: str | Path) -> None:
        self._file = remote_file(path)
        self._handle = -1 if self._file is not None else os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, count: int, offset: int) -> bytes:
        """``count`` bytes from ``offset``; fewer where the file ends."""
        if self._file is None:
            return os.pread(self._handle, count, offset)
        out = bytearray(max(0, min(count, self._file.size - offset)))
        self._file.read(memoryview(out), offset, False)
        return bytes(out)

    def __enter__(self) -> Pieces:
        return self

    def __exit__(self, *_: object) -> None:
        if self._handle >= 0:
            os.close(self._handle)


class _Raw(io.RawIOBase):
    def __init__(self, file: RemoteFile, keep: bool) -> None:
        self._file, self._keep, self._at = file, keep, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = max(0, min(len(view), self._file.size - self._at))
        if count:
            self._file.read(view[:count], self._at, self._keep)
            self._at += count
        return count
