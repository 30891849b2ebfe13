"""Writing the packed linears of a module to the work directory, while the next ones are computed."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future

from torch import Tensor

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.store.records import FileRef, item_file
from exl2ray.team.runner import Runner

LEAST_BYTES = 32 << 20  # of a file: every one is made durable by itself, and a layer may have hundreds of experts


class PackedFiles:
    """Files of one module, on one worker. Large linears have one each, so that several are written at a time."""

    def __init__(self, run: Runner, kind: str, key: str, inputs_hash: str) -> None:
        self._run, self._kind, self._key, self._hash = run, kind, key, inputs_hash
        self._name = ""
        self._tensors: dict[str, Tensor] = {}
        self._writing: dict[str, Future[FileRef]] = {}

    def add(self, packed: Mapping[str, PackedLinear]) -> None:
        """Begins to write as soon as there is enough."""
        for key, p in packed.items():
            self._name = self._name or key
            self._tensors.update(p.tensors())
            if sum(t.nbytes for t in self._tensors.values()) >= LEAST_BYTES:
                self._write()

    def close(self) -> dict[str, Future[FileRef]]:
        """Begins to write what is left. Files by the key of the first linear in each."""
        if self._tensors:
            self._write()
        return self._writing

    def _write(self) -> None:
        name = self._name.removeprefix(f"{self._key}.")
        rel = item_file(self._kind, "tensors", f"{self._key}.{name}", self._hash)
        self._writing[self._name] = self._run.write(rel, self._tensors)
        self._name, self._tensors = "", {}
