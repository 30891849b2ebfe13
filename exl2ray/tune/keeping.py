"""When a tuning keeps what it has trained, and what becomes of it where the work directory takes nothing: a full disk.

What is trained is in memory, and training it anew takes hours. So a checkpoint that cannot be made is told, and training goes
on; it is tried again when the next one would be due. What the last step left is needed: the workers wait with it until there
is room, and give up once, after `WAIT_SECONDS`, with the last checkpoint untouched.
"""

from __future__ import annotations

import errno
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import suppress

from exl2ray.errors import JobMismatchError, StoreError
from exl2ray.quant.group import Comm
from exl2ray.store.faults import GaveUpError, MissingFileError
from exl2ray.store.fs import Store
from exl2ray.wording import file_size

SAVING_SHARE = 10  # of the time at least this many times as much goes by between two checkpoints as one takes
SAVING_BYTES = 1e9  # a second: of the first one
WAIT_SECONDS = 3600.0
RETRY_SECONDS = 15.0  # between two tries
TICK_SECONDS = 1.0  # as long as a stop that was asked for waits


class Keeper:
    """All members of a group call it together, but for ``patience``.

    notes: get what is to be told. every: seconds from one checkpoint to the next, at least. state_bytes, last_bytes: of a
    checkpoint and of what is kept after the last step, of all members together. step: of the last checkpoint; None: there is
    none.
    """

    def __init__(
        self, store: Store, comm: Comm, notes: list[str], every: float, state_bytes: int, last_bytes: int, step: int | None
    ) -> None:
        self._store, self._comm, self._notes, self._every = store, comm, notes, every
        self._state_bytes, self._last_bytes, self._step = state_bytes, last_bytes, step
        self._took = state_bytes / comm.size / SAVING_BYTES
        self._at = time.monotonic()
        self._refused = False
        self.is_done = False  # what the last step left is in the store

    def patience(self) -> float:
        """Seconds from one checkpoint to the next."""
        return max(self._every, SAVING_SHARE * self._took) if self._every else 0.0

    def is_due(self) -> bool:
        return bool(self._comm.gather(time.monotonic() - self._at >= self.patience())[0])

    def checkpoint(self, step: int, write: Callable[[], None]) -> str:
        """Why it could not be made; empty if it was. Raises MissingFileError for a work directory that is gone, and
        JobMismatchError."""
        begin, problem = time.monotonic(), ""
        if any(self._comm.gather(self._lacks_room())):
            problem = f"{self._store.root} has no room for a checkpoint of {file_size(self._state_bytes)}"
        else:
            try:
                write()
            except (MissingFileError, JobMismatchError):
                raise
            except StoreError as e:
                problem = f"no checkpoint could be made ({e.message})"
        self._at = time.monotonic()
        if problem:
            if not self._refused:
                self._notes.append(f"{problem}: training goes on without, and tries again")
            self._refused = True
            return problem
        if self._refused:
            self._notes.append(f"checkpoints can be made again: one of step {step}")
        self._refused, self._took, self._step = False, self._at - begin, step
        return ""

    def at_last(self, write: Callable[[], None], is_to_end: Callable[[], bool]) -> Iterator[str]:
        """Keeps what the last step left; ``is_done`` then. While it has to wait it yields what is to be told at once, the
        same again and again. is_to_end: whether a stop is asked for. Raises GaveUpError and JobMismatchError."""
        until, when = time.monotonic() + WAIT_SECONDS, time.strftime("%H:%M", time.localtime(time.time() + WAIT_SECONDS))
        words = ""
        while True:
            try:
                write()
            except JobMismatchError:
                raise
            except MissingFileError as e:  # nobody brings it back
                raise self._given_up(e) from e
            except StoreError as e:
                if self._comm.gather(time.monotonic() >= until)[0]:
                    raise self._given_up(e) from e
                words = f"what was trained cannot be kept: {e.message}; {self._remedy(e)}, it is tried again until {when}"
            else:
                self.is_done = True
                self._notes += ["what was trained is kept now"] if words else []
                return
            again = time.monotonic() + RETRY_SECONDS
            yield words
            while not self._comm.gather(time.monotonic() >= again)[0]:
                if is_to_end():
                    yield f"stopped before what was trained could be kept: {self.next()}"
                    return
                time.sleep(TICK_SECONDS)
                yield words

    def _given_up(self, e: StoreError) -> GaveUpError:
        hint = f"{self._remedy(e)}, and run the same command again: {self.next()}"
        return GaveUpError(f"what was trained cannot be kept: {e.message}", hint)

    def _remedy(self, e: StoreError) -> str:
        cause = e.__cause__
        if isinstance(cause, OSError) and cause.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return "make it writable again"
        return f"{file_size(self._last_bytes)} are needed there: free some"

    def next(self) -> str:
        """What the next run does, in words."""
        if self._step is None:
            return "it begins anew, since there was no checkpoint"
        return f"it goes on from step {self._step}, the last checkpoint"

    def _lacks_room(self) -> bool:
        """Whether all that is trained would fill the disk; the last checkpoint stays until the next one is whole."""
        with suppress(OSError):
            return shutil.disk_usage(self._store.root).free < self._state_bytes
        return False

