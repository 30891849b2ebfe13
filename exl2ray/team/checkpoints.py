"""Hidden states saved now and then, so that a fresh worker need not compute them from the token rows.

A checkpoint is a record like any other (kind of its pass, key ``states-<index>`` or ``states-<index>-<share>``). Saving
takes at most a twentieth of the time, whatever the disk: after a save of s seconds the next one waits 19 s at least. Looking
for a checkpoint reads its records and compares sizes; its files are hashed when they are read.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

from torch import Tensor

from exl2ray.errors import StoreError
from exl2ray.store.records import Record, Records, item_file
from exl2ray.store.tensors import get_tensors, put_tensors

STATES = "states-"  # start of the records' keys
_SHARE_OF_TIME = 0.05  # that saving may take at most


@dataclass(frozen=True)
class Chain:
    """One pass of states through the model. ``name`` covers what they depend on beside the modules' inputs hashes."""

    kind: str  # of the records, "measure", "quant/4.0", "quant/reference"
    name: str
    hashes: tuple[str, ...] = ()  # inputs hashes of all modules, where the states depend on them


@dataclass(frozen=True)
class Saved:
    """Hidden states from a checkpoint, of one share of the rows or of all of them."""

    index: int  # module whose entry states these are
    tensors: dict[str, Tensor]


class Checkpoints:
    """The checkpoints of one worker's work directory; ``due`` keeps to the share of time."""

    def __init__(self, records: Records, least_seconds: float) -> None:
        self._records = records
        self._least_seconds = least_seconds
        self._not_before = time.monotonic() + least_seconds

    def due(self) -> bool:
        return time.monotonic() >= self._not_before

    def save(self, chain: Chain, index: int, shares: dict[int | None, dict[str, Tensor]], keep_from: int) -> list[Record]:
        """Saves states at the entry of ``index``, by share (None: all rows); drops older ones. The new records.

        The newest checkpoint at or before module ``keep_from`` stays: a module from there on may still need it.
        """
        start = time.monotonic()
        older, saved = self._of(chain), list[Record]()
        inputs_hash = self._hash(chain, index)
        for share, tensors in shares.items():
            key = _key(index, share)
            file = put_tensors(self._records.store, item_file(chain.kind, "states", key, inputs_hash), tensors)
            payload = {"index": index, "share": share, "chain": chain.name}
            saved.append(Record(chain.kind, key, inputs_hash, payload, (file,)))
            self._records.commit(saved[-1])
            mine = [r for r in older if r.payload["share"] == share and int(r.payload["index"]) <= keep_from]
            needed = max((int(r.payload["index"]) for r in mine), default=0)
            if index <= keep_from:
                needed = index
            for record in mine:
                if int(record.payload["index"]) < needed:
                    self._records.remove(record)
        now = time.monotonic()
        self._not_before = now + max(self._least_seconds, (now - start) * (1 / _SHARE_OF_TIME - 1))
        return saved

    def load(self, chain: Chain, index: int, share: int | None = None) -> Saved | None:
        """The newest states of the chain at or before the entry of ``index``; damaged ones are passed over."""
        found = [r for r in self._of(chain) if r.payload["share"] == share and int(r.payload["index"]) <= index]
        for record in sorted(found, key=lambda r: -int(r.payload["index"])):
            try:
                tensors = get_tensors(self._records.store, record.files[0].rel, expect=record.files[0])
            except StoreError:
                continue
            return Saved(int(record.payload["index"]), tensors)
        return None

    def _of(self, chain: Chain) -> list[Record]:
        """Checkpoints whose states are those of this chain. Not hashed: they are large, and few of them are read."""
        out = []
        for (_, inputs_hash), r in self._records.scan(chain.kind, STATES).items():
            index, files = r.payload.get("index"), len(r.files)
            if r.payload.get("chain") == chain.name and isinstance(index, int) and "share" in r.payload and files:
                if (not chain.hashes or 0 < index <= len(chain.hashes)) and inputs_hash == self._hash(chain, index):
                    out.append(r)
        return out

    @staticmethod
    def _hash(chain: Chain, index: int) -> str:
        return chain.hashes[index - 1] if chain.hashes else chain.name.rpartition(":")[2]


def _key(index: int, share: int | None) -> str:
    return f"{STATES}{index}" if share is None else f"{STATES}{index}-{share}"
