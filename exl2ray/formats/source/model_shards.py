"""Which of the weight files in a folder are the model, as transformers chooses: indexes, second copies, files of others."""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from exl2ray.errors import Exl2RayError
from exl2ray.formats.json_file import read_json_object
from exl2ray.formats.tensorfile import TensorFile, TensorInfo, same_values
from exl2ray.wording import some

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
MAX_INDEX_BYTES = 64 << 20
REPEATED = 0.25  # share of the weights that the shards of one model may repeat; two copies of a model repeat all
NUMBERED = re.compile(r"(.*)-(\d{5,6})-of-(\d{5,6})\.safetensors")  # DeepSeek counts "00001-of-000163"
# Beside a model: weights in the publisher's own layout, and adapters, which transformers does not apply by itself either.
FOREIGN = re.compile(r"consolidated.*\.safetensors|adapter(_model|s)?\.safetensors|(optimizer|training_args).*\.safetensors")


def own_files(files: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """(files that may be the model, notes about others beside it)."""
    own = [f for f in files if not FOREIGN.fullmatch(f.name)]
    if not own:
        return list(files), []
    notes = []
    adapters = [f.name for f in files if f.name.startswith("adapter")]
    others = [f.name for f in files if f not in own and f.name not in adapters]
    if adapters:
        notes.append(f"{adapters[0]} is an adapter beside the model; it is not applied (merge_and_unload of peft merges it)")
    if others:
        notes.append(f"{', '.join(others[:3])}: weights in another layout beside the model; left out")
    return own, notes


def read_index(directory: Path, error: type[Exl2RayError]) -> dict[str, str]:
    """Tensor -> file of the index; empty if there is none. Raises ``error`` for a file that is no index."""
    path = directory / INDEX
    if not os.path.exists(path):
        return {}
    weight_map = read_json_object(path, error, "delete it: the weights are found without", MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(weight_map, dict):
        raise error(f"{path}: not a weight index: it has no weight_map", "delete it: the weights are found without")
    return {str(tensor): posixpath.normpath(str(file)) for tensor, file in weight_map.items()}  # "./model-..."


def merged(
    files: Mapping[str, TensorFile], index: Mapping[str, str], error: type[Exl2RayError]
) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
    """(one table of tensors, files that count, notes).

    Where two files have tensors of one name, model.safetensors counts, else the files that the index names, as transformers
    reads them. A few tensors that the shards of one model repeat are one where their bytes are the same. Raises ``error`` if
    that does not tell.
    """
    twice = _overlapping(files)
    if not twice:
        return _table(files.values()), list(files), []
    chosen = {WHOLE} if WHOLE in files else {f for f in index.values() if f in files}
    names = {n for f in chosen for n in files[f].tensors}
    copies = [f for f in files if f not in chosen and not names.isdisjoint(files[f].tensors)]
    kept = [f for f in files if f not in copies]
    if not chosen or _overlapping({f: files[f] for f in kept}):
        return _repeated(files, twice, error)
    why = f"{WHOLE} has the same tensors" if WHOLE in chosen else f"{INDEX} names other files with the same tensors"
    note = f"{some(copies, 2)}: a second copy of the weights, ignored ({why}, and transformers reads that one)"
    return _table(files[f] for f in kept), kept, [note]


def _repeated(
    files: Mapping[str, TensorFile], twice: tuple[str, str, str], error: type[Exl2RayError]
) -> tuple[dict[str, TensorInfo], list[str], list[str]]:
    """As ``merged``, of shards that repeat tensors; ``error`` unless those are few and the same in each."""
    table: dict[str, TensorInfo] = {}
    pairs = []
    for info in (info for f in files.values() for info in f.tensors.values()):
        first = table.setdefault(info.name, info)
        if first is not info:
            pairs.append((first, info))
    repeated, name = sum(info.nbytes for _, info in pairs), twice[0]
    if repeated > REPEATED * sum(info.nbytes for info in table.values()):
        raise error(
            f"tensor {name!r} is in both {files[twice[1]].path} and {files[twice[2]].path}",
            "the directory mixes two copies of the weights; keep one of them",
        )
    for a, b in pairs:
        if not same_values(a, b, error):
            raise error(
                f"tensor {a.name!r} is in both {a.file} and {b.file}, and not the same there",
                "two models are mixed, or a program that merges models went wrong: fetch or merge it again",
            )
    note = f"{len(pairs)} tensors are stored twice, with the same values, e.g. {name} in {twice[1]} and {twice[2]}"
    return table, list(files), [note]


def _overlapping(files: Mapping[str, TensorFile]) -> tuple[str, str, str] | None:
    """(tensor, file, file) for a tensor that two files have."""
    seen: dict[str, str] = {}
    for file, f in files.items():
        for name in f.tensors:
            if name in seen:
                return name, seen[name], file
            seen[name] = file
    return None


def _table(files: object) -> dict[str, TensorInfo]:
    return {name: info for f in files for name, info in f.tensors.items()}  # type: ignore[attr-defined]


def absent_tensors(index: Mapping[str, str], files: Sequence[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Tensor -> file, for what the index names and no file has."""
    present = set(files)
    return {name: file for name, file in index.items() if name not in tensors and file not in present}


def index_note(index: Mapping[str, str], files: Sequence[str]) -> list[str]:
    """A note if the index names files that are not there; whether something is missing is another question."""
    missing = [name[:80] for name in sorted(set(index.values()) - set(files))]
    if not missing:
        return []
    return [f"{INDEX} is out of date, ignored: it names {some(missing, 1)}, and no tensor of the model is missing"]


def gaps(files: Sequence[str]) -> list[str]:
    """Files that the numbers in the names of the others miss: model-00002-of-00003.safetensors beside 1 and 3."""
    found: dict[tuple[str, int, str], set[int]] = {}
    for name in files:
        m = NUMBERED.fullmatch(name)
        if m:
            found.setdefault((m[1], len(m[2]), m[3]), set()).add(int(m[2]))
    return [
        f"{stem}-{i:0{digits}d}-of-{count}.safetensors"
        for (stem, digits, count), have in found.items()
        for i in range(1, min(int(count), 1000) + 1)
        if i not in have
    ]
