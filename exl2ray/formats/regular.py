"""Opening files of a model, a data set or a user, which may be anything: a pipe that nobody writes to, a device without end,
a link into ``/proc``. Only regular files are opened, and none of the kernel's, which say they are regular and are not.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

KERNEL = ("/proc/", "/sys/")  # reading may wait for ever, or do something


class NotRegularError(OSError):
    """Something else than a file stands there; ``strerror`` says what."""


def open_regular(path: str | Path, buffering: int = -1) -> BinaryIO:
    """A regular file, to be read; never waits. Raises NotRegularError, or OSError if it cannot be opened."""
    _check(os.stat(path).st_mode, path)  # before opening: opening a device may do something
    real = os.path.realpath(path)
    if real.startswith(KERNEL):
        raise NotRegularError(errno.EINVAL, f"a link to {real}, a file of the kernel, not a regular file", str(path))
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        _check(os.fstat(handle).st_mode, path)  # what has been put there since
        return open(handle, "rb", buffering=buffering)
    except BaseException:
        os.close(handle)
        raise


def _check(mode: int, path: str | Path) -> None:
    if not stat.S_ISREG(mode):
        raise NotRegularError(errno.EINVAL, f"{file_kind(mode)}, not a regular file", str(path))


def file_kind(mode: int) -> str:
    """What is not a regular file, in words."""
    kinds = ((stat.S_ISDIR, "a directory"), (stat.S_ISFIFO, "a FIFO"), (stat.S_ISSOCK, "a socket"))
    return next((name for matches, name in kinds if matches(mode)), "a device")


def absent(path: str | os.PathLike[str]) -> str:
    """What is said of a path that leads nowhere: a link may have been left by a cache that was cleared, or a disk."""
    return f"a link to {os.readlink(path)}, which does not exist" if os.path.islink(path) else "does not exist"
