"""What --tune made of a solved model, from the record that a finished tuning leaves beside it in the work directory."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from exl2ray.errors import Exl2RayError, StoreError
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.json_file import as_number
from exl2ray.report.values import mapping, texts
from exl2ray.store.file_names import SOLVED, quant_kind
from exl2ray.store.fs import Store

RECORD = "tune.json"  # below a bitrate; `exl2ray.tune.run` writes it
_MAX_BYTES = 4 << 20


@dataclass(frozen=True)
class Tuning:
    """directory: of the tuned model. before, after: mean KL on held-out text, nats per token. kept: what of the training is
    in the model, in words. worse: kinds of text for the sake of which nothing is. file_bytes: of the tuned model."""

    directory: str
    before: float
    after: float
    kept: str
    worse: tuple[str, ...]
    file_bytes: int


def is_solved(directory: str, bits: float) -> bool:
    """Whether a model was written to where it waits for its tuning, and not to where its user wants it."""
    return PurePath(directory).parts[-3:] == (*PurePath(quant_kind(bits)).parts, SOLVED)


def read_tuning(store: Store, bits: float, problems: list[str]) -> Tuning | None:
    """None if the solved model of this bitrate was not tuned, or was another one when it was."""
    name = f"{quant_kind(bits)}/{RECORD}"
    try:
        if not store.exists(name):
            return None
        data = store.get(name) if store.size(name) <= _MAX_BYTES else b""
        record = json.loads(data)
        found = _tuning(mapping(mapping(record).get("result")))
    except StoreError as e:
        problems.append(e.message)
        return None
    except (ValueError, RecursionError):
        found = None
    if found is None:
        problems.append(f"{store.full_name(name)} is damaged: what tuning gained is left out")
        return None
    start = mapping(record).get("start")  # earlier versions did not note it
    return found if start is None or start == _solved_now(store, bits, start) else None


def _tuning(result: Any) -> Tuning | None:
    before, after = (as_number(mapping(result.get(name)).get("mean")) for name in ("before", "after"))
    directory, kept = result.get("directory"), result.get("kept")
    if before is None or after is None or not isinstance(directory, str) or not isinstance(kept, str):
        return None
    return Tuning(directory, before, after, kept, texts(result.get("worse")), int(as_number(result.get("file_bytes")) or 0))


def _solved_now(store: Store, bits: float, otherwise: Any) -> Any:
    """The fingerprint of the solved model; ``otherwise`` where none can be read, as in a copy of the small files alone."""
    try:
        return Exl2Model(Path(store.root) / quant_kind(bits) / SOLVED).fingerprint()
    except (Exl2RayError, OSError):
        return otherwise
