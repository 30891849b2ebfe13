"""Where the tensors of a quantised module lie: in files of their own at first, in the shards of the work directory later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Place:
    """Bytes of a file: ``begin`` up to ``end``."""

    path: Path
    begin: int
    end: int

    def read(self) -> bytes:
        return self.path.read_bytes()[self.begin : self.end]

    def write(self, data: bytes, at: int = 0) -> None:
        assert at + len(data) <= self.end - self.begin
        with self.path.open("r+b") as f:
            f.seek(self.begin + at)
            f.write(data)

    def flip(self) -> None:
        """Alters a byte in the middle."""
        middle = (self.end - self.begin) // 2
        self.write(bytes([self.read()[middle] ^ 0x10]), middle)


def record_of(work: Path, key: str, kind: str = "quant/4.0") -> dict[str, Any]:
    (found,) = (work / kind / "records").glob(f"{key}.*.json")
    return dict(json.loads(found.read_text())["record"])


def places(work: Path, key: str, kind: str = "quant/4.0") -> dict[str, Place]:
    """The tensors of a module that is in shards, by name."""
    found = {}
    for file in record_of(work, key, kind)["files"]:
        for name, dtype, shape, path, offset in json.loads(file["pieces"]):
            size = {"I32": 4, "I16": 2, "F16": 2}[dtype]
            for n in shape:
                size *= n
            found[name] = Place(work / path, offset, offset + size)
    return found


def weights(work: Path, key: str, kind: str = "quant/4.0") -> Place:
    """The packed weights of the first linear of a module."""
    return next(p for name, p in places(work, key, kind).items() if name.endswith(".q_weight"))


def files_of(record: dict[str, Any]) -> list[str]:
    """Names of the files that workers wrote for a module, whether they are still there or not."""
    return [file["rel"] for file in record["files"]]
