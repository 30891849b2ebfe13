"""A Hugging Face model directory: safetensors shards and config.json.

``SourceModel`` reads headers only; tensors are loaded one at a time. What may lie in the folder, and how much of it counts,
is known by `exl2ray.formats.source`: which files are the model's, what its tensors are called under the marks of wrappers,
and which weights are stored in FP8 or MXFP4, read here as the numbers that they stand for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import torch

from exl2ray.errors import Exl2RayError, SourceError, not_permitted, reading_hint, unreadable
from exl2ray.formats.elsewhere import NEAR_BYTES, THREADS, mount_at, open_binary, remote_file
from exl2ray.formats.hfconfig import odd_notes, read_config
from exl2ray.formats.json_file import as_json
from exl2ray.formats.source import architecture_name, dequantise, model_shards, quantised, training, wrapped_names
from exl2ray.formats.source.folder import Folder
from exl2ray.formats.source.fused_experts import single_experts
from exl2ray.formats.source.kinds import refusal
from exl2ray.formats.tensorfile import TensorFile, TensorInfo, open_files, read_tensor
from exl2ray.wording import some

SAMPLE_BYTES = 1024  # bytes per content sample of a tensor
SAMPLES = 8  # samples per tensor
MAX_FILES = 10_000


class SourceModel:
    """A directory with safetensors shards and config.json. Opening it reads headers only.

    Shapes, dtypes and sizes are those of the tensors that ``load`` gives. ``notes``: what is worth telling about the folder.
    Raises ``error`` (SourceError; FormatError for EXL2 directories) naming file, tensor and numbers.
    """

    error: type[Exl2RayError] = SourceError
    is_source = True  # of a conversion: a model as transformers reads it

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        refused = refusal(self.path, self.error)
        if refused is not None:
            raise refused
        self.notes: list[str] = []
        self.absent: dict[str, str] = {}  # tensor -> file, of what an index names and no file has
        self._scaled: dict[str, dequantise.Scaled] = {}
        self.config = read_config(self.path / "config.json", self.error, strict=not self.is_source)
        if self.is_source:
            where = str(self.path / "config.json")
            self.config, self.notes = architecture_name.resolved(self.config, where)
            self.notes += odd_notes(self.config, where)
            self._open_source()
        else:
            self.files = open_files(weight_files(self.path, self.error), self.error)
            for name in model_shards.gaps(list(self.files))[:1]:
                raise self.error(f"{self.path}: {name} is missing", "the copy is incomplete: fetch it")
            self._tensors = merge_shards(self.files.values(), self.error)

    def _open_source(self) -> None:
        own, notes = model_shards.own_files(weight_files(self.path, self.error))
        files = open_files(own, self.error)
        if not any(f.tensors for f in files.values()):
            text = f"{self.path}: {some(sorted(files))}: no tensor in there"
            raise self.error(text, "saved without its weights? fetch or save it again")
        index = model_shards.read_index(self.path, self.error)
        table, kept, copies = model_shards.merged(files, index, self.error)
        self.files = {name: files[name] for name in kept}
        self.absent = model_shards.absent_tensors(index, list(files), table)
        if not self.absent:
            notes += model_shards.index_note(index, list(files))
        stored = wrapped_names.plain_names(table)
        marked = sum(plain != name for plain, name in stored.items())
        if marked:
            example = max(stored.values(), key=len)
            notes.append(f"{marked} tensors have the mark of a wrapper in their names, e.g. {example}; read without it")
        tensors = {plain: replace(table[name], name=plain) for plain, name in stored.items()}
        tensors = single_experts(tensors, self.config)
        adapter = wrapped_names.unmerged(tensors)
        if adapter:
            raise self.error(
                f"{self.path}: {len(adapter)} tensors of an adapter that is not merged, e.g. {adapter[0]}",
                "merge it and save the model again: merge_and_unload() of peft",
            )
        lost = training.not_gathered(tensors, Folder(self.path))
        if lost is not None:
            raise self.error(f"{self.path}: {lost[0]}", lost[1])
        self._tensors, self._scaled = dequantise.dequantised(tensors, self.config, self.error)
        found = quantised.description(self._plain_infos(), self.config, Folder(self.path))
        if found is not None:
            raise self.error(f"{self.path}: {found[0]}", found[1])
        if self._scaled:
            notes.append(dequantise.summary(self._scaled))
        elif quantised.settings(self.config, Folder(self.path))[0]:
            notes.append("config.json says that the model is quantised, but its weights are plain numbers: taken as they are")
        self.notes += [*copies, *notes]

    def _plain_infos(self) -> list[TensorInfo]:
        return [info for name, info in self._tensors.items() if name not in self._scaled]

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
            text = f"{self.path}: no tensor {name!r} in its {len(self.files)} safetensors files"
            raise self.error(text, "is a shard missing? fetch the model again")
        return self._tensors[name]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.info(name).shape

    def dtype(self, name: str) -> str:
        """Safetensors name of the dtype: "F16", "BF16", "F32", ..."""
        return self.info(name).dtype

    def nbytes(self, name: str) -> int:
        return self.info(name).nbytes

    def file(self, name: str) -> Path:
        """The shard that holds the tensor."""
        return self.info(name).file

    def where(self, name: str) -> str:
        """The tensor, for people: with its shard, which is what may have to be fetched again."""
        return f"{self.file(name)}: tensor {name}"

    def load(
        self, name: str, rows: slice | None = None, allocate: Callable[[int], torch.Tensor] | None = None
    ) -> torch.Tensor:
        """One tensor in the dtype that ``dtype`` says, on the CPU; ``rows`` (of dimension 0) reads only that range.

        allocate(n): gives (n,) uint8 to read n bytes into; None: ordinary memory.
        """
        info, scaled = self.info(name), self._scaled.get(name)
        if scaled is not None:
            return scaled.load(rows, self.error, allocate)
        return read_tensor(info, rows, self.error, allocate)

    def stored(self, name: str) -> list[TensorInfo]:
        """What the files hold of a tensor: itself, or codes and scales that it is computed from."""
        info, scaled = self.info(name), self._scaled.get(name)
        return [info] if scaled is None else scaled.stored

    def is_computed(self, name: str) -> bool:
        """Whether a tensor is stored otherwise than ``load`` gives it."""
        return name in self._scaled

    def fingerprint(self, names: Iterable[str] | None = None) -> str:
        """SHA-256 (hex) that changes when the model does, without reading all of it.

        Covers, per tensor in sorted order: name, dtype, shape, and SAMPLES evenly spaced samples of SAMPLE_BYTES bytes
        (all of it when it is not larger than that). Without ``names`` it covers every tensor and config.json. How
        tensors are spread over shards does not matter: the same model saved with another shard size has the same
        fingerprint. A change of a few single weights between the samples is not noticed (`exl2ray.formats.file_states` does).
        """
        if names is None:
            return self._fingerprints[0]
        digest = hashlib.sha256()
        for part in self._content(names):
            digest.update(part)
        return digest.hexdigest()

    def weights_fingerprint(self) -> str:
        """`fingerprint` of all tensors, without config.json."""
        return self._fingerprints[1]

    @cached_property
    def _fingerprints(self) -> tuple[str, str]:
        """(with config.json, without), from one reading."""
        whole, weights = hashlib.sha256(as_json(self.config, sort_keys=True).encode()), hashlib.sha256()
        for part in self._content(self.names()):
            whole.update(part)
            weights.update(part)
        return whole.hexdigest(), weights.hexdigest()

    def _content(self, names: Iterable[str]) -> Iterator[bytes]:
        names = sorted(set(names))
        if mount_at(self.path) is None:
            samples: Iterator[bytes] = map(self._samples, names)
        else:  # the network is waited for
            with ThreadPoolExecutor(THREADS) as pool:
                samples = iter(list(pool.map(self._samples, names)))
        for name, sample in zip(names, samples, strict=True):
            info = self.info(name)
            yield f"\n{json.dumps(name)} {info.dtype} {list(info.shape)}\n".encode()
            yield sample

    def _samples(self, name: str) -> bytes:
        return b"".join(_content_samples(part, self.error) for part in self.stored(name))


def weight_files(directory: Path, error: type[Exl2RayError] = SourceError) -> list[Path]:
    """Every top-level ``*.safetensors`` file, sorted by name; dot files and sub-directories do not count."""
    found = []
    try:
        mount = mount_at(directory)
        entries = sorted([*directory.iterdir(), *(directory / n for n in (mount.files if mount is not None else ()))])
    except OSError as e:
        raise error(f"{directory}: cannot be listed: {e.strerror or e}", reading_hint(e)) from e
    for p in entries:
        if not p.name.lower().endswith(".safetensors") or p.name.startswith(".") or os.path.isdir(p):
            continue
        if not os.path.isfile(p) and remote_file(p) is None:
            _refuse_shard(p, error)
        found.append(p)
    if len(found) > MAX_FILES:
        raise error(f"{directory}: {len(found)} safetensors files; at most {MAX_FILES} can be read", "no model has as many")
    if not found:
        raise refusal(directory, error) or error(f"{directory}: no *.safetensors file", "fetch the weights")
    return found


def _refuse_shard(path: Path, error: type[Exl2RayError]) -> NoReturn:
    denied = not_permitted(path)
    if denied is not None:  # a link to where this user may not look
        raise unreadable(error, path, denied) from denied
    raise error(f"{path}: not a regular file (a dangling link?)", "fetch the shard again")


def merge_shards(files: Iterable[TensorFile], error: type[Exl2RayError]) -> dict[str, TensorInfo]:
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


def _content_samples(info: TensorInfo, error: type[Exl2RayError]) -> bytes:
    if info.nbytes <= SAMPLES * SAMPLE_BYTES:
        positions, size = [0], info.nbytes
    else:
        positions, size = [i * (info.nbytes - SAMPLE_BYTES) // (SAMPLES - 1) for i in range(SAMPLES)], SAMPLE_BYTES
    out = []
    try:
        with open_binary(info.file, NEAR_BYTES) as f:
            for p in positions:
                f.seek(info.begin + p)
                out.append(f.read(size))
    except OSError as e:
        raise unreadable(error, f"{info.file}: tensor {info.name!r}", e) from e
    if any(len(s) != size for s in out):
        raise error(f"{info.file}: tensor {info.name!r}: the file ends early; it was longer when opened")
    return b"".join(out)
