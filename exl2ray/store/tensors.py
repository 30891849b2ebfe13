"""Tensors in the work directory: safetensors files with a hash, read back lazily and checked."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from exl2ray.beneath import reopenable
from exl2ray.errors import StoreError
from exl2ray.formats.tensorfile import DTYPE_NAMES, header_bytes, tensor_bytes
from exl2ray.store.faults import translated
from exl2ray.store.fs import Store
from exl2ray.store.pieces import read_pieces
from exl2ray.store.records import FileRef, file_problem

SMALL_PART = 64 << 10
_DAMAGED_HINT = "delete this file: the same command computes it again"


def put_tensors(store: Store, rel: str, tensors: Mapping[str, torch.Tensor]) -> FileRef:
    """Write named tensors (any dtype that safetensors knows, any shape, any device) and return the file's reference.

    Deterministic: equal tensors give equal bytes, whatever their order in the mapping. Values are written as they are;
    views and tensors that share memory are written in full. Atomic and durable as ``Store.put``.
    """
    if not tensors:
        raise StoreError(f"{store.full_name(rel)}: no tensors to write")
    parts = list(joined(file_parts(store.full_name(rel), tensors)))
    with ThreadPoolExecutor(1, thread_name_prefix="hash") as pool:  # neither hashing nor writing holds the interpreter's lock
        digest = pool.submit(_sha256, parts)
        store.put_parts(rel, parts)
        return FileRef(rel, digest.result(), sum(p.nbytes for p in parts))


def file_parts(where: str, tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """A safetensors file in pieces: the header, then the bytes of one tensor after another, those of wide dtypes first."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    unknown = [f"{name} is {tensors[name].dtype}" for name in order if tensors[name].dtype not in DTYPE_NAMES]
    if unknown:
        raise StoreError(f"{where}: {unknown[0]}, which these files do not hold")
    yield memoryview(header_bytes((n, DTYPE_NAMES[tensors[n].dtype], tuple(tensors[n].shape)) for n in order))
    yield from (tensor_bytes(tensors[name]) for name in order if tensors[name].numel())


def joined(parts: Iterable[memoryview], small: int = SMALL_PART) -> Iterator[memoryview]:
    """The same bytes; neighbours of less than ``small`` bytes are one piece, others stay as they are.

    A file of experts has hundreds of small tensors. Every write and every update of a hash lets go of the interpreter's lock
    and has to get it back, from the thread that launches kernels: that one then takes several times as long. Joining larger
    ones would hold the lock for the copy, which costs more (docs/log.md).
    """
    waiting: list[memoryview] = []
    for part in parts:
        if part.nbytes < small:
            waiting.append(part)
            continue
        if waiting:
            yield memoryview(b"".join(waiting))
            waiting = []
        yield part
    if waiting:
        yield memoryview(b"".join(waiting))


def _sha256(parts: Iterable[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def get_tensors(store: Store, rel: str, expect: FileRef | None = None, deep: bool = True) -> dict[str, torch.Tensor]:
    """Tensors of a file written by ``put_tensors``, on the CPU.

    Where the store is local the file is mapped: tensors are copy-on-write views of it, read as they are used; those of a
    file that is in shards (``expect.pieces``) are read.
    ``expect`` is compared first: size and, if ``deep``, SHA-256, which reads the file once. Raises MissingFileError, or
    StoreError naming the file if it is truncated, altered or not safetensors.
    """
    name = store.full_name(rel)
    if expect is not None:
        if expect.pieces and expect.rel == rel:
            return read_pieces(store, expect, deep)
        problem = file_problem(store, expect, deep=deep and store.is_local)
        if problem or expect.rel != rel:
            raise StoreError(problem or f"{name} was asked for with the reference of {expect.rel}", _DAMAGED_HINT)
    handle = store.descriptor(rel)  # a typed error for a missing file
    try:
        if handle is None:
            data = store.get(rel)
            if expect is not None and hashlib.sha256(data).hexdigest() != expect.sha256:
                raise StoreError(f"{name} does not have the SHA-256 of its record", _DAMAGED_HINT)
            return safetensors.torch.load(data)
        path = reopenable(handle, Path(name))
        with translated("read", name), safe_open(path, framework="pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, ValueError, KeyError) as e:
        raise StoreError(f"{name} is not a whole safetensors file: {e}", _DAMAGED_HINT) from e
    finally:
        if handle is not None:
            os.close(handle)
