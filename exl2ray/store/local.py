"""A directory as a store: local disk, or a POSIX file system shared by several machines.

Names are reached as `exl2ray.beneath` does it: through no link, whoever put it there and whenever.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from exl2ray import beneath
from exl2ray.errors import StoreError
from exl2ray.formats.files import replacing
from exl2ray.store.faults import MissingFileError, translated
from exl2ray.store.fs import TEMP_NAME, TEMP_PREFIX, Names, Store, check_name, temp_name

MAX_JSON_BYTES = 64 << 20  # of a job, a record, a measurement
MAX_LINES_BYTES = 32 << 20  # of events: some 100 000


class LocalStore(Store):
    """A directory of a local disk or of a POSIX file system shared by several machines."""

    is_local = True

    def __init__(self, root: str) -> None:
        self.root = os.path.abspath(root)  # workers may run in another directory
        self._real = ""  # with links in the way to it resolved; on first use
        self._made = False  # made once; a directory that is deleted while it is in use is an error

    def _path(self, rel: str) -> Path:
        """For messages, and for whoever wants to map the file."""
        return Path(self.root, *check_name(rel).split("/"))

    def _real_root(self) -> str:
        if not self._real:
            self._real = beneath.resolved(self.root)
        return self._real

    @contextmanager
    def _folder_of(self, rel: str, create: bool = False) -> Iterator[tuple[int, str]]:
        """The open folder of a name, to be used as dir_fd, and the last part of the name."""
        *parts, name = check_name(rel).split("/")
        if create and not self._made:
            beneath.make_directories(self._real_root())
            self._made = True
        with beneath.folder(self._real_root(), parts, create=create, listed=create) as handle:
            yield handle, name

    def put(self, rel: str, data: bytes | memoryview) -> None:
        self.put_parts(rel, [data])

    def put_parts(self, rel: str, parts: Sequence[bytes | memoryview]) -> None:
        path = self._path(rel)
        with translated("write", str(path)), self._folder_of(rel, create=True) as (folder, name):
            with replacing(folder, name, temp_name()) as f:
                for part in parts:
                    _write_all(f.fileno(), part)

    def descriptor(self, rel: str, flags: int = os.O_RDONLY) -> int:
        path = self._path(rel)
        create = bool(flags & os.O_CREAT)
        with translated("write" if create else "open", str(path)), self._folder_of(rel, create) as (folder, name):
            return beneath.open_file(folder, name, path, flags)

    def rename(self, rel: str, new: str) -> None:
        """Gives a file another name in its folder, durably, in place of what is there."""
        with translated("write", str(self._path(new))), self._folder_of(rel, create=True) as (folder, name):
            os.replace(name, new.rpartition("/")[2], src_dir_fd=folder, dst_dir_fd=folder)
            beneath.fsync_handle(folder)

    def link(self, rel: str, directory: Path, name: str, temporary: str) -> None:
        """Gives a file a further name, in place of what is there: ``name`` in ``directory``, by way of ``temporary``.

        Raises OSError; without a trace where the file system has no hard links, or is another one.
        """
        with beneath.closing(os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as target:
            with self._folder_of(rel) as (folder, own):
                with suppress(FileNotFoundError):  # renaming a name of a file to another of its names would do nothing
                    there = os.stat(name, dir_fd=target, follow_symlinks=False)
                    if os.path.samestat(os.stat(own, dir_fd=folder, follow_symlinks=False), there):
                        return
                os.link(own, temporary, src_dir_fd=folder, dst_dir_fd=target, follow_symlinks=False)
            os.replace(temporary, name, src_dir_fd=target, dst_dir_fd=target)

    def get(self, rel: str) -> bytes:
        with translated("read", str(self._path(rel))), self.reader(rel) as f:
            size = os.fstat(f.fileno()).st_size
            if rel.endswith(".json") and size > MAX_JSON_BYTES:
                raise StoreError(f"{self._path(rel)}: {size} bytes; files of its kind have at most {MAX_JSON_BYTES}")
            return f.read()

    def reader(self, rel: str) -> BinaryIO:
        path = self._path(rel)
        with translated("read", str(path)), self._folder_of(rel) as (folder, name):
            return os.fdopen(beneath.open_file(folder, name, path), "rb")

    def exists(self, rel: str) -> bool:
        try:
            return stat.S_ISREG(self._status(rel).st_mode)
        except MissingFileError:
            return False
        except beneath.IrregularFileError:
            return False  # reading it would be refused, and writing replaces it

    def list(self, prefix: str = "") -> Names:
        names: Names = []
        with translated("list", str(self._path(prefix) if prefix else self.root)):
            for found in beneath.walk(self._real_root(), prefix.split("/") if prefix else []):
                names += [found.path(f) for f in found.files if not f.startswith(TEMP_PREFIX)]
        return sorted(names)

    def entries(self) -> Names:
        with translated("list", self.root), suppress(FileNotFoundError):
            with beneath.folder(self._real_root(), listed=True) as folder:
                return sorted(os.listdir(folder))
        return []

    def irregular(self, prefixes: Iterable[str]) -> Names:
        with translated("list", self.root):
            return sorted(found.path(n) for found in self._listings(prefixes) for n in found.others)

    def _listings(self, prefixes: Iterable[str]) -> Iterator[beneath.Listing]:
        """The root, then all folders at and below those of ``prefixes`` that are there; each open while it is in hand."""
        with suppress(FileNotFoundError), beneath.folder(self._real_root(), listed=True) as folder:
            top = beneath.listed(folder, "")
            yield top
            for prefix in (p for p in prefixes if p in top.folders):
                yield from beneath.walk(self._real_root(), [prefix])

    def delete(self, rel: str) -> None:
        with translated("delete", str(self._path(rel))), suppress(FileNotFoundError):
            with self._folder_of(rel) as (folder, name):
                os.unlink(name, dir_fd=folder)  # of a link: the link

    def size(self, rel: str) -> int:
        return self._status(rel).st_size

    def mtime(self, rel: str) -> float:
        return self._status(rel).st_mtime

    def _status(self, rel: str) -> os.stat_result:
        path = self._path(rel)
        with translated("read", str(path)), self._folder_of(rel) as (folder, name):
            return beneath.status(folder, name, path)

    def local_path(self, rel: str) -> Path | None:
        return self._path(rel)

    def append_line(self, rel: str, line: str) -> None:
        path = self._path(rel)
        with translated("write", str(path)), self._folder_of(rel, create=True) as (folder, name):
            with beneath.closing(beneath.open_file(folder, name, path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)) as fd:
                if os.fstat(fd).st_nlink > 1:
                    raise beneath.IrregularFileError(
                        f"{path} is known under other names too (hard links): a line would be added there as well",
                        f"move it away; a copy of the work directory should not share it (cp -r, not cp -l): {path}",
                    )
                _write_all(fd, line.encode() + b"\n")

    def read_lines(self, rel: str) -> Names:
        """The lines; of a file beyond all measure those at its end."""
        try:
            with translated("read", str(self._path(rel))), self.reader(rel) as f:
                beyond = os.fstat(f.fileno()).st_size - MAX_LINES_BYTES
                f.seek(max(0, beyond))
                lines = f.read(MAX_LINES_BYTES).decode(errors="replace").rstrip("\n").split("\n")
            return lines[1:] if beyond > 0 else lines
        except MissingFileError:
            return []

    def sweep(self, prefixes: Iterable[str]) -> Names:
        with translated("delete", self.root):
            return [name for found in self._listings(prefixes) for name in _unlink_temporary(found)]

    def flush(self) -> None:
        """Nothing is collected: every line is written at once."""

    def prune(self, prefixes: Iterable[str]) -> None:
        with suppress(OSError, StoreError):
            root = self._real_root()
            with beneath.folder(root, listed=True) as folder:
                present = beneath.listed(folder, "").folders
            for prefix in (p for p in prefixes if p in present):
                for found in beneath.walk(root, [prefix]):
                    for name in found.folders:
                        _remove_empty(found.handle, name)
                with beneath.folder(root) as folder:
                    _remove_empty(folder, prefix)


def _write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    while len(view):  # one write takes at most 2 GiB and may be cut short by a full disk
        view = view[os.write(fd, view) :]


def _unlink_temporary(folder: beneath.Listing) -> Names:
    """Removes what killed writers left in a folder, links of such names included."""
    stale = [n for n in [*folder.files, *folder.others] if TEMP_NAME.fullmatch(n)]
    for name in stale:
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder.handle)
    return [folder.path(n) for n in stale]


def _remove_empty(folder: int, name: str) -> None:
    with suppress(OSError):  # not empty: something in it is not ours
        os.rmdir(name, dir_fd=folder)
