"""One safetensors file: strict header parsing, lazy reading of single tensors; the header and the bytes of one to be written.

A safetensors file is an 8-byte little-endian header length, a JSON object ``name -> {dtype, shape, data_offsets}``, then
the data. Headers come from downloads, so nothing in them is believed: every number is checked against the file's size
before anything is allocated, and the data section must be covered exactly, without overlaps, holes or leftovers. Errors
name the file, the tensor and the numbers.

Tensors are read with plain reads into freshly allocated memory, not through a memory map: a file that shrinks or a
network mount that goes away is then an error of that read and not a SIGBUS of the process.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from exl2ray.errors import Exl2RayError, SourceError, unreadable
from exl2ray.formats.elsewhere import HEAD_BYTES, open_binary
from exl2ray.formats.json_file import BINARIES, parse_json_object, refuse_substitute

MAX_HEADER_BYTES = 32 << 20  # room for about 200 000 tensors; the largest published models have fewer than 100 000
MAX_TENSORS = 200_000  # of a directory; the experts of a quantised model of 480 billion weights are 150 000
MAX_DIMENSIONS = 8
COMPARED_BYTES = 16 << 20
MAX_NAME_CHARACTERS = 1024
BROKEN = "the file is damaged, or a broken program wrote it: fetch it again, or save the model anew with transformers"

# Safetensors dtype name -> torch dtype. Types with elements smaller than a byte are refused.
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,  # never a weight: frequencies of RoPE, as some trainers store them
}
CODED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")  # further types of the format, of quantised weights
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``begin`` is its absolute byte offset in ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    nbytes: int


class TensorFile:
    """The header of one safetensors file. Raises ``error``, a typed error class, for anything broken."""

    def __init__(self, path: str | Path, error: type[Exl2RayError] = SourceError) -> None:
        self.path = Path(path)
        try:
            with open_binary(self.path, HEAD_BYTES) as f:
                self.file_bytes = f.seek(0, 2)
                f.seek(0)
                header, data_start = _read_header(f, self.path, self.file_bytes, error)
        except OSError as e:
            raise unreadable(error, self.path, e) from e
        metadata = header.pop("__metadata__", None)
        if metadata is None:  # null is none, as to the library
            metadata = {}
        if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
            raise error(f"{self.path}: header: __metadata__ must map strings to strings", BROKEN)
        if len(header) > MAX_TENSORS:
            raise error(f"{self.path}: header: {len(header)} tensors; at most {MAX_TENSORS} can be read", BROKEN)
        self.tensors: dict[str, TensorInfo] = {}
        for name, entry in header.items():
            self.tensors[name] = _tensor_info(name, entry, self.path, data_start, self.file_bytes, error)
        _check_coverage(self.tensors, self.path, data_start, self.file_bytes, error)


def open_files(paths: Iterable[Path], error: type[Exl2RayError] = SourceError) -> dict[str, TensorFile]:
    """The headers of all shards of a model, by file name; ``error`` if they hold more tensors than any model has."""
    out: dict[str, TensorFile] = {}
    total = 0
    for path in paths:
        out[path.name] = TensorFile(path, error)
        total += len(out[path.name].tensors)
        if total > MAX_TENSORS:
            raise error(f"{path.parent}: more than {MAX_TENSORS} tensors in {len(out)} files", "no model has as many")
    return out


def read_tensor(
    info: TensorInfo,
    rows: slice | None = None,
    error: type[Exl2RayError] = SourceError,
    allocate: Callable[[int], torch.Tensor] | None = None,
) -> torch.Tensor:
    """A tensor, or the rows ``rows`` (of dimension 0, step 1) of it, in its stored dtype, on the CPU.

    ``allocate(n)``: (n,) uint8 to read into.
    """
    shape, begin, nbytes = info.shape, info.begin, info.nbytes
    if rows is not None:
        if not shape:
            raise error(f"{info.file}: tensor {info.name!r} is a scalar; it has no rows to select")
        first, last, step = rows.indices(shape[0])
        if step != 1:
            raise error(f"{info.file}: tensor {info.name!r}: row slices need step 1, not {step}")
        count = max(0, last - first)
        row_bytes = nbytes // shape[0] if shape[0] else 0
        begin, nbytes, shape = begin + first * row_bytes, count * row_bytes, (count, *shape[1:])
    out = torch.empty(nbytes, dtype=torch.uint8) if allocate is None else allocate(nbytes)
    try:
        with open_binary(info.file) as f:
            f.seek(begin)
            _read_into(f, out.numpy().data, info, error)
    except OSError as e:
        raise unreadable(error, f"{info.file}: tensor {info.name!r}", e) from e
    return out.view(DTYPES[info.dtype]).reshape(shape)


def same_values(a: TensorInfo, b: TensorInfo, error: type[Exl2RayError] = SourceError) -> bool:
    """Whether two tensors are stored with the same dtype, shape and bytes; read in parts."""
    if (a.dtype, a.shape, a.nbytes) != (b.dtype, b.shape, b.nbytes):
        return False
    try:
        with open_binary(a.file) as f, open_binary(b.file) as g:
            for done in range(0, a.nbytes, COMPARED_BYTES):
                parts = []
                for file, info in ((f, a), (g, b)):
                    part = bytearray(min(COMPARED_BYTES, a.nbytes - done))
                    file.seek(info.begin + done)
                    _read_into(file, memoryview(part), info, error)
                    parts.append(part)
                if parts[0] != parts[1]:
                    return False
    except OSError as e:
        raise unreadable(error, f"{a.file} or {b.file}: tensor {a.name!r}", e) from e
    return True


def _read_into(f: Any, buffer: memoryview, info: TensorInfo, error: type[Exl2RayError]) -> None:
    done = 0
    while done < len(buffer):
        # Linux reads at most 2 GiB at once, so one call may be short without the file being so.
        got = f.readinto(buffer[done : done + (1 << 30)])
        if not got:
            raise error(
                f"{info.file}: tensor {info.name!r}: the file ends {len(buffer) - done} bytes early; "
                "it was longer when opened",
                "do not change a model while it is being read",
            )
        done += got


def _read_header(
    f: BinaryIO, path: Path, file_bytes: int, error: type[Exl2RayError]
) -> tuple[dict[str, Any], int]:
    if file_bytes < 8:
        raise error(
            f"{path}: {file_bytes} bytes; a safetensors file has at least 8",
            "the download is incomplete: fetch the file again",
        )
    length = int.from_bytes(f.read(8), "little")
    if not length:
        raise error(f"{path}: the header is empty: the file begins with zeros", "the download broke off: fetch it again")
    if length > min(MAX_HEADER_BYTES, file_bytes - 8):
        f.seek(0)
        _refuse_others(f.read(min(file_bytes, 200)), path, error)
    if 8 + length > file_bytes:
        raise error(
            f"{path}: header length {length} does not fit into the file's {file_bytes} bytes",
            "the file is truncated, or not a safetensors file: fetch it again",
        )
    if length > MAX_HEADER_BYTES:
        raise error(f"{path}: header length {length} exceeds the limit of {MAX_HEADER_BYTES} bytes", BROKEN)
    raw = f.read(length)
    if len(raw) != length:
        raise error(f"{path}: header ends after {len(raw)} of {length} bytes", BROKEN)
    return parse_json_object(raw, f"{path}: header", error, BROKEN, unique=True), 8 + length


def _refuse_others(start: bytes, path: Path, error: type[Exl2RayError]) -> None:
    """``error`` for a file whose first bytes show that it is something else than its name says."""
    refuse_substitute(start, str(path), error)
    for mark, name in BINARIES:
        if start.startswith(mark):
            how = ", as torch.save writes" if name == "a ZIP file" else ""
            raise error(f"{path}: {name}{how}, not a safetensors file", "fetch or write the weights in safetensors")
    if start.isascii() and start.translate(None, b"\t\r\n").decode().isprintable():
        raise error(
            f"{path}: text in place of the weights: {start[:80].decode()!r}",
            "a server's answer? fetch the file again, with your token if the model is for those who asked for it",
        )


def _is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 1 << 63  # bool is an int in Python, not in the file format


def _tensor_info(
    name: str, entry: Any, path: Path, data_start: int, file_bytes: int, error: type[Exl2RayError]
) -> TensorInfo:
    if len(name) > MAX_NAME_CHARACTERS:
        raise error(f"{path}: tensor {name[:80]!r}...: its name has {len(name)} characters", BROKEN)
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where}: the header entry must hold exactly dtype, shape and data_offsets", BROKEN)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if isinstance(dtype, str) and dtype in CODED:
        text = f"{where}: dtype {dtype}, in which weights are quantised already, is not read"
        raise error(text, "start from the original weights, in bfloat16 or float16")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise error(f"{where}: dtype {str(dtype)[:40]!r} is not one of {', '.join(DTYPES)}", BROKEN)
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(map(_is_count, shape)):
        raise error(f"{where}: shape {str(shape)[:80]} is not a list of at most {MAX_DIMENSIONS} counts", BROKEN)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise error(f"{where}: data_offsets {str(offsets)[:80]} is not a pair of byte offsets", BROKEN)
    begin, end = offsets
    available = file_bytes - data_start
    if not begin <= end <= available:
        raise error(
            f"{where}: data_offsets [{begin}, {end}] do not fit into the file's data section of {available} bytes",
            "the file is truncated: fetch it again" if end > available else BROKEN,
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != end - begin:
        held = f"data_offsets [{begin}, {end}] hold {end - begin}"
        raise error(f"{where}: {dtype} {shape} needs {nbytes} bytes, {held}", BROKEN)
    if math.prod(max(n, 1) for n in shape) >= 1 << 63:  # with a zero among them, so that no byte is needed
        raise error(f"{where}: shape {shape} is beyond what can be counted", BROKEN)
    return TensorInfo(name, path, dtype, tuple(shape), data_start + begin, nbytes)


def _check_coverage(
    tensors: dict[str, TensorInfo], path: Path, data_start: int, file_bytes: int, error: type[Exl2RayError]
) -> None:
    """The tensors, sorted by offset, must tile the data section: no overlap, no hole, nothing left over."""
    position, before = data_start, "the header"
    for t in sorted(tensors.values(), key=lambda t: (t.begin, t.nbytes)):
        if t.begin != position:
            what = "overlaps" if t.begin < position else f"leaves a hole of {t.begin - position} bytes after"
            raise error(f"{path}: tensor {t.name!r} at byte {t.begin} {what} {before}, which ends at byte {position}", BROKEN)
        position, before = t.begin + t.nbytes, f"tensor {t.name!r}"
    if position != file_bytes:
        raise error(f"{path}: {file_bytes - position} bytes after the last tensor ({before}) belong to no tensor", BROKEN)


# ---- writing ----------------------------------------------------------------------------------------------------------


def header_bytes(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """Length and JSON header of a file with the data of ``tensors`` (name, safetensors dtype, shape) in order, without
    ``__metadata__``; the data after it starts at a multiple of 8.
    """
    header: dict[str, Any] = {}
    position = 0
    for name, dtype, shape in tensors:
        end = position + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The values of a tensor on any device, row by row, as bytes: of itself where it is contiguous and on the CPU."""
    t = tensor.detach().cpu().contiguous()
    # as_strided: a contiguous tensor of one element may have any stride, which view(uint8) does not take
    return t.as_strided((t.numel(),), (1,)).view(torch.uint8).numpy().data
