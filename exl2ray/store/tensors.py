"""Tensors in the work directory: safetensors files with a hash, read back lazily and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from exl2ray.errors import StoreError
from exl2ray.store.faults import translated
from exl2ray.store.fs import Store
from exl2ray.store.records import FileRef, file_problem

_DAMAGED_HINT = "delete this file: the same command computes it again"


def put_tensors(store: Store, rel: str, tensors: Mapping[str, torch.Tensor]) -> FileRef:
    """Write named tensors (any dtype that safetensors knows, any shape, any device) and return the file's reference.

    Deterministic: equal tensors give equal bytes, whatever their order in the mapping. Values are written as they are;
    views and tensors that share memory are written in full. Atomic and durable as ``Store.put``.
    """
    if not tensors:
        raise StoreError(f"{store.full_name(rel)}: no tensors to write")
    seen: set[int] = set()
    plain = {}
    for name in sorted(tensors):
        t = tensors[name].detach().to("cpu").contiguous()
        address = t.untyped_storage().data_ptr()
        plain[name] = t.clone() if address in seen else t  # safetensors refuses tensors that share a storage
        seen.add(address)
    try:
        data = safetensors.torch.save(plain)
    except (ValueError, KeyError, SafetensorError) as e:
        raise StoreError(f"{store.full_name(rel)}: cannot write as safetensors: {e}") from e
    store.put(rel, data)
    return FileRef(rel, hashlib.sha256(data).hexdigest(), len(data))


def get_tensors(
    store: Store, rel: str, device: str | torch.device = "cpu", expect: FileRef | None = None
) -> dict[str, torch.Tensor]:
    """Tensors of a file written by ``put_tensors``, on ``device``.

    Where the store is local the file is mapped: CPU tensors are copy-on-write views of it, read as they are used.
    ``expect`` is compared first (size and SHA-256, which reads the file once). Raises MissingFileError, or StoreError
    naming the file if it is truncated, altered or not safetensors.
    """
    name = store.full_name(rel)
    if expect is not None:
        problem = file_problem(store, expect, deep=store.is_local)
        if problem or expect.rel != rel:
            raise StoreError(problem or f"{name} was asked for with the reference of {expect.rel}", _DAMAGED_HINT)
    path = store.local_path(rel)
    try:
        if path is None:
            data = store.get(rel)
            if expect is not None and hashlib.sha256(data).hexdigest() != expect.sha256:
                raise StoreError(f"{name} does not have the SHA-256 of its record", _DAMAGED_HINT)
            return {k: t.to(device) for k, t in safetensors.torch.load(data).items()}
        store.size(rel)  # a typed error for a missing file
        with translated("read", name), safe_open(path, framework="pt", device=str(device)) as f:
            return {k: f.get_tensor(k) for k in f.keys()}
    except (SafetensorError, ValueError, KeyError) as e:
        raise StoreError(f"{name} is not a whole safetensors file: {e}", _DAMAGED_HINT) from e
