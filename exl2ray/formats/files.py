"""Local files: atomic writing (a reader sees the old content or the new one, never a part of it), hashes."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from exl2ray.beneath import FILE_MODE, closing, fsync_handle
from exl2ray.errors import StoreError
from exl2ray.formats.regular import file_kind, open_regular

REPLACED_BYTES = 32 << 20  # of a file that are looked at before another one takes its place; as many as a measurement has


def sha256_of(path: Path) -> str:
    """Hex digest of a file's content, read in pieces. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path) as f:
        while chunk := f.read(8 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def refuse_special(path: str | Path, what: str) -> None:
    """StoreError if a file written to ``path`` would take the place of a folder, a device or a pipe, or /dev/stdout itself.

    ``what`` is written there, by the name of its flag.
    """
    path = Path(path)
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # nothing is there; what else is wrong is told when it is written
    if not stat.S_ISREG(mode) or os.path.realpath(path.parent) == "/dev":
        kind = "a device" if stat.S_ISREG(mode) else file_kind(mode)
        raise StoreError(f"{what} {path}: {kind}, whose place a file would take", "name a file")


def refuse_other(path: str | Path, flag: str, kind: str, is_earlier: Callable[[bytes], bool]) -> None:
    """StoreError if a file stands at ``path`` that is neither empty nor, by its content, an earlier ``kind`` of ours.

    ``flag`` has one written there.
    """
    hint = f"name another file with {flag}, or delete this one if it may go"
    try:
        with open_regular(path) as f:
            content = f.read(REPLACED_BYTES)
    except FileNotFoundError:
        return
    except OSError as e:
        there = "is there already, and cannot be read" if os.path.lexists(path) else "cannot be written"
        raise StoreError(f"{flag} {path} {there}: {e.strerror or e}", hint) from e
    if content.strip() and not is_earlier(content):
        raise StoreError(f"{flag} {path} is there already, and is no {kind}: it would be overwritten", hint)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears under ``path`` only when the block ends without an exception.

    Written under a temporary dot name in the same directory, then fsync, ``os.replace`` and fsync of the directory. The
    dot keeps loaders, which take every ``*.safetensors`` file, from seeing it after a crash. Raises StoreError with a
    hint when the disk is full or the directory not writable.
    """
    try:
        with closing(os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as folder:
            with replacing(folder, path.name, f".{path.name}.{uuid.uuid4().hex[:8]}.tmp") as f:
                yield f
    except OSError as e:
        raise write_error(path, e) from e


@contextmanager
def replacing(folder: int, name: str, temporary: str) -> Iterator[BinaryIO]:
    """A binary file that appears as ``name`` in an open folder, durably, only when the block ends without an exception.

    temporary: its name until then, free. Raises OSError.
    """
    try:
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE, dir_fd=folder)
        with os.fdopen(handle, "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)  # a link of that name is replaced, too
        fsync_handle(folder)
    finally:
        with suppress(OSError):  # there is none any more; or, on a disk that fails, the first error counts
            os.unlink(temporary, dir_fd=folder)


def write_error(path: Path, e: OSError) -> StoreError:
    """StoreError for a failed write, with the hint that fits the errno."""
    hints = {
        errno.ENOSPC: "the disk is full: free space or write to another one, then run the same command again",
        errno.EDQUOT: "the disk quota is used up: free space or write elsewhere, then run the same command again",
        errno.EACCES: "no permission to write there",
        errno.EROFS: "the file system is read-only",
        errno.ENOENT: "the directory does not exist",
        errno.EFBIG: "the file system does not take files of this size: use smaller shards (-ss)",
    }
    return StoreError(f"{path}: cannot be written: {e.strerror or e}", hints.get(e.errno or 0, ""))


def holds(path: Path, data: bytes) -> bool:
    """Whether a file is there and has exactly this content."""
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False
