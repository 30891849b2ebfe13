"""A directory as a store: local disk, or a POSIX file system shared by several machines."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from exl2ray.store.faults import MissingFileError, translated
from exl2ray.store.fs import CHUNK_BYTES, TEMP_NAME, TEMP_PREFIX, Names, Store, check_name, temp_name


class LocalStore(Store):
    """A directory of a local disk or of a POSIX file system shared by several machines."""

    is_local = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)  # workers may run in another directory

    def _path(self, rel: str) -> Path:
        return Path(self.root, *check_name(rel).split("/"))

    def put(self, rel: str, data: bytes | memoryview) -> None:
        self.put_stream(rel, [data])

    def put_parts(self, rel: str, parts: Sequence[bytes | memoryview]) -> None:
        self.put_stream(rel, parts)

    def put_file(self, rel: str, path: str | Path) -> None:
        with translated("read", str(path)):
            source = open(path, "rb")
        with source:
            self.put_stream(rel, iter(lambda: source.read(CHUNK_BYTES), b""))

    def put_stream(self, rel: str, chunks: Iterable[bytes | memoryview]) -> None:
        """As ``put``, piece by piece."""
        target = self._path(rel)
        with translated("write", str(target)):
            temp = self._write_temp(target.parent, chunks)
            try:
                os.replace(temp, target)
            except BaseException:
                _unlink_quietly(temp)
                raise
            _fsync_directory(target.parent)

    def put_new(self, rel: str, data: bytes) -> bool:
        target = self._path(rel)
        with translated("write", str(target)):
            temp = self._write_temp(target.parent, [data])
            try:
                # link(2) fails when the name exists, also over NFS, and the content is complete the moment it appears.
                os.link(temp, target)
            except FileExistsError:
                return False
            except OSError as e:
                if e.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                return self._create_exclusively(target, data)  # no hard links here (FAT, some FUSE mounts)
            finally:
                _unlink_quietly(temp)
            _fsync_directory(target.parent)
        return True

    @staticmethod
    def _create_exclusively(target: Path, data: bytes) -> bool:
        try:
            fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            return False
        try:
            _write_all(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        return True

    @staticmethod
    def _write_temp(directory: Path, chunks: Iterable[bytes | memoryview]) -> Path:
        _make_directories(directory)
        temp = directory / temp_name()
        fd = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            try:
                for chunk in chunks:
                    _write_all(fd, chunk)
                os.fsync(fd)
            finally:
                os.close(fd)
        except BaseException:
            _unlink_quietly(temp)
            raise
        return temp

    def get(self, rel: str) -> bytes:
        path = self._path(rel)
        with translated("read", str(path)):
            return path.read_bytes()

    def reader(self, rel: str) -> BinaryIO:
        path = self._path(rel)
        with translated("read", str(path)):
            return open(path, "rb")

    def exists(self, rel: str) -> bool:
        path = self._path(rel)
        with translated("read", str(path)):
            return path.is_file()

    def list(self, prefix: str = "") -> Names:
        top = self._path(prefix) if prefix else Path(self.root)
        names = []
        with translated("list", str(top)):
            for directory, _, files in os.walk(top, onerror=_raise_unless_missing):
                base = Path(directory).relative_to(self.root)
                names += [(base / f).as_posix() for f in files if not f.startswith(TEMP_PREFIX)]
        return sorted(names)

    def entries(self) -> Names:
        with translated("list", self.root), suppress(FileNotFoundError):
            return sorted(os.listdir(self.root))
        return []

    def delete(self, rel: str) -> None:
        path = self._path(rel)
        with translated("delete", str(path)):
            path.unlink(missing_ok=True)

    def size(self, rel: str) -> int:
        path = self._path(rel)
        with translated("read", str(path)):
            return path.stat().st_size

    def mtime(self, rel: str) -> float:
        path = self._path(rel)
        with translated("read", str(path)):
            return path.stat().st_mtime

    def local_path(self, rel: str) -> Path | None:
        return self._path(rel)

    def append_line(self, rel: str, line: str) -> None:
        path = self._path(rel)
        with translated("write", str(path)):
            _make_directories(path.parent)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _write_all(fd, line.encode() + b"\n")
            finally:
                os.close(fd)

    def read_lines(self, rel: str) -> Names:
        try:
            return self.get(rel).decode(errors="replace").rstrip("\n").split("\n")
        except MissingFileError:
            return []

    def sweep(self, prefixes: Iterable[str]) -> Names:
        with translated("list", self.root):
            found = [Path(self.root, name) for name in self.entries()]
            for prefix in prefixes:
                for directory, _, files in os.walk(self._path(prefix), onerror=_raise_unless_missing):
                    found += [Path(directory, f) for f in files]
        stale = [p for p in found if TEMP_NAME.fullmatch(p.name)]
        for path in stale:
            with translated("delete", str(path)):
                path.unlink(missing_ok=True)
        return [p.relative_to(self.root).as_posix() for p in stale]

    def flush(self) -> None:
        """Nothing is collected: every line is written at once."""

    def prune(self, prefixes: Iterable[str]) -> None:
        for prefix in prefixes:
            for directory, _, _ in os.walk(self._path(prefix), topdown=False):
                with suppress(OSError):  # not empty: something in it is not ours
                    os.rmdir(directory)

    def disk_free(self) -> int:
        with translated("read", self.root):
            return shutil.disk_usage(self.root).free


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while len(view):  # one write takes at most 2 GiB and may be cut short by a full disk
        view = view[os.write(fd, view) :]


def _make_directories(directory: Path) -> None:
    """mkdir -p, with every new directory's entry fsynced in its parent."""
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        if directory.parent == directory:
            break
        directory = directory.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _fsync_directory(new.parent)


def _fsync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network and FUSE mounts cannot
            raise
    finally:
        os.close(fd)


def _unlink_quietly(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def _raise_unless_missing(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error
