"""Writing safetensors shards and config.json of an EXL2 directory.

Shards are streamed: the plan needs names, dtypes and shapes only, every tensor is produced by a callable when its
turn comes and dropped afterwards, so the peak is about one tensor. The order of steps in a full output directory is
shards, side files, config.json: without config.json nothing takes an unfinished directory for a model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from exl2ray.beneath import fsync_directory, make_directories
from exl2ray.errors import FormatError, StoreError, UsageError
from exl2ray.formats.files import atomic_file, sha256_of, write_error
from exl2ray.formats.json_file import as_json
from exl2ray.formats.tensorfile import DTYPE_NAMES, DTYPES, header_bytes, tensor_bytes
from exl2ray.wording import file_size, some

T = TypeVar("T")
REFERENCE_VERSION = "0.3.2"  # level of the format that is written; some tools read it from config.json
OTHER_QUANTISATION = ("quantization_config", "compression_config", "quantization")  # of the source, in config.json
OUTPUT_NAME = re.compile(r"output(-\d{5}-of-\d{5})?\.safetensors")
LEFTOVER_NAME = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # of a killed run, see atomic_file


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written: what the header says, and a callable that produces it."""

    name: str
    dtype: str  # safetensors name, e.g. "F16"
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    @staticmethod
    def of(name: str, tensor: torch.Tensor) -> TensorEntry:
        """Entry for a tensor that is in memory already."""
        return TensorEntry(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), lambda: tensor)


def plan_shards(sizes: Sequence[int], limit_bytes: int) -> list[list[int]]:
    """Distribute tensors of ``sizes`` bytes over shards; returns the indices per shard.

    A shard is closed when the next tensor would exceed ``limit_bytes`` of tensor data (headers are not counted);
    order is kept, so the tensors of a layer stay together. 0 or less means one shard. A single tensor above the limit
    gets a shard of its own, where the reference gives up; the reference's last shard, in turn, may exceed the limit.
    """
    if limit_bytes <= 0:
        return [list(range(len(sizes)))]
    shards: list[list[int]] = []
    used = 0
    for i, size in enumerate(sizes):
        if not shards or used + size > limit_bytes:
            shards.append([])
            used = 0
        shards[-1].append(i)
        used += size
    return shards or [[]]


def shard_names(count: int) -> list[str]:
    if count == 1:
        return ["output.safetensors"]
    return [f"output-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


@dataclass(frozen=True)
class Shard:
    """A written file: size in bytes, SHA-256 (hex) of the content, time of the last change in nanoseconds.

    sha256: "" for one that was filled in any order: whoever made it knows the hashes of its parts.
    """

    name: str
    size: int
    sha256: str
    mtime_ns: int

    @classmethod
    def parse(cls, value: Any) -> Shard:
        """What a record says of one. Raises TypeError for anything else."""
        shard = cls(**value)
        types = ((shard.name, str), (shard.size, int), (shard.sha256, str), (shard.mtime_ns, int))
        if not all(isinstance(found, wanted) for found, wanted in types):
            raise TypeError(f"no shard: {value!r}")
        return shard

    def is_intact(self, directory: Path) -> bool:
        """Whether the file in ``directory`` has the content that was written. It is hashed only if it was touched, copied
        or moved since.
        """
        try:
            found = os.lstat(directory / self.name)
            if not stat.S_ISREG(found.st_mode) or found.st_size != self.size:
                return False
            if found.st_mtime_ns == self.mtime_ns:
                return True
            return bool(self.sha256) and sha256_of(directory / self.name) == self.sha256
        except OSError:
            return False


def write_shards(
    directory: str | Path, entries: Iterable[TensorEntry], limit_bytes: int = 0, ours: Iterable[str] = (),
    begin: Callable[[], None] = lambda: None,
) -> list[Shard]:  # fmt: skip
    """Write ``entries`` as output*.safetensors into ``directory`` (created if absent) and say what was written.

    ``ours`` lists files that an earlier run wrote there: those that this run does not write again are removed at the
    end; files of the same names are overwritten. Any other ``*.safetensors`` in the directory is refused, before
    anything is written, because loaders would read it as a part of the model. ``begin`` is called when nothing speaks
    against writing any more. Raises StoreError (not writable, disk full), FormatError (duplicate names, or a callable
    returned another dtype or shape than announced).
    """
    directory, entries, ours = Path(directory), list(entries), set(ours)
    plan = plan_shards([e.nbytes for e in entries], limit_bytes)
    names = shard_names(len(plan))
    check_names(directory, entries)
    reusable = check_place(directory, set(names) | ours)
    _check_room(directory, sum(e.nbytes for e in entries), reusable)
    begin()
    shards = [write_tensor_file(directory / n, [entries[i] for i in ii]) for n, ii in zip(names, plan, strict=True)]
    remove_stale(directory, ours - set(names))
    return shards


def remove_stale(directory: Path, names: Iterable[str]) -> None:
    """Removes those of ``names`` that are shards, and makes the names in the directory durable. Raises StoreError."""
    for stale in sorted(names):
        if OUTPUT_NAME.fullmatch(stale):
            _made(directory, lambda n=stale: (directory / n).unlink(missing_ok=True))  # type: ignore[misc]
    _made(directory, lambda: fsync_directory(directory))


def _made(path: Path, step: Callable[[], T]) -> T:
    """What a step of writing returns; StoreError for an OSError."""
    try:
        return step()
    except OSError as e:
        raise write_error(path, e) from e


def check_names(directory: Path, entries: Sequence[TensorEntry]) -> None:
    """Raises FormatError for a name that two tensors have."""
    seen: set[str] = set()
    for e in entries:
        if e.name in seen:
            raise FormatError(f"{directory}: tensor {e.name!r} would be written twice")
        seen.add(e.name)


def check_place(directory: Path, allowed: set[str], kept: Collection[str] = ()) -> int:
    """Makes the directory if it is missing, and sweeps it, but for ``kept``; bytes of the files ``allowed`` there.

    Raises StoreError for other shards.
    """
    try:
        make_directories(directory)
        for leftover in directory.iterdir():
            if LEFTOVER_NAME.fullmatch(leftover.name) and leftover.name not in kept:
                leftover.unlink(missing_ok=True)
        present = {p.name for p in directory.iterdir() if not p.name.startswith(".")}
    except OSError as e:
        raise write_error(directory, e) from e
    foreign = sorted(n for n in present if n.endswith(".safetensors") and n not in allowed)
    if foreign:
        raise StoreError(
            f"{directory}: holds {some(foreign, 1)}, "
            "which is not of this conversion; loaders would read it as part of the model",
            "choose an empty output directory, or move those files away",
        )
    return sum(os.lstat(directory / n).st_size for n in present & allowed)


def _check_room(directory: Path, needed: int, reusable: int) -> None:
    free = _made(directory, lambda: shutil.disk_usage(directory).free)
    if needed > free + reusable:
        raise StoreError(
            f"{directory}: the output needs {file_size(needed)}, {file_size(free)} are free",
            "free space or write to another disk, then run the same command again",
        )


def write_tensor_file(path: str | Path, entries: Sequence[TensorEntry]) -> Shard:
    """Write one safetensors file atomically, tensor by tensor, without ``__metadata__``.

    The data section starts at a multiple of 8. Raises StoreError if it cannot be written, FormatError if a tensor is
    not what its entry announced.
    """
    path, digest = Path(path), hashlib.sha256()
    with atomic_file(path) as f:
        header = header_of(entries)
        f.write(header)
        digest.update(header)
        for e in entries:
            _write_tensor((f.write, digest.update), e, path)
    found = _made(path, path.stat)
    return Shard(path.name, found.st_size, digest.hexdigest(), found.st_mtime_ns)


def header_of(entries: Iterable[TensorEntry]) -> bytes:
    """As ``header_bytes``, of tensors to be written."""
    return header_bytes((e.name, e.dtype, e.shape) for e in entries)


def _write_tensor(sinks: Iterable[Callable[[memoryview], object]], entry: TensorEntry, path: Path) -> None:
    """Gives the bytes of a tensor to all ``sinks``; nothing of it stays in memory."""
    data = announced_bytes(entry, entry.load(), path)
    for sink in sinks:
        sink(data)


def announced_bytes(entry: TensorEntry, t: torch.Tensor, path: Path) -> memoryview:
    """The bytes of a tensor; FormatError if it is not what its entry announced. path: of the shard, for the message."""
    if DTYPE_NAMES.get(t.dtype) != entry.dtype or tuple(t.shape) != entry.shape:
        raise FormatError(
            f"{path}: tensor {entry.name!r} was announced as {entry.dtype} {list(entry.shape)} "
            f"and is {DTYPE_NAMES.get(t.dtype, t.dtype)} {list(t.shape)}"
        )
    return tensor_bytes(t)


def refuse_same_directory(source: str | Path, target: str | Path) -> None:
    """Raise UsageError if the output directory is the source model; to be called before anything is written."""
    if os.path.realpath(source) == os.path.realpath(target):
        raise UsageError(f"{target}: the output directory (-cf) is the source model (-i)", "choose another directory")


def output_config(
    config: Mapping[str, Any], bits: float, head_bits: int, rows: int, length: int, dataset: str | None
) -> dict[str, Any]:
    """Content of the output's config.json: ``config`` with ``quantization_config``.

    ``config`` is the source's in the spelling that loaders read: the result of ``model.hyper.loader_config``. ``bits``
    and ``head_bits`` are the requested ones, ``rows`` the calibration rows really used, ``length`` the
    requested row length, ``dataset`` the name of the calibration data or None for the built-in set.
    """
    out = {key: value for key, value in config.items() if key not in OTHER_QUANTISATION}
    if isinstance(out.get("text_config"), Mapping):
        out["text_config"] = {k: v for k, v in out["text_config"].items() if k not in OTHER_QUANTISATION}
    out["quantization_config"] = {
        "quant_method": "exl2",
        "version": REFERENCE_VERSION,
        "bits": float(bits),
        "head_bits": int(head_bits),
        "calibration": {
            "rows": int(rows),
            "length": int(length),
            "dataset": dataset or "(default)",
        },
    }
    return out


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """config.json with 4-space indent and in ASCII, as the reference writes it."""
    return as_json(config, indent=4).encode("ascii")


def write_config(directory: str | Path, config: Mapping[str, Any]) -> Path:
    """Write config.json atomically; the last step of an output."""
    path = Path(directory) / "config.json"
    with atomic_file(path) as f:
        f.write(config_bytes(config))
    return path
