"""GGUF files, as llama.cpp reads them: a strict header, and single tensors as floating-point numbers.

A file is: magic ``GGUF``, version, counts; metadata (key, type, value); per tensor its name, dimensions (the fastest first),
type and offset; then, aligned, the data. The header is parsed here and not by the ``gguf`` package, whose reader believes its
counts and makes an object of every word of a vocabulary. What a type's blocks mean (`Q4_K`, `IQ3_S`, ...) the package knows.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exl2ray.errors import FormatError, UsageError, unreadable
from exl2ray.formats.regular import open_regular
from exl2ray.formats.tensorfile import MAX_TENSORS, TensorInfo, read_tensor

MAX_HEADER_BYTES = 64 << 20  # vocabulary and merges of 256k words are about 12 MB
MAX_KEYS = 1 << 16
MAX_KEPT = 1 << 12  # entries of a list of numbers, bytes of a string that are kept; longer ones are passed over
MAX_DIMENSIONS = 4
WEIGHTS_AT_ONCE = 1 << 24  # that are dequantised: their intermediate results take some 200 MB
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # of numbers
STRING, LIST = 8, 9
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DAMAGED = "the file is damaged, or its download is incomplete: fetch it again"


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies. shape: slowest dimension first. begin: absolute. block: weights of ``block_bytes`` bytes."""

    name: str
    file: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int
    block: int
    block_bytes: int

    def load(self, first: int = 0, count: int | None = None) -> Tensor:
        """(count, width): rows from ``first`` of the tensor as a matrix; float32, or the plain type it is stored in.

        Raises FormatError if the file has become shorter.
        """
        width = self.shape[-1]
        rows = math.prod(self.shape[:-1])
        count = rows - first if count is None else count
        row_bytes = width // self.block * self.block_bytes
        if self.type in PLAIN:
            return self._raw(first * row_bytes, count * row_bytes).view(PLAIN[self.type]).reshape(count, width)
        out = torch.empty(count, width)
        step = max(1, WEIGHTS_AT_ONCE // width)
        for at in range(0, count, step):
            n = min(step, count - at)
            raw = self._raw((first + at) * row_bytes, n * row_bytes).numpy().reshape(n, row_bytes)
            out[at : at + n] = torch.from_numpy(_dequantise(raw, self.type))
        return out

    def _raw(self, offset: int, nbytes: int) -> Tensor:
        info = TensorInfo(self.name, self.file, "U8", (nbytes,), self.begin + offset, nbytes)
        return read_tensor(info, error=FormatError)


@dataclass(frozen=True)
class GgufFile:
    """metadata: numbers, strings, short lists; of longer lists and of strings in lists only None stands there."""

    path: Path
    file_bytes: int
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def read_gguf(path: str | Path) -> GgufFile:
    """The header of a file. Raises FormatError naming the place for anything broken, and for types of weights that cannot be
    dequantised; UsageError without the ``gguf`` package."""
    _package()
    path = Path(path)
    try:
        with open_regular(path) as f:
            size = f.seek(0, 2)
            f.seek(0)
            return _read(_Header(f, path, size))
    except OSError as e:
        raise unreadable(FormatError, path, e, "give a GGUF file") from e


class _Header:
    """Reads forward; every error names the file and the byte."""

    def __init__(self, f: BinaryIO, path: Path, size: int) -> None:
        self.f, self.path, self.size, self.at = f, path, size, 0

    def error(self, text: str, hint: str = DAMAGED) -> FormatError:
        return FormatError(f"{self.path}: GGUF header, byte {self.at}: {text}", hint)

    def _need(self, count: int) -> None:
        if count > self.size - self.at:
            raise self.error(f"{count} bytes should follow; the file has {self.size} in all")
        if self.at + count > MAX_HEADER_BYTES:
            raise self.error(f"it does not end within {MAX_HEADER_BYTES} bytes")

    def take(self, count: int) -> bytes:
        self._need(count)
        raw = self.f.read(count)
        if len(raw) != count:
            raise self.error("the file ends early")
        self.at += count
        return raw

    def skip(self, count: int) -> None:
        self._need(count)
        self.f.seek(count, 1)
        self.at += count

    def number(self, form: str) -> Any:
        return struct.unpack("<" + form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str | None:
        """A string; None, passed over, for a long one."""
        length = self.number("Q")
        if length > MAX_KEPT:
            self.skip(length)
            return None
        try:
            return self.take(length).decode("utf-8")
        except UnicodeDecodeError as e:
            raise self.error("a string is not UTF-8") from e

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind in FORMS:
            return self.number(FORMS[kind])
        if kind != LIST:
            raise self.error(f"a value of type {kind}, which is none")
        kind, count = self.number("I"), self.number("Q")
        if kind == STRING:
            for _ in range(count):  # ends with the file, at 8 bytes each
                self.skip(self.number("Q"))
            return None
        if kind not in FORMS:
            raise self.error(f"a list of values of type {kind}")
        if count > MAX_KEPT:
            self.skip(count * struct.calcsize(FORMS[kind]))
            return None
        return list(struct.unpack(f"<{count}{FORMS[kind]}", self.take(count * struct.calcsize(FORMS[kind]))))


def _read(h: _Header) -> GgufFile:
    if h.size < 24 or h.take(4) != b"GGUF":
        raise FormatError(f"{h.path}: not a GGUF file", "a Git LFS pointer? Fetch the file itself")
    version = h.number("I")
    if version not in (2, 3):
        swapped = version in (2 << 24, 3 << 24)
        what = "a big-endian file" if swapped else f"version {version}"
        text = f"{what}; little-endian ones of versions 2 and 3 can be read"
        raise FormatError(f"{h.path}: {text}", "make it anew with llama.cpp")
    tensors, keys = h.number("Q"), h.number("Q")
    if tensors > MAX_TENSORS or keys > MAX_KEYS:
        raise h.error(f"{tensors} tensors and {keys} keys; at most {MAX_TENSORS} and {MAX_KEYS} are read")
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = h.text()
        if key is None or key in metadata:
            raise h.error("a key of more than 4 KiB" if key is None else f"key {key!r} is there twice")
        metadata[key] = h.value(h.number("I"))
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
        raise h.error(f"general.alignment is {str(alignment)[:20]}, not a power of two up to 65536")
    entries = [_entry(h) for _ in range(tensors)]
    start = -(-h.at // alignment) * alignment
    found: dict[str, GgufTensor] = {}
    end = start
    for name, shape, kind, offset in sorted(entries, key=lambda e: e[3]):
        tensor = _tensor(h.path, name, shape, kind, start + offset)
        if name in found:
            raise FormatError(f"{h.path}: tensor {name!r} is there twice", DAMAGED)
        if offset % alignment or tensor.begin < end:
            text = f"at byte {tensor.begin} is not aligned, or within the one before"
            raise FormatError(f"{h.path}: tensor {name!r} {text}", DAMAGED)
        end = tensor.begin + tensor.nbytes
        if end > h.size:
            raise FormatError(f"{h.path}: tensor {name!r} ends at byte {end}; the file has {h.size}", DAMAGED)
        found[name] = tensor
    return GgufFile(h.path, h.size, metadata, found)


def _entry(h: _Header) -> tuple[str, tuple[int, ...], int, int]:
    """Name, shape (slowest first), number of the type, offset of one tensor."""
    name = h.text()
    dimensions = h.number("I")
    if name is None or not 0 < dimensions <= MAX_DIMENSIONS:
        raise h.error(f"tensor {str(name)[:80]!r} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are possible")
    shape = tuple(reversed([h.number("Q") for _ in range(dimensions)]))
    if not all(0 < n < 1 << 40 for n in shape):
        raise h.error(f"tensor {name[:80]!r} has shape {shape}")
    return name, shape, h.number("I"), h.number("Q")


def _tensor(path: Path, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GgufTensor:
    gguf = _package()
    try:
        type_ = gguf.GGMLQuantizationType(kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[type_]
        if type_.name not in PLAIN:
            _dequantise(np.zeros((1, block_bytes), dtype=np.uint8), type_.name)
    except (ValueError, KeyError, NotImplementedError) as e:
        known = type_.name if isinstance(e, NotImplementedError) else f"number {kind}"
        text = f"has type {known}, which the package gguf cannot dequantise"
        raise FormatError(f"{path}: tensor {name!r} {text}", "update the package, or take another file") from e
    if shape[-1] % block:
        text = f"rows of {shape[-1]} weights are no multiple of {type_.name}'s {block}"
        raise FormatError(f"{path}: tensor {name!r}: {text}", DAMAGED)
    return GgufTensor(name, path, type_.name, shape, begin, math.prod(shape) // block * block_bytes, block, block_bytes)


def _dequantise(raw: NDArray[np.uint8], type_name: str) -> NDArray[np.float32]:
    """raw (rows, bytes) -> (rows, weights). Broken scales give NaN or infinities, which reading weights refuses."""
    gguf = _package()
    with np.errstate(all="ignore"):
        out: NDArray[np.float32] = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    return out


def _package() -> Any:
    try:
        import gguf
        import gguf.quants
    except ImportError as e:
        raise UsageError(f"reading GGUF files needs the package gguf: {e}", 'pip install "exl2ray[gguf]"') from e
    return gguf
