"""Whose the files of an output directory are: a small dot file beside them says what was written there, and from what.

A conversion may be run into the directory of an earlier one of the same source, with another bitrate or after being
killed half-way; files of anything else are never replaced. While a model is being written the file also names the work
directory, and another one is refused there until the model is complete. It is written before the first file. Loaders and
``exl2ray publish`` pass dot files over.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exl2ray import beneath
from exl2ray.formats.files import atomic_file, write_error
from exl2ray.formats.shards import OUTPUT_NAME

CLAIM = ".exl2ray.json"
LOCK = ".exl2ray.lock"
TUNING = ".exl2ray-tune"  # in the output of a tuning, until it is complete
MAX_BYTES = 1 << 20


@dataclass(frozen=True)
class Claim:
    """source: fingerprint of the source model. shards, files: what exl2ray wrote; files None: an older version, which did
    not say. job, work: identity and place of the work directory that is writing; "" once the model is complete.
    """

    source: str
    shards: tuple[str, ...] = ()
    files: tuple[str, ...] | None = None
    job: str = ""
    work: str = ""

    def to_bytes(self) -> bytes:
        document: dict[str, Any] = {"source": self.source, "shards": sorted(self.shards)}
        if self.files is not None:
            document["files"] = sorted(self.files)
        if self.job:
            document |= {"job": self.job, "work": self.work}
        return json.dumps(document, indent=1).encode()


def read_claim(directory: Path) -> Claim | None:
    """None where there is no claim that can be read. Raises IrregularFileError for a link in its place."""
    path = directory / CLAIM
    try:
        with os.fdopen(beneath.open_file(None, path, path), "rb") as f:
            found = json.loads(f.read(MAX_BYTES))
        files = found.get("files")
        return Claim(
            str(found["source"]), tuple(map(str, found["shards"])), None if files is None else tuple(map(str, files)),
            str(found.get("job", "")), str(found.get("work", "")),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def write_claim(directory: Path, wanted: Claim) -> None:
    """Writes nothing if that is said already. Raises StoreError if it cannot be written."""
    try:
        beneath.make_directories(directory)
    except OSError as e:
        raise write_error(directory, e) from e
    if read_claim(directory) == wanted:
        return
    with atomic_file(directory / CLAIM) as f:
        f.write(wanted.to_bytes())


def existing_shards(directory: Path) -> list[str]:
    """Names of the shards in a directory, whoever made them, sorted."""
    if not directory.is_dir():
        return []
    return sorted(p.name for p in directory.iterdir() if OUTPUT_NAME.fullmatch(p.name))


def present(directory: Path, names: Iterable[str]) -> set[str]:
    """Those of ``names`` that are there."""
    return {n for n in names if os.path.lexists(directory / n)}
