"""Files of tensors that are no files any more: their tensors lie in the shards of a model, at the places that a record names.

What identifies them is unchanged: the SHA-256 of the file that `exl2ray.store.tensors.put_tensors` had written, which can be
made again from its parts. A shard's own header is not needed, so damage to it, or to a neighbour, costs no other module.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from exl2ray.errors import StoreError
from exl2ray.formats.tensorfile import DTYPES, header_bytes
from exl2ray.store.faults import translated
from exl2ray.store.fs import Store
from exl2ray.store.refs import FileRef, Piece

Opened = Callable[[str], int]  # name of a shard -> its descriptor, which the caller of it closes


def in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """As `put_tensors` writes tensors: those of wide dtypes first."""
    return sorted(pieces, key=lambda p: (-_itemsize(p), p.name))


def read_pieces(store: Store, ref: FileRef, deep: bool) -> dict[str, torch.Tensor]:
    """The tensors of a file that is in shards. ``deep``: raises StoreError if they are not those of its hash."""
    digest = header_digest(ref)
    out = {}
    for piece, data in _read(ref, _opener(store), store.full_name(ref.rel)):
        if deep:
            digest.update(data.numpy().data)
        out[piece.name] = data.view(DTYPES[piece.dtype]).reshape(piece.shape)
    if deep and digest.hexdigest() != ref.sha256:
        raise StoreError(_altered(store.full_name(ref.pieces[0].file), ref), "the same command computes it again")
    return out


def pieces_problem(store: Store, ref: FileRef, deep: bool) -> str:
    """As `exl2ray.store.records.file_problem`. Raises MissingFileError for a shard that is not there."""
    for name in dict.fromkeys(p.file for p in ref.pieces):
        end = max(p.offset + _nbytes(p) for p in ref.pieces if p.file == name)
        if store.size(name) < end:
            return f"{store.full_name(name)} has {store.size(name)} bytes; tensors of {ref.rel} go to byte {end}"
    if deep and pieces_sha256(ref, _opener(store), store.full_name(ref.rel)) != ref.sha256:
        return _altered(store.full_name(ref.pieces[0].file), ref)
    return ""


def pieces_sha256(ref: FileRef, opened: Opened, where: str) -> str:
    """The hash of the file that the pieces come from, as they are now."""
    digest = header_digest(ref)
    for _, data in _read(ref, opened, where):
        digest.update(data.numpy().data)
    return digest.hexdigest()


def pread_into(handle: int, buffer: memoryview, offset: int, where: str) -> None:
    """Fills the buffer from a file. Raises StoreError if that ends before."""
    with translated("read", where):
        while len(buffer):
            got = os.preadv(handle, [buffer[: 1 << 30]], offset)
            if not got:
                raise StoreError(f"{where} ends at byte {offset}", "the same command computes what is missing again")
            buffer, offset = buffer[got:], offset + got


def _read(ref: FileRef, opened: Opened, where: str) -> Iterator[tuple[Piece, torch.Tensor]]:
    """Each piece with its bytes, (n,) uint8."""
    handles: dict[str, int] = {}
    try:
        for piece in in_order(ref.pieces):
            if piece.file not in handles:
                handles[piece.file] = opened(piece.file)
            handle, nbytes = handles[piece.file], _nbytes(piece)
            if piece.offset + nbytes > os.fstat(handle).st_size:
                raise StoreError(f"{where}: {piece.file} ends before {piece.name}", "the same command computes it again")
            data = torch.empty(nbytes, dtype=torch.uint8)
            pread_into(handle, data.numpy().data, piece.offset, where)
            yield piece, data
    finally:
        for handle in handles.values():
            os.close(handle)


def _opener(store: Store) -> Opened:
    def opened(name: str) -> int:
        handle = store.descriptor(name)
        if handle is None:
            raise StoreError(f"{store.full_name(name)}: shards are filled on a file system only")
        return handle

    return opened


def header_digest(ref: FileRef) -> hashlib._Hash:
    """Of the beginning of the file that the pieces come from; their bytes in order make it whole."""
    return hashlib.sha256(header_bytes((p.name, p.dtype, p.shape) for p in in_order(ref.pieces)))


def _nbytes(piece: Piece) -> int:
    return math.prod(piece.shape) * _itemsize(piece)


def _itemsize(piece: Piece) -> int:
    if piece.dtype not in DTYPES:
        raise StoreError(f"{piece.file}: {piece.name} is said to be {piece.dtype[:40]!r}, which these files do not hold")
    return DTYPES[piece.dtype].itemsize


def _altered(where: str, ref: FileRef) -> str:
    return f"{where} does not have the tensors of {ref.rel} with SHA-256 {ref.sha256[:16]}..."
