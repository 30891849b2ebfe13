"""The tuned model as a directory: the tensors of the start in their order, those that were tuned in their place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from exl2ray.formats.claim import existing_shards
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.files import atomic_file
from exl2ray.formats.shards import (
    TensorEntry,
    config_bytes,
    plan_shards,
    shard_names,
    write_shards,
)
from exl2ray.formats.side_files import copy_side_files
from exl2ray.formats.target import Owner, check_claim, claim_target, release_target, withdraw

Produce = Callable[[], Tensor]


def write_tuned(
    start: Exl2Model, target: Path, owner: Owner, tuned: Mapping[str, Produce], facts: Mapping[str, Any]
) -> int:
    """Writes ``start`` with the tensors of ``tuned`` in place of its own, and what lies beside them; bytes of the weights.

    facts: kept in config.json as ``quantization_config.tuned``, where loaders pass them over. Raises what
    `exl2ray.formats.target` and `exl2ray.formats.shards` raise.
    """
    order = sorted(start.names(), key=lambda name: (start.file(name).name, start.info(name).begin))
    entries = [_entry(start, name, tuned) for name in order]
    limit = 0
    if len(start.files) > 1:
        limit = max(sum(start.nbytes(n) for n in order if start.file(n).name == f) for f in start.files)
    names = shard_names(len(plan_shards([e.nbytes for e in entries], limit)))
    claim_target(target, owner, names)
    shards = write_shards(target, entries, limit, existing_shards(target), lambda: withdraw(target))
    copy_side_files(start.path, target)
    check_claim(target, owner)
    config = {**start.config, "quantization_config": {**start.config["quantization_config"], "tuned": dict(facts)}}
    with atomic_file(target / "config.json") as f:
        f.write(config_bytes(config))
    release_target(target)
    return sum(shard.size for shard in shards)


def _entry(start: Exl2Model, name: str, tuned: Mapping[str, Produce]) -> TensorEntry:
    load = tuned.get(name, lambda: start.load(name))
    return TensorEntry(name, start.dtype(name), start.shape(name), load)
