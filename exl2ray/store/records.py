"""Immutable records: what has been finished, one file per item, named by content.

A record is ``<kind>/records/<key>.<inputs hash, 16 digits>.json``. Its inputs hash covers everything the result depends on
(recipe fields that matter, fingerprint of the source weights, entry state), so a record can be trusted for exactly these
inputs for ever, and results of other settings live beside it. There is no manifest that could be lost: a resume lists the
directory. Order of a commit: the files of the item first, then the record, then the acknowledgement.

There is a record per module, not per linear: a loss costs at most the module in work, 3.6 s of one GPU for a 70B MLP while
measuring and 2.7 while quantising (docs/log.md), 13 to 26 s and 10 to 20 for 405B by operation counts. Starting Ray and a
worker takes 12 to 14 s by itself. Records of single linears would have to keep or compute again a Hessian of 11 GB.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from exl2ray.errors import StoreError, UnfitError, why_not_read
from exl2ray.store.faults import MissingFileError
from exl2ray.store.fs import Store, check_name
from exl2ray.store.refs import FileRef as FileRef
from exl2ray.store.refs import Piece as Piece

_MAX_KEY_CHARS = 150  # of 255 bytes that file systems allow for a name
_DAMAGED_HINT = "delete this file to compute the item again (or start anew with -nr)"
_READERS = 16  # parallel reads of records on an object store
_FILE_TYPES = {"rel": str, "sha256": str, "size": int}
_PIECE_TYPES = {"name": str, "dtype": str, "file": str, "offset": int}
_TYPES = {"kind": str, "key": str, "inputs_hash": str, "payload": dict}  # the rest only tells a story
_T = TypeVar("_T")


def canonical_json(obj: Any) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, floats by repr, tuples as lists.

    Equal bytes mean equal values and types: 4 and 4.0 differ. Raises StoreError for what has no such text: NaN and
    infinity, keys that are not strings, and objects (paths too: where a file lies is not what it contains).
    """
    return json.dumps(_plain(obj, "value"), sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _plain(obj: Any, where: str) -> Any:
    if obj is None or isinstance(obj, (bool, str)) or type(obj) is int:
        return obj
    if isinstance(obj, float):
        if not math.isfinite(obj):
            raise StoreError(f"{where} is {obj}: a work directory holds finite numbers only")
        return float(obj)
    if isinstance(obj, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(obj)]
    if isinstance(obj, Mapping):
        for k in obj:
            if not isinstance(k, str):
                raise StoreError(f"{where} has the key {k!r} ({type(k).__name__}); only text is a JSON key")
        return {k: _plain(v, f"{where}.{k}") for k, v in obj.items()}
    raise StoreError(f"{where} is a {type(obj).__name__}, which has no canonical JSON text")


def hash_inputs(**fields: Any) -> str:
    """SHA-256 (hex) over the canonical JSON of the named fields."""
    return hashlib.sha256(canonical_json(fields)).hexdigest()


@dataclass(frozen=True)
class Record:
    """One finished item.

    ``kind`` is the directory ("measure", "quant/4.0"), ``key`` the item ("model.layers.3.self_attn"), ``payload`` its
    result as JSON. ``seconds``, ``worker`` ("host:pid" by default) and ``created`` (seconds since 1970) tell its story.
    """

    kind: str
    key: str
    inputs_hash: str
    payload: dict[str, Any]
    files: tuple[FileRef, ...] = ()
    seconds: float = 0.0
    worker: str = field(default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}")
    created: float = field(default_factory=time.time)


def item_name(key: str, inputs_hash: str) -> str:
    """``<key>.<first 16 digits>``: file name of an item, without ending; odd characters of the key are %-quoted."""
    if not re.fullmatch(r"[0-9a-f]{16,}", inputs_hash):
        raise StoreError(f"{key}: inputs hash {inputs_hash!r} is not lower-case hex of at least 16 digits")
    safe = quote(key, safe="")
    if safe.startswith("."):
        safe = "%2E" + safe[1:]
    if len(safe) > _MAX_KEY_CHARS:
        safe = f"{safe[: _MAX_KEY_CHARS - 17]}~{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    return f"{safe}.{inputs_hash[:16]}"


def item_file(kind: str, folder: str, key: str, inputs_hash: str) -> str:
    """Name of an item's tensors: ``<kind>/<folder>/<key>.<hash>.safetensors``, folder "tensors" or "states"."""
    return check_name(f"{kind}/{folder}/{item_name(key, inputs_hash)}.safetensors")


class Records:
    """The records of one work directory. Used by the driver and, with their own Store, by the workers.

    ``find`` hashes a record's files before it believes the record; on object stores, which check uploads themselves, it
    compares sizes. So do ``required`` and ``scan``: whoever goes on to read a file of such a record gives its reference to
    ``get_tensors``, which hashes what it reads.
    ``notes`` collects, in words, the records that were passed over and why.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.notes: list[str] = []

    def commit(self, record: Record) -> str:
        """Write the record; durable when this returns. Its files must be there already. Returns its name.

        Committing the same item twice (a lost worker that was not dead) replaces the record as a whole.
        """
        for ref in record.files:
            problem = file_problem(self.store, ref, deep=False)
            if problem:
                raise StoreError(f"the record of {record.key}: {problem}")
        rel = _record_file(record.kind, record.key, record.inputs_hash)
        body = asdict(record)
        for file in body["files"]:
            pieces = file.pop("pieces")
            if pieces:  # as one text: hundreds of experts have thousands of tensors
                file["pieces"] = json.dumps([list(p.values()) for p in pieces], separators=(",", ":"))
        # Keys as they are, not sorted: what is made of a record that was read again must not differ from what was first.
        text = json.dumps({"record": body, "sha256": hash_inputs(record=body)}, separators=(",", ":"), allow_nan=False)
        self.store.put(rel, text.encode())
        return rel

    def find(self, kind: str, key: str, inputs_hash: str) -> Record | None:
        """The item's record, or None if it has none that can be used (``notes`` says why, if there was one).

        Raises StoreError naming the file if the record itself is corrupted.
        """
        return self._find(kind, key, inputs_hash, deep=self.store.is_local)

    def _find(self, kind: str, key: str, inputs_hash: str, deep: bool) -> Record | None:
        rel = _record_file(kind, key, inputs_hash)
        record = self._read_if_there(rel)
        if record is None:
            return None
        if (record.kind, record.key, record.inputs_hash) != (kind, key, inputs_hash):
            self._note(f"{self.store.full_name(rel)} is of {record.key} with inputs {record.inputs_hash}: not used")
            return None
        return self._usable(rel, record, deep)

    def required(self, kind: str, key: str, inputs_hash: str) -> Record:
        """The record of an item that was finished. StoreError if it is gone."""
        record = self._find(kind, key, inputs_hash, deep=False)
        if record is None:
            raise StoreError(
                f"{key} has no usable record in {kind}",
                "its files were removed or damaged while the job ran; run the same command again",
            )
        return record

    def scan(self, kind: str, prefix: str = "") -> dict[tuple[str, str], Record]:
        """All usable records of a kind, of any settings: (key, inputs hash) -> Record. Errors and notes as ``find``.

        ``prefix``: only keys that begin so (plain characters, as in "states-"). Records that somebody removes meanwhile are
        left out.
        """
        start = f"{kind}/records/{prefix}"
        names = [n for n in self.store.list(f"{kind}/records") if n.startswith(start) and n.endswith(".json")]
        if self.store.is_local:
            records = [self._read_if_there(n) for n in names]
        else:
            with ThreadPoolExecutor(_READERS) as pool:
                records = list(pool.map(self._read_if_there, names))
        found = [self._usable(name, r, deep=False) for name, r in zip(names, records, strict=True) if r is not None]
        return {(r.key, r.inputs_hash): r for r in found if r is not None}

    def remove(self, record: Record) -> None:
        """Delete a record, then its files: what a newer one has made useless (old checkpoints of hidden states)."""
        self.store.delete(_record_file(record.kind, record.key, record.inputs_hash))
        for ref in record.files:
            self.store.delete(ref.rel)

    def _usable(self, rel: str, record: Record, deep: bool) -> Record | None:
        """The record, or what it has become since: its files may go into shards at any moment. None if they are damaged."""
        problem = self._problem(record, deep)
        if problem and (now := self._read_if_there(rel)) is not None and now.files != record.files:
            record, problem = now, self._problem(now, deep)
        if problem:
            self._note(f"{self.store.full_name(rel)} is not used: {problem}; the item will be computed again")
        return None if problem else record

    def _problem(self, record: Record, deep: bool) -> str:
        return next(filter(None, (file_problem(self.store, ref, deep) for ref in record.files)), "")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _read_if_there(self, rel: str) -> Record | None:
        try:
            return self._read(rel)
        except MissingFileError:
            return None

    def _read(self, rel: str) -> Record:
        name = self.store.full_name(rel)
        data = self.store.get(rel)
        try:
            stored = json.loads(data)
            body = stored["record"]
            if hash_inputs(record=body) != stored["sha256"]:
                raise StoreError(f"{name} does not match its checksum", _DAMAGED_HINT)
            files = tuple(_file_ref(**ref) for ref in body.pop("files"))
            return _typed(Record(files=files, **body), _TYPES)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise StoreError(f"{name} is not a record: {why_not_read(e)}", _DAMAGED_HINT) from e


def _file_ref(pieces: str = "[]", **fields: Any) -> FileRef:
    """As a record's JSON has it. Raises TypeError, KeyError, ValueError or UnfitError for another form."""
    found = []
    for name, dtype, shape, file, offset in json.loads(pieces):
        piece = _typed(Piece(name, dtype, tuple(shape), file, offset), _PIECE_TYPES)
        if len(piece.shape) > 8 or any(type(n) is not int or not 0 <= n < 1 << 48 for n in (offset, *piece.shape)):
            raise UnfitError(f"the place of {name} is not made of counts")
        found.append(piece)
    return _typed(FileRef(**fields, pieces=tuple(found)), _FILE_TYPES)


def _typed(value: _T, types: Mapping[str, Any]) -> _T:
    wrong = [name for name, kind in types.items() if not isinstance(getattr(value, name), kind)]
    if wrong:
        raise UnfitError(f"{wrong[0]} is a {type(getattr(value, wrong[0])).__name__}")
    return value


@contextmanager
def reading(store: Store, record: Record) -> Iterator[dict[str, Any]]:
    """Yields a record's payload; StoreError naming the record where the block finds something else in it than it needs."""
    try:
        yield record.payload
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        name = store.full_name(_record_file(record.kind, record.key, record.inputs_hash))
        raise StoreError(f"{name} holds no result of {record.key}: {why_not_read(e)}", _DAMAGED_HINT) from e


def file_problem(store: Store, ref: FileRef, deep: bool) -> str:
    """What is wrong with a referenced file ("" if nothing): missing, of another size or, if ``deep``, other content."""
    try:
        if ref.pieces:
            from exl2ray.store.pieces import pieces_problem  # loads torch

            return pieces_problem(store, ref, deep)
        size = store.size(ref.rel)
        if size != ref.size:
            return f"{store.full_name(ref.rel)} has {size} bytes instead of {ref.size}"
        digest = store.sha256(ref.rel) if deep else ref.sha256
    except MissingFileError:
        return f"{store.full_name(ref.rel)} is missing"
    if digest != ref.sha256:
        return f"{store.full_name(ref.rel)} has SHA-256 {digest[:16]}... instead of {ref.sha256[:16]}..."
    return ""


def _record_file(kind: str, key: str, inputs_hash: str) -> str:
    return check_name(f"{kind}/records/{item_name(key, inputs_hash)}.json")
