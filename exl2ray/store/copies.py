"""Shards that are filled where the output is, under hidden names: on another file system than the work directory.

They are copies: the files of modules stay in the work directory, and records lead there. Nothing has to outlive a kill; the
next conversion into the directory sweeps what is left, and its own are filled anew while it goes on.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from exl2ray import beneath
from exl2ray.errors import StoreError
from exl2ray.formats.files import write_error
from exl2ray.formats.shards import Shard, TensorEntry
from exl2ray.store.assembly import Assembly, closed_on_error, temporary_name, write_at
from exl2ray.store.fs import Store
from exl2ray.store.records import FileRef, Records


class Copies(Assembly):
    """As `Assembly`, in ``directory``."""

    keeps = False

    def __init__(
        self, store: Store, kind: str, inputs: str, entries: Sequence[TensorEntry], limit_bytes: int, directory: Path
    ) -> None:
        super().__init__(store, kind, inputs, entries, limit_bytes)
        self._directory = directory
        self._names = {name: temporary_name(name) for name in self.names}
        self.temporary = self._names.values()

    def _opened(self, name: str) -> int:
        path = self._directory / self._names[name]
        try:
            beneath.make_directories(self._directory)
            handle = beneath.open_file(None, path, path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            with closed_on_error(handle):
                beneath.reserve(handle, self._sizes[name])
                write_at(handle, self._headers[name], 0)
        except OSError as e:
            with suppress(OSError):
                os.unlink(path)
            raise write_error(path, e) from e
        return handle

    def _where(self, shard: str) -> str:
        return str(self._directory / shard)

    def close(self) -> None:
        super().close()
        for name in self._names.values():
            with suppress(OSError):
                os.unlink(self._directory / name)

    def holds(self, refs: Iterable[FileRef], names: Iterable[str]) -> bool:
        return False

    def link(self, directory: Path) -> list[Shard]:
        out = []
        for name, temporary in self._names.items():
            os.fsync(self._handles[name])
            found = os.fstat(self._handles[name])
            if not os.path.samestat(found, os.lstat(directory / temporary)):
                raise StoreError(f"{directory}: was replaced while shards were written to it", "run the same command again")
            os.replace(directory / temporary, directory / name)
            out.append(Shard(name, found.st_size, "", found.st_mtime_ns))
        return out

    def same(self, directory: Path | None, refs: Sequence[FileRef], hashed: Sequence[FileRef] | None = None) -> bool:
        return directory is not None and super().same(directory, refs, hashed)

    def remove_others(self, records: Records) -> None:
        """Records may lead anywhere."""
