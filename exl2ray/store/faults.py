"""From operating-system errors to StoreError: what failed, where, and what to do about it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from exl2ray.errors import StoreError, reading_hint

_FULL = "free some space, then run the same command again: nothing that was committed is lost"
_DENIED = "check the owner and the mode of the directory, or give another one with -o"
_HINTS = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: "the disk quota is used up; " + _FULL,
    errno.EFBIG: "the file size limit (ulimit -f) or the file system forbids files of this size",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "the file system is mounted read-only; give another directory with -o",
    errno.EEXIST: "a file stands where a directory is expected; move it away or give another directory with -o",
    errno.ENOTDIR: "a part of the path is a file, not a directory; give another directory with -o",
    errno.EISDIR: "a directory stands where a file is expected; move it away or give another directory with -o",
    errno.EIO: "the disk reports an I/O error; check it (dmesg) before going on",
    errno.ESTALE: "the network file system lost the file (stale handle); check the mount on this machine",
    errno.ENAMETOOLONG: "the path is too long for the file system; give a shorter directory with -o",
}
_OBJECT_HINT = "check that the bucket exists, the credentials and the endpoint (AWS_*, GOOGLE_APPLICATION_CREDENTIALS)"


class MissingFileError(StoreError):
    """A file that was asked for by name does not exist in the work directory."""


class GaveUpError(StoreError):
    """What waiting has not mended: whoever hears of it does not try again."""


@contextmanager
def translated(action: str, path: str) -> Iterator[None]:
    """Turn an OSError of the body into ``cannot <action> <path>: ...``: MissingFileError or StoreError with a hint."""
    try:
        yield
    except FileNotFoundError as e:
        hint = "the work directory was deleted or moved, or its disk is gone" if action == "write" else ""
        raise MissingFileError(f"cannot {action} {path}: no such file or directory", hint) from e
    except OSError as e:
        # Object-store errors of pyarrow are OSErrors without errno; their text names the request that failed.
        reason = e.strerror if e.errno is not None and e.strerror else str(e)
        fallback = _OBJECT_HINT if "://" in path else ""
        hint = _HINTS.get(e.errno, fallback) if e.errno is not None else fallback
        if action == "read":  # of `status` and `report` too, which have no -o for a work directory
            hint = reading_hint(e, hint)
        raise StoreError(f"cannot {action} {path}: {reason}", hint) from e
