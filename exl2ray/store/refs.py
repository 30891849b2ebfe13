"""What a record says of files: which there are, and where their tensors lie."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Piece:
    """Where a tensor lies: from ``offset`` on in ``file``, a name in the work directory. dtype: its safetensors name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int


@dataclass(frozen=True)
class FileRef:
    """A file of a record: its name in the work directory, SHA-256 (hex) of its content, and bytes.

    ``pieces``: where its tensors are since they were put into the shards of a model; the file itself is gone then.
    """

    rel: str
    sha256: str
    size: int
    pieces: tuple[Piece, ...] = ()
