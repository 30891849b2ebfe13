"""A Hugging Face model directory: safetensors shards and config.json.

``SourceModel`` reads headers only; tensors are loaded one at a time. Every top-level ``*.safetensors`` file counts
(exl2-format section 2: names are irrelevant), an index json is used only to notice a missing shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from exl2ray.errors import Exl2RayError, SourceError
from exl2ray.formats.hfconfig import read_config
from exl2ray.formats.json_file import read_json_object
from exl2ray.formats.tensorfile import TensorFile, TensorInfo, read_tensor

MAX_INDEX_BYTES = 64 << 20
SAMPLE_BYTES = 1024  # bytes per content sample of a tensor
SAMPLES = 8  # samples per tensor


class SourceModel:
    """A directory with safetensors shards and config.json. Opening it reads headers only.

    Raises ``error`` (SourceError; FormatError for EXL2 directories) naming file, tensor and numbers.
    """

    error: type[Exl2RayError] = SourceError
    uses_index = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            hint = "give the folder that holds config.json and *.safetensors"
            raise self.error(f"{self.path}: not a directory", hint)
        self.config = read_config(self.path / "config.json", self.error)
        self.files = {f.name: TensorFile(f, self.error) for f in weight_files(self.path, self.error)}
        if self.uses_index:
            _check_index(self.path, set(self.files), self.error)
        self._tensors = merge_shards(self.files.values(), self.error)

    @property
    def architecture(self) -> str:
        """The one entry of ``architectures`` in config.json."""
        return str(self.config["architectures"][0])

    def names(self) -> list[str]:
        """Tensor names of all shards, as stored, sorted."""
        return sorted(self._tensors)

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        if name not in self._tensors:
            raise self.error(f"{self.path}: no tensor {name!r} in its {len(self.files)} safetensors files")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> str:
        """Safetensors name of the stored dtype: "F16", "BF16", "F32", ..."""
        return self.info(name).dtype

    def nbytes(self, name: str) -> int:
        return self.info(name).nbytes

    def file(self, name: str) -> Path:
        """The shard that holds the tensor."""
        return self.info(name).file

    def load(
        self, name: str, rows: slice | None = None, allocate: Callable[[int], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """One tensor in its stored dtype, on the CPU; ``rows`` (of dimension 0) reads only that range.

        allocate(n): gives (n,) uint8 to read n bytes into; None: ordinary memory.
        """
        return read_tensor(self.info(name), rows, self.error, allocate)

    def fingerprint(self, names: Iterable[str] | None = None) -> str:
        """SHA-256 (hex) that changes when the model does, without reading all of it.

        Covers, per tensor in sorted order: name, dtype, shape, and SAMPLES evenly spaced samples of SAMPLE_BYTES bytes
        (all of it when it is not larger than that). Without ``names`` it covers every tensor and config.json. How
        tensors are spread over shards does not matter: the same model saved with another shard size has the same
        fingerprint. A change of a few single weights between the samples is not noticed.
        """
        digest = hashlib.sha256()
        if names is None:
            digest.update(json.dumps(self.config, sort_keys=True).encode())
        for name in sorted(self.names() if names is None else set(names)):
            info = self.info(name)
            digest.update(f"\n{json.dumps(name)} {info.dtype} {list(info.shape)}\n".encode())
            digest.update(_content_samples(info, self.error))
        return digest.hexdigest()


def weight_files(directory: Path, error: type[Exl2RayError] = SourceError) -> list[Path]:
    """Every top-level ``*.safetensors`` file, sorted by name; dot files and sub-directories do not count."""
    found = []
    try:
        entries = sorted(directory.iterdir())
    except OSError as e:
        raise error(f"{directory}: cannot be listed: {e.strerror or e}") from e
    for p in entries:
        if not p.name.endswith(".safetensors") or p.name.startswith(".") or p.is_dir():
            continue
        if not p.is_file():
            raise error(f"{p}: not a regular file (a dangling link?)", "fetch the shard again")
        found.append(p)
    if not found:
        raise error(f"{directory}: no *.safetensors file", "convert *.bin or *.pt weights to safetensors first")
    return found


def merge_shards(files: Iterable[TensorFile], error: type[Exl2RayError] = SourceError) -> dict[str, TensorInfo]:
    """One name table over all shards; a name that appears twice is an error (which copy counts would be undefined)."""
    table: dict[str, TensorInfo] = {}
    for f in files:
        for name, info in f.tensors.items():
            if name in table:
                raise error(
                    f"tensor {name!r} is in both {table[name].file} and {info.file}",
                    "the directory mixes two copies of the weights; keep one of them",
                )
            table[name] = info
    return table


def _check_index(directory: Path, present: set[str], error: type[Exl2RayError]) -> None:
    for path in sorted(directory.glob("*.safetensors.index.json")):
        if path.name.startswith("."):
            continue
        try:
            weight_map = read_json_object(path, error, max_bytes=MAX_INDEX_BYTES)["weight_map"]
            shards = sorted({str(v) for v in weight_map.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise error(f"{path}: not a weight index: {type(e).__name__}: {e}") from e
        missing = [s for s in shards if s not in present]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise error(
                f"{path}: names {len(shards)} shards, of which {', '.join(m[:80] for m in missing[:3])}{more} "
                f"{'is' if len(missing) == 1 else 'are'} missing",
                "the download is incomplete: fetch the missing shards",
            )


def _content_samples(info: TensorInfo, error: type[Exl2RayError]) -> bytes:
    if info.nbytes <= SAMPLES * SAMPLE_BYTES:
        positions, size = [0], info.nbytes
    else:
        positions, size = [i * (info.nbytes - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES)], SAMPLE_BYTES
    out = []
    try:
        with info.file.open("rb", buffering=0) as f:
            for p in positions:
                f.seek(info.begin + p)
                out.append(f.read(size))
    except OSError as e:
        raise error(f"{info.file}: tensor {info.name!r}: cannot be read: {e.strerror or e}") from e
    if any(len(s) != size for s in out):
        raise error(f"{info.file}: tensor {info.name!r}: the file ends early; it was longer when opened")
    return b"".join(out)
