"""Typed errors.

Every error that a user can cause, or must act on, is one of these: a message that says what is wrong and where
(file, tensor, flag, numbers), and a hint that says what to do. The command line prints both and exits with the
class's code; library code only raises.

| exit code | class | meaning |
|---|---|---|
| 2 | UsageError | wrong or contradictory flags (click's own usage errors share it) |
| 3 | SourceError | the source model cannot be used: files, config, tensors, tokenizer |
| 4 | CalibrationError | calibration data missing, too small or unusable |
| 5 | BudgetError | the bitrate cannot be reached with the options at hand |
| 6 | NumericError | NaN, infinity, factorisation failure, an output that is clearly broken |
| 7 | StoreError | the work directory: locked, corrupted, of another job, not writable, disk full |
| 8 | FormatError | an EXL2 directory, tensor, measurement or GGUF file breaks a rule of its format |
| 9 | ClusterError | Ray or its workers: cannot start, item failed repeatedly |
| 10 | HubError | publishing, or a model or data on the Hub: the Hub cannot be reached, or refuses |
| 130 | Interrupted | stopped by SIGINT, SIGTERM or SIGHUP, or as standard output was closed; can be resumed |
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

# The hint where this user may not read something.
PERMISSIONS = "look at the permissions of it and of the folders above it: namei -l DIR"
BAD_DISK = "a fault of the disk, or of the network that it is behind: dmesg may say more"


def reading_hint(e: OSError, otherwise: str = "") -> str:
    """What to do about a file that cannot be read."""
    if isinstance(e, PermissionError):
        return PERMISSIONS
    return BAD_DISK if e.errno in (errno.EIO, errno.ESTALE, errno.ENOTCONN) else otherwise


class UnfitError(ValueError):
    """Raised where a file of ours is taken apart, of what it holds and cannot mean; the text speaks of the file."""


def why_not_read(e: BaseException) -> str:
    """What is wrong with a JSON file of which ``e`` came, in words: Python's own speak of its types and not of the file."""
    if isinstance(e, UnfitError):
        return str(e)[:200]
    if isinstance(e, json.JSONDecodeError):
        return f"it is not JSON at line {e.lineno} column {e.colno}"
    if isinstance(e, UnicodeDecodeError):
        return f"it is not UTF-8 at byte {e.start}"
    if isinstance(e, KeyError):
        return f"{str(e.args[0])[:80]!r} is missing" if e.args else "something is missing"
    if isinstance(e, RecursionError):
        return "it is nested too deeply"
    return "what it holds has another form"


class Exl2RayError(Exception):
    """Base of all typed errors: ``message`` says what and where, ``hint`` how to fix it.

    ``more``: further lines of the message. Only these begin on lines of their own where the error is shown: a line end inside
    of one can only come from a name, and is spelled out.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "", more: Sequence[str] = ()) -> None:
        self.lines = (message, *more)
        self.message = "\n".join(self.lines)
        self.hint = hint
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\n  hint: {self.hint}" if self.hint else self.message

    def __reduce__(self) -> tuple[type[Exl2RayError], tuple[str, str, tuple[str, ...]]]:
        # Errors cross process boundaries (Ray); the default reduction would drop the hint.
        return (type(self), (self.lines[0], self.hint, self.lines[1:]))


E = TypeVar("E", bound=Exl2RayError)


def unreadable(error: type[E], where: object, e: OSError, otherwise: str = "") -> E:
    """The error for what cannot be read. otherwise: hint where the system's reason has none of its own."""
    return error(f"{where}: cannot be read: {e.strerror or e}", reading_hint(e, otherwise))


def not_permitted(path: str | Path) -> PermissionError | None:
    """Why this user may not see whether there is anything at a path; None where that can be seen."""
    try:
        os.stat(path)
    except PermissionError as e:
        return e
    except (OSError, ValueError):
        pass
    return None


class UsageError(Exl2RayError):
    exit_code = 2


class SourceError(Exl2RayError):
    exit_code = 3


class UnknownArchitectureError(SourceError):
    pass


class CalibrationError(Exl2RayError):
    exit_code = 4


class BudgetError(Exl2RayError):
    exit_code = 5


class NumericError(Exl2RayError):
    exit_code = 6


class StoreError(Exl2RayError):
    exit_code = 7


class JobMismatchError(StoreError):
    """The work directory belongs to a job with other settings."""


class FormatError(Exl2RayError):
    exit_code = 8


class ClusterError(Exl2RayError):
    exit_code = 9


class HubError(Exl2RayError):
    exit_code = 10


class Interrupted(Exl2RayError):
    exit_code = 130
    begun = True  # whether there is something to go on with


_NO_HOST_MEMORY = ("std::bad_alloc", "DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


def is_out_of_host_memory(error: BaseException) -> bool:
    """Whether Python, or torch in words of its own, was granted no more main memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    told = isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_HOST_MEMORY)
    return told or isinstance(error, MemoryError)
