"""The tuned model as a directory: the tensors of the start in their order, those that were tuned in their place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from exl2ray.errors import StoreError
from exl2ray.formats.claim import existing_shards
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.files import atomic_file, sha256_of
from exl2ray.formats.shards import Shard, TensorEntry, config_bytes, plan_shards, shard_names, write_shards
from exl2ray.formats.side_files import copy_side_files, stale_side_files
from exl2ray.formats.summary import described, inspect_directory
from exl2ray.formats.target import CARD, Owner, check_claim, claim_target, release_target, withdraw

Produce = Callable[[], Tensor]
SIDE_BY_SIDE = min(8, os.cpu_count() or 1)  # tensors that are unpacked and packed


def write_tuned(
    start: Exl2Model, target: Path, owner: Owner, tuned: Mapping[str, Produce], facts: Mapping[str, Any],
    check: Callable[[], None],
) -> list[Shard]:  # fmt: skip
    """Writes ``start`` with the tensors of ``tuned`` in place of its own, and what lies beside them; the shards.

    facts: kept in config.json as ``quantization_config.tuned``, where loaders pass them over. check: raises if ``start`` is
    not what it was, before config.json makes a model of the output. Raises what `exl2ray.formats.target` and
    `exl2ray.formats.shards` raise.
    """
    order = sorted(start.names(), key=lambda name: (start.file(name).name, start.info(name).begin))
    entries = [_entry(start, name, tuned) for name in order]
    limit = 0
    if len(start.files) > 1:
        limit = max(sum(start.nbytes(n) for n in order if start.file(n).name == f) for f in start.files)
    names = shard_names(len(plan_shards([e.nbytes for e in entries], limit)))
    claim_target(target, owner, names)
    with ThreadPoolExecutor(SIDE_BY_SIDE, thread_name_prefix="pack") as pool:
        shards = write_shards(target, ahead(entries, pool), limit, existing_shards(target), lambda: withdraw(target))
    copy_side_files(start.path, target)
    check_claim(target, owner)
    check()
    settings = {**described(inspect_directory(start.path)), "tuned": dict(facts)}
    config = {**start.config, "quantization_config": settings}
    with atomic_file(target / "config.json") as f:
        f.write(config_bytes(config))
    release_target(target)
    return shards


def ahead(entries: Sequence[TensorEntry], pool: ThreadPoolExecutor) -> list[TensorEntry]:
    """The same entries: while one is written, those behind it are made by the pool."""
    begun: dict[int, Future[Tensor]] = {}

    def load(index: int) -> Tensor:
        for i in range(index, min(index + 1 + SIDE_BY_SIDE, len(entries))):
            if i not in begun:
                begun[i] = pool.submit(entries[i].load)
        return begun.pop(index).result()

    return [replace(e, load=partial(load, i)) for i, e in enumerate(entries)]


def write_record(
    path: Path, names: Mapping[str, str], target: Path, result: Mapping[str, Any], shards: Sequence[Shard]
) -> None:
    """Says that ``target`` holds a finished tuning: what came of it, and what the files are. names: "identity"; "asked":
    what of it is known before there is text; "start": fingerprint of the model that was tuned."""
    config = sha256_of(target / "config.json")
    facts = {**names, "config": config, "shards": [asdict(s) for s in shards], "result": dict(result)}
    with atomic_file(path) as f:
        f.write(json.dumps(facts, indent=1).encode())


def _recorded(path: Path) -> dict[str, Any]:
    """What `write_record` wrote, whoever has changed it since; empty where that is no JSON object."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def finished(path: Path, identity: str, start: Path, target: Path) -> dict[str, Any] | None:
    """What `write_record` was told of this identity, if the files are still what was written; else None."""
    found = _recorded(path)
    try:
        if found["identity"] != identity or sha256_of(target / "config.json") != found["config"]:
            return None
        shards = [Shard(**s) for s in found["shards"]]
        result = dict(found["result"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if existing_shards(target) != sorted(s.name for s in shards) or not all(s.is_intact(target) for s in shards):
        return None
    return None if [n for n in stale_side_files(start, target) if n != CARD] else result


def is_of_another(path: Path, identity: str) -> bool:
    """Whether the record is of a finished tuning of another identity."""
    return bool(_recorded(path).get("identity", identity) != identity)


def refuse_another(path: Path, name: str, value: str, target: Path) -> None:
    """StoreError if ``target`` holds a finished tuning whose record says otherwise of ``name``: it may be the better one."""
    found = _recorded(path)
    try:
        other = found.get(name, value) != value and sha256_of(target / "config.json") == found["config"]
        kept = f"{float(found['result']['after']['mean']):.4g}" if other else ""
    except (OSError, ValueError, KeyError, TypeError):
        return
    if other:
        raise StoreError(
            f"{target}: holds a model that was tuned with other settings or other text, of another start or by an earlier "
            f"version (KL {kept})",
            "give another -o; or remove that model first",
        )


def _entry(start: Exl2Model, name: str, tuned: Mapping[str, Produce]) -> TensorEntry:
    load = tuned.get(name, lambda: start.load(name))
    return TensorEntry(name, start.dtype(name), start.shape(name), load)
