"""What lies at an address, and which of it is fetched."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from exl2ray.errors import SourceError
from exl2ray.formats.elsewhere import RemoteFile
from exl2ray.formats.file_states import FileState
from exl2ray.formats.json_file import LIMITS
from exl2ray.formats.side_files import OTHER_BYTES, TEMPLATES, TOTAL_BYTES
from exl2ray.formats.source.model_shards import INDEX, MAX_INDEX_BYTES
from exl2ray.remote.address import Address

# Weights in other formats, archives, and what belongs to another program; dot files.
NOT_FETCHED = re.compile(
    r"\..*|consolidated\..*|.*\.bin\.index\.json"
    r"|.*\.(safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|keras|msgpack|onnx|onnx_data|ot|engine|nemo|mlmodel|tflite|pb|npz|npy|pkl"
    r"|zip|tar|gz|xz|zst|7z|parquet|arrow|mp4|wav|mp3|whl)",
    re.IGNORECASE,
)
MAX_NAMES = 100_000
MAX_FILE_BYTES = 1 << 46


@dataclass(frozen=True)
class Listing:
    """address: with the commit. entries: their names have folders, relative to it. ``fetch``: content of a small file;
    ``open``: a shard."""

    address: Address
    entries: tuple[FileState, ...]
    folders: tuple[str, ...]
    fetch: Callable[[FileState], bytes]
    open: Callable[[FileState], RemoteFile]

    def small(self) -> tuple[list[FileState], list[str]]:
        """(files to fetch, notes of those that are too large to be what their names say). Raises SourceError."""
        chosen, notes = [], []
        for entry in self.entries:
            folder, _, name = entry.name.rpartition("/")
            if folder not in ("", TEMPLATES) or NOT_FETCHED.fullmatch(name):
                continue
            most = max(OTHER_BYTES, LIMITS.get(name, 0), MAX_INDEX_BYTES if name == INDEX else 0)
            if entry.size <= most:
                chosen.append(entry)
            elif name in LIMITS or name == INDEX:
                text = f"{self.address}: {name}: {entry.size} bytes; larger than {most} bytes, which it may have"
                raise SourceError(text, "is it the file that its name says?")
            else:
                notes.append(f"{name} ({entry.size >> 20} MiB) is not fetched, nor copied into the output")
        if sum(e.size for e in chosen) > TOTAL_BYTES:
            raise SourceError(f"{self.address}: small files of more than {TOTAL_BYTES >> 20} MiB", "is it a model?")
        return chosen, notes

    def shards(self) -> list[FileState]:
        """The weights, at the top level."""
        found = [e for e in self.entries if "/" not in e.name and e.name.lower().endswith(".safetensors")]
        if any(e.size > MAX_FILE_BYTES for e in found):
            raise SourceError(f"{self.address}: a file of more than {MAX_FILE_BYTES >> 40} TiB", "no model has one")
        return found

    def others(self) -> tuple[str, ...]:
        fetched = {e.name for e in (*self.small()[0], *self.shards())}
        return tuple(sorted(e.name for e in self.entries if "/" not in e.name and e.name not in fetched))


def folders_of(names: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted({n.partition("/")[0] for n in names if "/" in n}))
