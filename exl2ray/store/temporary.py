"""Temporary folders that are known as abandoned when their process is gone: the kernel lets go of the lock in them.

Whatever ends a process, also one of another container, the next one finds what it left. A number of a process would not say
that: it may be somebody else's by now, or mean nothing here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from exl2ray.beneath import closing


def hold(folder: Path, lock: str) -> int:
    """Marks a folder as in use, for as long as this process lives; the descriptor of its lock. Raises OSError.

    Locked before it has its name, so that nobody takes the folder for an abandoned one.
    """
    new = folder / ".new-lock"
    handle = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.rename(new, folder / lock)
    except BaseException:
        os.close(handle)
        raise
    return handle


def abandoned(place: Path, prefix: str, lock: str) -> Iterator[Path]:
    """Folders of this user in ``place``, named ``prefix`` and something, whose lock nobody holds; it is held until the next
    one is asked for.
    """
    for folder in place.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            facts = folder.lstat()
            if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid() or stat.S_IMODE(facts.st_mode) & 0o077:
                continue
            with closing(os.open(folder / lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)) as handle:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield folder
