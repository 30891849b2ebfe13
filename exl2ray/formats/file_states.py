"""The files of a model as they were when a job began: size, time of the last change, and where it is affordable the content.

A fingerprint samples tensors (`SourceModel.fingerprint`): hashing hundreds of gigabytes at every start would cost minutes.
What it cannot see, single weights that were edited, shows in the time of the file. Whether a file with another time is
another file, only its hash can tell; that of the content before must have been taken then.

A ``stamp`` is whatever text changes when a file is written: the time in nanoseconds here, an ETag where files are remote.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from exl2ray.errors import SourceError, UnfitError, unreadable
from exl2ray.formats.elsewhere import STAMP, open_binary, remote_file
from exl2ray.wording import shown, some

HASHED_BYTES = 4 << 30  # models up to this size are hashed, while the first modules are measured: they are read anyway
_PIECE_BYTES = 4 << 20
_THREADS = 4


@dataclass(frozen=True)
class FileState:
    """One file. sha256 (hex) of its content where it was hashed."""

    name: str
    size: int
    stamp: str
    sha256: str | None = None

    def is_as(self, other: FileState) -> bool:
        """Whether nothing speaks for another content."""
        return (self.name, self.size, self.stamp) == (other.name, other.size, other.stamp)


@dataclass(frozen=True)
class Comparison:
    """Of the files of a job with those that are there now.

    states: what there is to remember. altered: names of files with other content. unproven: names of files that were written
    again, and may have other content or not.
    """

    states: tuple[FileState, ...]
    altered: tuple[str, ...] = ()
    unproven: tuple[str, ...] = ()

    def doubt(self, begun: str) -> str:
        """What to say of ``unproven`` where samples are as before; ``begun``: what had, when they were written again."""
        return (
            f"weights were written again after {begun} had begun ({some(self.unproven)}); samples of them are as before, "
            "but their content was not hashed then: if they were edited, the result mixes two models"
        )


def file_states(paths: Iterable[Path]) -> tuple[FileState, ...]:
    """Sizes and times of files, by name. Raises SourceError for one that cannot be looked at."""
    out = []
    for path in sorted(paths):
        remote = remote_file(path)
        if remote is not None:
            stamp = remote.now()
            out.append(FileState(path.name, remote.size, stamp, remote.sha256 if stamp == remote.stamp else None))
            continue
        try:
            found = path.stat()
        except OSError as e:
            raise unreadable(SourceError, path, e, "was the model moved or deleted?") from e
        out.append(FileState(path.name, found.st_size, str(found.st_mtime_ns)))
    return tuple(out)


class Hashing:
    """The hashes of files while other work goes on. None if they are not on this disk or have more than ``limit`` bytes
    together."""

    def __init__(self, states: Sequence[FileState], directory: Path, limit: int = HASHED_BYTES) -> None:
        self._states, self._stop = tuple(states), threading.Event()
        self._found: list[Future[str]] = []
        if sum(s.size for s in states) > limit or any(s.stamp.startswith(STAMP) for s in states):
            return
        pool = ThreadPoolExecutor(_THREADS, "hashing")
        self._found = [pool.submit(lambda s=s: s.sha256 or file_sha256(directory / s.name, self._stop)) for s in states]  # type: ignore[misc]
        pool.shutdown(wait=False)

    def result(self) -> tuple[FileState, ...]:
        """The states with their hashes, once they are all there. Raises SourceError for a file that cannot be read."""
        if not self._found:
            return self._states
        return tuple(replace(s, sha256=f.result()) for s, f in zip(self._states, self._found, strict=True))

    def cancel(self) -> None:
        """Gives up what is not done."""
        self._stop.set()
        for future in self._found:
            future.cancel()


def compare_states(before: Sequence[FileState], now: Sequence[FileState], directory: Path) -> Comparison:
    """Hashes the files whose size or stamp differ, where their content before is known."""
    known = {s.name: s for s in before}
    kept, altered, unproven = [], [], []
    for state in now:
        old = known.get(state.name)
        if old is not None and state.is_as(old):
            kept.append(old)
            continue
        if old is not None and old.stamp.startswith(STAMP) and state.stamp.startswith(STAMP):
            altered.append(state.name)  # of remote files the stamp follows the content, and the content is not read for it
            kept.append(state)
            continue
        if old is None or old.sha256 is None:
            unproven.append(state.name)
            kept.append(state)
            continue
        found = None if state.size != old.size else state.sha256 or file_sha256(directory / state.name)
        if found != old.sha256:
            altered.append(state.name)
        kept.append(replace(state, sha256=found))
    return Comparison(tuple(kept), tuple(altered), tuple(unproven))


def from_json(values: Iterable[Mapping[str, Any]]) -> tuple[FileState, ...]:
    """What records say of files. Raises TypeError and UnfitError for anything else."""
    states = tuple(FileState(**v) for v in values)
    for s in states:
        types = ((s.name, str), (s.size, int), (s.stamp, str), (s.sha256, (str, type(None))))
        if not all(isinstance(found, wanted) for found, wanted in types):
            raise UnfitError(f"no state of a file: {shown(s)}")
    return states


def file_sha256(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 (hex) of a file, read once. Raises SourceError. ``stop``: once it is set, of what was read so far."""
    digest, buffer = hashlib.sha256(), bytearray(_PIECE_BYTES)
    view = memoryview(buffer)
    try:
        with open_binary(path) as f:
            while (count := f.readinto(view)) and not (stop is not None and stop.is_set()):  # type: ignore[attr-defined]
                digest.update(view[:count])
    except OSError as e:
        raise unreadable(SourceError, path, e) from e
    return digest.hexdigest()
