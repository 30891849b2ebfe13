"""Files of a work directory: what a store can do. ``local.py`` and ``object_store.py`` are the kinds, ``open.py`` picks one.

Names below the root are relative POSIX strings. Every
``put`` is atomic: a reader sees the old content, the new content or nothing, whatever is killed and whenever. Locally
this is the usual sequence: temporary file in the same directory, fsync, rename, fsync of the directory; on an object
store an object appears when its upload completes.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

from exl2ray.errors import StoreError
from exl2ray.store.faults import translated

TEMP_PREFIX = ".tmp-exl2ray-"  # then <pid>-<random>; swept by the next driver
TEMP_NAME = re.compile(r"\.tmp-exl2ray-\d+-[0-9a-f]{12}")
CHUNK_BYTES = 8 << 20

Names = list[str]  # the classes below have a method called list


class Store(ABC):
    """One root. Picklable: a worker process reopens it by its root, with its own environment (AWS_*).

    All methods raise StoreError for what the storage refuses, MissingFileError for a missing name.
    """

    root: str
    is_local: bool

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return (type(self), (self.root,))

    def full_name(self, rel: str) -> str:
        """``rel`` with the root in front, for messages."""
        return f"{self.root}/{rel}"

    @abstractmethod
    def put(self, rel: str, data: bytes | memoryview) -> None:
        """Write or replace a file atomically; durable when it returns."""

    def put_parts(self, rel: str, parts: Sequence[bytes | memoryview]) -> None:
        """As ``put``, with the content in pieces."""
        self.put(rel, b"".join(parts))

    @abstractmethod
    def get(self, rel: str) -> bytes: ...

    @abstractmethod
    def exists(self, rel: str) -> bool:
        """Whether ``rel`` is a file (directories do not count)."""

    @abstractmethod
    def list(self, prefix: str = "") -> Names:
        """Names of all files in the directory ``prefix`` and below, sorted; temporary files are left out."""

    @abstractmethod
    def entries(self) -> Names:
        """Names directly in the root (files and directories, temporary ones too), sorted; empty without a root."""

    @abstractmethod
    def delete(self, rel: str) -> None:
        """Remove a file; a missing one is not an error."""

    @abstractmethod
    def size(self, rel: str) -> int:
        """Bytes."""

    @abstractmethod
    def mtime(self, rel: str) -> float:
        """Time of the last write in seconds of the storage's clock."""

    @abstractmethod
    def reader(self, rel: str) -> BinaryIO:
        """Open for sequential reading."""

    def sha256(self, rel: str) -> str:
        """Hex digest of a file's content, read in pieces."""
        digest = hashlib.sha256()
        with translated("read", self.full_name(rel)), self.reader(rel) as f:
            while chunk := f.read(CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def clock(self) -> float:
        """Now, on the storage's clock (a file server's may differ from ours): the time stamp of a probe file."""
        probe = temp_name()  # so that the next driver sweeps what a killed one leaves
        self.put(probe, b"")
        try:
            return self.mtime(probe)
        finally:
            self.delete(probe)

    def local_path(self, rel: str) -> Path | None:
        """Path of the file where the store is local (for mapping it into memory), else None."""
        return None

    def descriptor(self, rel: str, flags: int = os.O_RDONLY) -> int | None:
        """Descriptor of the file, which the caller closes, where the store is local, else None; O_CREAT makes its folder."""
        return None

    def irregular(self, prefixes: Iterable[str]) -> Names:
        """Names in the root and below ``prefixes`` that are links, pipes, sockets or devices, sorted."""
        return []

    @abstractmethod
    def append_line(self, rel: str, line: str) -> None:
        """Add a line to a log such as ``events.jsonl``. Locally one O_APPEND write; not fsynced.

        On object stores lines are collected and written as small objects ``events/<stamp>-<host>-<pid>-<n>.jsonl``.
        On network file systems appends from several hosts may overwrite each other: let one process write a log.
        """

    @abstractmethod
    def read_lines(self, rel: str) -> Names:
        """All lines of a log written by ``append_line``, oldest first; empty if there is none."""

    @abstractmethod
    def flush(self) -> None:
        """Write out collected log lines."""

    @abstractmethod
    def sweep(self, prefixes: Iterable[str]) -> Names:
        """Remove temporary files that killed writers left in the root and below ``prefixes``; their names."""

    @abstractmethod
    def prune(self, prefixes: Iterable[str]) -> None:
        """Remove empty directories at and below ``prefixes``."""


def check_name(rel: str) -> str:
    """``rel`` if it is a relative POSIX name without ``..``; StoreError otherwise."""
    parts = rel.split("/")
    if not rel or "\\" in rel or "\0" in rel or any(p in ("", ".", "..") for p in parts):
        raise StoreError(f"{rel!r} is not a name inside a work directory")
    return rel


def temp_name() -> str:
    """Fresh name of a temporary file of this process."""
    return f"{TEMP_PREFIX}{os.getpid()}-{secrets.token_hex(6)}"
