"""Files of a folder, each opened once: what was looked at is what is sent, whatever happens to its name meanwhile.

Small files are read where they are opened. Of shards the descriptor is kept, and the upload reads through it. A link is
followed under the rules of ``exl2ray.formats.links``, which conversions keep too; what stands behind it is opened by its
own name, and afterwards the system is asked which file that was.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from exl2ray.errors import UsageError
from exl2ray.formats.links import outside

MAX_SIDE_BYTES = 256 << 20  # of a file that is not a shard; tokenizers of 256 000 tokens have 30 MB
FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # the last one: a pipe would wait for its writer
DESCRIPTORS = Path("/proc/self/fd")


class NotSent(Exception):
    """Why a file cannot be sent, in words."""


@dataclass(frozen=True)
class Opened:
    """A file that may be sent. content: of a side file; None for a shard, which ``descriptor`` reads."""

    path: Path
    nbytes: int
    content: bytes | None
    descriptor: int = -1
    identity: tuple[int, ...] = field(default=(), repr=False)  # device, inode, size, time of the last change

    def source(self, name: Path) -> Path | bytes:
        """What an upload reads: the content, or ``name``, which is made a link to the open file."""
        if self.content is not None:
            return self.content
        if not DESCRIPTORS.is_dir():
            return self.path
        name.symlink_to(DESCRIPTORS / str(self.descriptor))
        return name

    def check_unchanged(self) -> None:
        """UsageError if the name stands for another file by now, or a shard was written to."""
        try:
            now = [os.stat(self.path)] + ([os.fstat(self.descriptor)] if self.content is None else [])
        except OSError:
            now = []
        if not now or any(_identity(s) != self.identity for s in now):
            hint = "run the same command when nothing writes there"
            raise UsageError(f"{self.path}: changed while it was being published", hint)

    def close(self) -> None:
        if self.descriptor >= 0:
            os.close(self.descriptor)


def open_file(directory: Path, name: str) -> Opened:
    """Raises NotSent for what is no regular file, cannot be read, is too large, or lies elsewhere."""
    path = directory / name
    try:
        descriptor = _open(path, directory)
    except OSError as e:
        raise NotSent(f"cannot be read: {e.strerror or e}") from None
    except RuntimeError:  # of pathlib, before Python 3.13
        raise NotSent("a link in a circle") from None
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise NotSent("not a regular file")
        if name.endswith(".safetensors"):
            return Opened(path, found.st_size, None, descriptor, _identity(found))
        content = _read(descriptor, found.st_size)
    except OSError as e:
        os.close(descriptor)
        raise NotSent(f"cannot be read: {e.strerror or e}") from None
    except NotSent:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return Opened(path, len(content), content, -1, _identity(found))


def _open(path: Path, directory: Path) -> int:
    """The descriptor of a regular file, or of what a link that may be followed leads to."""
    mode = os.lstat(path).st_mode
    if not stat.S_ISLNK(mode):
        if not stat.S_ISREG(mode):  # opening a device can do things
            raise NotSent("not a regular file")
        return os.open(path, FLAGS)
    elsewhere, real = outside(path, directory), Path(os.path.realpath(path))
    if elsewhere is not None:
        raise NotSent(f"a link to {elsewhere}, outside of the folder")
    if not real.is_file():
        raise NotSent("a link to nothing" if not real.exists() else "a link to what is not a regular file")
    descriptor = os.open(real, FLAGS)
    if DESCRIPTORS.is_dir() and os.readlink(DESCRIPTORS / str(descriptor)) != str(real):
        os.close(descriptor)
        raise NotSent("a link that changed while it was opened")
    return descriptor


def _read(descriptor: int, size: int) -> bytes:
    if size > MAX_SIDE_BYTES:
        raise NotSent(f"larger than {MAX_SIDE_BYTES >> 20} MiB, which no file of this kind is")
    parts, left = [], MAX_SIDE_BYTES + 1
    while left > 0 and (part := os.read(descriptor, min(left, 8 << 20))):
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise NotSent("grew while it was read")
    return b"".join(parts)


def _identity(s: os.stat_result) -> tuple[int, ...]:
    return s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns
