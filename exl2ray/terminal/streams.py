"""The standard streams of a program whose reader may go away (`| head`), whose terminal may be gone, or that never had any.

Output that nobody reads any more stops the program like Ctrl-C: a word on standard error, the status of a stop, and a work
directory that can be resumed. A full disk behind `> FILE` is an error of the storage. Streams that are closed from the
start are taken for /dev/null: who closes them wants silence, and no file that is opened later may get their numbers.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import select
import sys
import threading
from collections.abc import Iterator
from typing import Any, NoReturn

from exl2ray import stopping
from exl2ray.errors import Exl2RayError, Interrupted, StoreError
from exl2ray.events import Reporter
from exl2ray.stopping import EXPENDABLE

_GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ECONNRESET)  # a pipe's reader, a terminal, the descriptor, a socket
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class OutputClosed(Interrupted):
    """Raised when nobody reads standard output any more."""


def _error(e: OSError) -> Exl2RayError:
    if e.errno in _GONE:
        return OutputClosed(
            "stopped: standard output was closed before everything had been written to it",
            "run it again; `> FILE` keeps everything, `> /dev/null` nothing",
        )
    return StoreError(f"cannot write to standard output: {e.strerror}", "make room, or send it elsewhere")


class Watched:
    """Hands events on for as long as somebody reads them. The first that cannot be written raises OutputClosed, or StoreError
    for a full disk; the ones that are told while the job ends are dropped.
    """

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._closed = reporter, False

    def event(self, name: str, **fields: Any) -> None:
        if self._closed:
            return
        try:
            self._reporter.event(name, **fields)
        except OSError as e:
            self._closed = True
            raise _error(e) from e

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._reporter.close()


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """For whatever prints: turns an OSError of standard output into OutputClosed or StoreError."""
    try:
        yield
    except OSError as e:
        # What could not be written is forgotten, and the next flush succeeds; files of ours have errors with names.
        if _failing(sys.stdout) or (e.errno in _FULL and e.filename is None):
            raise _error(e) from e
        if e.errno == errno.EPIPE:  # some other pipe or socket; click would end the program without a word
            raise RuntimeError(f"{type(e).__name__}: {e}") from e
        raise


def _failing(stream: Any) -> bool:
    """Whether what was written to the stream cannot be passed on, or its reader is gone."""
    try:
        stream.flush()
        watch = select.poll()
        watch.register(stream.fileno(), 0)  # errors are told without being asked for
        return any(what & (select.POLLERR | select.POLLNVAL) for _, what in watch.poll(0))
    except OSError:
        return True
    except (ValueError, AttributeError):  # captured by a test or a notebook
        return False


def open_missing() -> None:
    """/dev/null in the place of standard streams that the program was started without."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number that is free
            if number:
                os.set_inheritable(number, True)  # children write there, too
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))


def last_words(text: str) -> None:
    """Writes a line on standard error, if anybody is there."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def leave(status: int) -> NoReturn:
    """Ends the program with this status, whatever became of the streams."""
    _flush()
    sys.exit(status)


def end(status: int) -> NoReturn:
    """Ends the process as the interpreter does: waits for threads, does what was asked for at the exit, flushes. But modules,
    tensors and the contexts of GPUs are not taken down one by one, which takes a second with torch; the system does that.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    _flush()
    os._exit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # the interpreter would try once more, complain, and end with another status
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def leave_threads(status: Any) -> None:
    """After a stop, ends the process if threads are left: the interpreter would wait for a model to be written to its end.

    What they write has its name only when it is whole. Those that set up a GPU are not waited for at any end.
    """
    others = [t for t in threading.enumerate() if t is not threading.current_thread() and not t.daemon]
    if status == Interrupted.exit_code and others:
        stopping.leave(Interrupted.exit_code)
    if any(t.name.startswith(EXPENDABLE) for t in others):
        atexit._run_exitfuncs()
        os._exit(status if isinstance(status, int) else 0)
