"""The shards of one model in the work directory, which are filled while its modules are still being quantised.

Two ways were weighed. *Workers write into the shards*: every byte is written once. But two members of a group on machines
that share an NFS mount then write to one page where their tensors meet (a client may write back the whole page, and with it
an old copy of the neighbour's bytes), and a worker that was given up but is not dead could write into a finished shard.
*The driver puts what workers have committed into the shards* (built): workers write files of their own as before. The one
writer of a shard hashes each file as it reads it back, makes the shard durable, changes the record to say where the tensors
are now, and then deletes the file. Every byte is written twice, as before, but the second time while modules are quantised,
and the disk holds the output once and what a few modules take. Compiling is a hard link. Figures: docs/log.md.

Kill it at any moment: the record names a whole file, or places in a shard that are durable. Shards are called by a hash of
what they will hold, so that other settings or a patch get other ones; a shard that is part of a finished model already (it
has two names) is copied before it is written to.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import cast

from torch import Tensor

from exl2ray import beneath
from exl2ray.errors import StoreError
from exl2ray.formats.shards import Shard, TensorEntry, announced_bytes, header_of, plan_shards, shard_names
from exl2ray.store.faults import MissingFileError, translated
from exl2ray.store.fs import CHUNK_BYTES, Store, temp_name
from exl2ray.store.local import LocalStore
from exl2ray.store.pieces import header_digest, in_order, pieces_sha256
from exl2ray.store.records import FileRef, Piece, Records, item_file

_MOST_PARTS = 1024  # of a call (IOV_MAX)
_SHARD = re.compile(r"output(-\d{5}-of-\d{5})?\.[0-9a-f]{16}\.safetensors")


class Assembly:
    """Shards of ``entries`` in order, in the folder of tensors of ``kind``. inputs: hash of all that they will hold.

    Several threads may put tensors into it; ``open`` and ``close`` are for one. keeps: what is in the shards stays there when
    this process ends, so that records may lead to it. temporary: names of files that the output's directory has for them.
    """

    keeps = True
    temporary: Collection[str] = ()

    def __init__(self, store: Store, kind: str, inputs: str, entries: Sequence[TensorEntry], limit_bytes: int) -> None:
        self._store, self._kind = cast(LocalStore, store), kind  # another one is asked for names only
        plan = plan_shards([e.nbytes for e in entries], limit_bytes)
        self.names = shard_names(len(plan))
        self._headers: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}
        self._places: dict[str, tuple[TensorEntry, str, int]] = {}
        for name, indices in zip(self.names, plan, strict=True):
            own = [entries[i] for i in indices]
            self._headers[name] = header_of(own)
            end = len(self._headers[name])
            for entry in own:
                self._places[entry.name] = (entry, name, end)
                end += entry.nbytes
            self._sizes[name] = end
        identity = hashlib.sha256(b"".join([inputs.encode(), *self._headers.values()])).hexdigest()
        self._rels = {n: item_file(kind, "tensors", n.removesuffix(".safetensors"), identity) for n in self.names}
        self._handles: dict[str, int] = {}
        self._new: set[str] = set()  # shards that have nothing of earlier runs
        self.like: Ownership | None = None  # what files of the output have, and the shards shall have

    # ---- filling -----------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Makes the shards with the space that they will take, or goes on with those of an earlier run. Twice is once.

        Raises StoreError, for a full disk before anything is lost.
        """
        for name in self.names:
            if name not in self._handles:
                self._handles[name] = self._opened(name)

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def put(self, name: str, tensor: Tensor) -> memoryview:
        """Writes a tensor to its place, not durably yet; its bytes. Raises FormatError for one of another dtype or shape."""
        entry, shard, offset = self._places[name]
        where = self._where(shard)
        data = announced_bytes(entry, tensor, Path(where))
        with translated("write", where):
            write_at(self._handles[shard], data, offset)
        return data

    def put_file(self, ref: FileRef, tensors: Mapping[str, Tensor]) -> FileRef:
        """Writes the tensors of a record's file; what the record is to say of it once they are durable."""
        out = self.placed(ref, tensors)
        for shard, begin, run in neighbours(self._places[name] for name in tensors):
            parts = [announced_bytes(entry, tensors[entry.name], Path(self._where(shard))) for entry in run]
            with translated("write", self._where(shard)):
                write_parts(self._handles[shard], parts, begin)
        return out

    def placed(self, ref: FileRef, names: Iterable[str]) -> FileRef:
        """A record's file, whose tensors have these names, as it is in these shards. StoreError for those of another plan."""
        names = list(names)
        if unknown := [n for n in names if n not in self._places]:
            raise StoreError(f"{self._store.full_name(ref.rel)}: {unknown[0]} is no tensor of the output")
        return replace(ref, pieces=self._pieces(names))

    def _pieces(self, names: Iterable[str]) -> tuple[Piece, ...]:
        places = (self._places[name] for name in names)
        return tuple(Piece(e.name, e.dtype, e.shape, self._rels[shard], offset) for e, shard, offset in places)

    def put_others(self, entries: Sequence[TensorEntry]) -> FileRef:
        """Writes tensors that no record has, durably; their places and the hash that `same` compares."""
        ref = self.others(entries, "")
        digest, loads = header_digest(ref), {e.name: e.load for e in entries}
        for piece in in_order(ref.pieces):
            digest.update(self.put(piece.name, loads[piece.name]()))
        self.sync()
        return replace(ref, sha256=digest.hexdigest())

    def others(self, entries: Iterable[TensorEntry], sha256: str) -> FileRef:
        """What ``put_others`` returned."""
        return FileRef("other tensors", sha256, 0, self._pieces(e.name for e in entries))

    def holds(self, refs: Iterable[FileRef], names: Iterable[str]) -> bool:
        """Whether the tensors of these files are just those of ``names``, in their places here."""
        found = [p for ref in refs for p in ref.pieces]
        if any(p.file in self._new for p in found):  # somebody deleted the shard since the record was checked
            return False
        return {p.name for p in found} == {*names} and tuple(found) == self._pieces(p.name for p in found)

    def sync(self) -> None:
        """Makes durable what was put into the shards."""
        for name in self.names:
            with translated("write", self._where(name)):
                os.fdatasync(self._handles[name])

    # ---- giving away ---------------------------------------------------------------------------------------------------

    def link(self, directory: Path) -> list[Shard]:
        """Makes the shards, which are durable, files of a directory, in place of files of their names. Raises OSError."""
        out = []
        for name in self.names:
            self._store.link(self._rels[name], directory, name, temporary_name(name))
            found = os.lstat(directory / name)
            out.append(Shard(name, found.st_size, "", found.st_mtime_ns))
        return out

    def same(self, directory: Path | None, refs: Sequence[FileRef], hashed: Sequence[FileRef] | None = None) -> bool:
        """Whether the shards of a directory, which were filled here, still have their content; None: the shards themselves.

        refs: files of all records and what ``put_others`` returned, as they are in shards. hashed: those to read; None: all.
        """
        names = {rel: name for name, rel in self._rels.items()}

        def opened(rel: str) -> int:
            if directory is None:
                return self._store.descriptor(rel)
            return beneath.open_file(None, directory / names[rel], directory / names[rel])

        def is_whole(rel: str) -> bool:
            header = self._headers[names[rel]]
            with beneath.closing(opened(rel)) as handle:
                if directory is None and not self._is_like(handle):
                    return False
                return os.fstat(handle).st_size == self._sizes[names[rel]] and os.pread(handle, len(header), 0) == header

        try:
            if {p.name for r in refs for p in r.pieces} != {*self._places} or not all(map(is_whole, names)):
                return False
            return all(pieces_sha256(r, opened, str(directory)) == r.sha256 for r in (refs if hashed is None else hashed))
        except (OSError, StoreError):
            return False

    def remove_others(self, records: Records) -> None:
        """Deletes shards of other plans of this bitrate that no record needs any more."""
        used = {p.file for r in records.scan(self._kind).values() for ref in r.files for p in ref.pieces}
        for rel in self._store.list(f"{self._kind}/tensors"):
            if _SHARD.fullmatch(rel.rpartition("/")[2]) and rel not in used and rel not in self._rels.values():
                self._store.delete(rel)

    # ---- files ---------------------------------------------------------------------------------------------------------

    def _where(self, shard: str) -> str:
        """Its path, for messages."""
        return self._store.full_name(self._rels[shard])

    def _is_like(self, handle: int) -> bool:
        return self.like is None or _ownership(handle) == self.like

    def _opened(self, name: str) -> int:
        rel, header, size = self._rels[name], self._headers[name], self._sizes[name]
        try:
            before = self._store.descriptor(rel)
        except MissingFileError:
            self._new.add(rel)
            return self._made(name, None)
        with beneath.closing(before):
            if os.fstat(before).st_nlink > 1 or not self._is_like(before):
                return self._made(name, before)
        handle = self._store.descriptor(rel, os.O_RDWR)
        with translated("write", self._store.full_name(rel)), closed_on_error(handle):
            if os.fstat(handle).st_size != size:
                beneath.reserve(handle, size)
            if os.pread(handle, len(header), 0) != header:
                write_at(handle, header, 0)
        return handle

    def _made(self, name: str, content: int | None) -> int:
        """A new file with a header, and for the rest what ``content`` has."""
        rel, size = self._rels[name], self._sizes[name]
        temporary = f"{rel.rpartition('/')[0]}/{temp_name()}"
        handle = self._store.descriptor(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            with translated("write", self._store.full_name(rel)), closed_on_error(handle):
                beneath.reserve(handle, size)
                offset = 0
                while content is not None and (data := os.pread(content, CHUNK_BYTES, offset)):
                    write_at(handle, data, offset)
                    offset += len(data)
                write_at(handle, self._headers[name], 0)
                os.ftruncate(handle, size)
                os.fsync(handle)
                self._store.rename(temporary, rel)
        except BaseException:
            with suppress(StoreError):
                self._store.delete(temporary)
            raise
        return handle


Ownership = tuple[int, int, int]  # user, group, mode


def _ownership(handle: int) -> Ownership:
    found = os.fstat(handle)
    return found.st_uid, found.st_gid, found.st_mode


def _attributes(handle: int) -> list[str]:
    """Names of what else a file has: lists of who may do what are among them."""
    try:
        return sorted(os.listxattr(handle))
    except OSError:
        return []


def linkable(store: Store, kind: str, directory: Path) -> Ownership | None:
    """What files that are made in a directory have, if shards made in the folder of ``kind`` have the same and can become
    files of the directory; else None.
    """
    if not isinstance(store, LocalStore):
        return None
    probe, name = f"{kind}/tensors/{temp_name()}", temporary_name("probe")
    new = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    try:
        with beneath.closing(store.descriptor(probe, new)) as here:
            with beneath.closing(beneath.open_file(None, directory / name, directory / name, new)) as there:
                wanted = _ownership(there)
                alike = _ownership(here) == wanted and _attributes(here) == _attributes(there)
        os.unlink(directory / name)
        if not alike:
            return None
        store.link(probe, directory, name, temporary_name("probe"))
        return wanted
    except OSError:
        return None
    finally:
        with suppress(OSError):
            os.unlink(directory / name)
        store.delete(probe)


def temporary_name(name: str) -> str:
    """Of a file that will be called ``name``; `exl2ray.formats.shards.LEFTOVER_NAME` knows it."""
    return f".{name}.{secrets.token_hex(4)}.tmp"


@contextmanager
def closed_on_error(handle: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(handle)
        raise


def neighbours(places: Iterable[tuple[TensorEntry, str, int]]) -> Iterator[tuple[str, int, list[TensorEntry]]]:
    """Tensors that lie one behind the other in a shard: its name, where the first begins, the tensors in order."""
    run: list[TensorEntry] = []
    shard, begin, end = "", 0, 0
    for entry, name, offset in sorted(places, key=lambda place: (*place[1:], place[0].nbytes)):
        if run and (name, offset) != (shard, end):
            yield shard, begin, run
            run = []
        if not run:
            shard, begin = name, offset
        run.append(entry)
        end = offset + entry.nbytes
    if run:
        yield shard, begin, run


def write_at(handle: int, data: bytes | memoryview, offset: int) -> None:
    write_parts(handle, [data], offset)


def write_parts(handle: int, parts: Iterable[bytes | memoryview], offset: int) -> None:
    """Writes them one behind the other. A layer of experts has thousands of tensors: together they take a few calls, each of
    which lets other threads go on (`exl2ray.store.tensors.joined`)."""
    views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
    while views:
        done = os.pwritev(handle, views[:_MOST_PARTS], offset)  # at most 2 GiB, and a full disk may cut it short
        offset += done
        taken = 0
        while taken < len(views) and done >= len(views[taken]):
            done -= len(views[taken])
            taken += 1
        views = views[taken:]
        if done:
            views[0] = views[0][done:]
