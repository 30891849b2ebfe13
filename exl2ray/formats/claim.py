"""Whose the shards of an output directory are: a small dot file beside them names the source they were made from.

A conversion may be run into the directory of an earlier one of the same source, with another bitrate or after being
killed half-way; shards of anything else are never replaced. The file is written before the first shard. Loaders and
``exl2ray publish`` pass dot files over.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from exl2ray.errors import UsageError
from exl2ray.formats.files import atomic_file, write_error
from exl2ray.formats.shards import OUTPUT_NAME

CLAIM = ".exl2ray.json"
MAX_BYTES = 1 << 20


def claim(directory: Path, source: str, names: Iterable[str]) -> None:
    """Says that the shards ``names``, and those claimed before, are made from ``source`` (a fingerprint).

    Writes nothing if that is said already. Raises UsageError as ``refuse_foreign_shards``, StoreError if it cannot be
    written.
    """
    refuse_foreign_shards(directory, source)
    _, before = _read(directory)
    kept = {n for n in before if (directory / n).exists()}
    wanted = json.dumps({"source": source, "shards": sorted({*names, *kept})}, indent=1).encode()
    path = directory / CLAIM
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if path.is_file() and path.read_bytes() == wanted:
            return
    except OSError as e:
        raise write_error(directory, e) from e
    with atomic_file(path) as f:
        f.write(wanted)


def existing_shards(directory: Path) -> list[str]:
    """Names of the shards in a directory, whoever made them, sorted."""
    if not directory.is_dir():
        return []
    return sorted(p.name for p in directory.iterdir() if OUTPUT_NAME.fullmatch(p.name))


def refuse_foreign_shards(directory: Path, source: str) -> None:
    """UsageError if ``directory`` has shards that were not made by exl2ray from ``source``."""
    present = existing_shards(directory)
    owner, claimed = _read(directory)
    foreign = present if owner != source else [n for n in present if n not in claimed]
    if foreign:
        what = foreign[0] + (f" and {len(foreign) - 1} more shards" if len(foreign) > 1 else "")
        other = bool(owner) and owner != source
        why = "made from another model, or before this one was changed" if other else "not written there by exl2ray"
        raise UsageError(
            f"-cf {directory}: holds {what}, {why}",
            "choose another directory, or delete those files if they may go",
        )


def _read(directory: Path) -> tuple[str, tuple[str, ...]]:
    """(source, shards) as claimed; ("", ()) where there is no claim that can be read."""
    try:
        with (directory / CLAIM).open("rb") as f:
            found = json.loads(f.read(MAX_BYTES))
        return str(found["source"]), tuple(map(str, found["shards"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "", ()
