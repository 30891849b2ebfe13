"""How signals stop a job: SIGINT (Ctrl-C), SIGTERM (a cluster's way) and SIGHUP (the terminal is gone) do the same.

The first asks for a stop; where work is in flight the scheduler waits for it, elsewhere KeyboardInterrupt is raised. The
second raises it on the spot. While things are put away (workers ended, the lock released) the first signal waits for the end
of that, and one more ends the process at once, with the status that is documented for a stop. So it is while a module is
imported: an exception there is lost in Python's own callbacks, or ends the process in libraries' C++ (SIGABRT). Whatever the
moment, the work directory holds what was committed, and nothing half.

A signal that is ignored when the program starts (nohup, a background job of a script) stays ignored.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

from exl2ray.errors import Interrupted

EXPENDABLE = "expendable"  # begins the names of threads whose end nobody needs to wait for
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
Handler = Callable[[int, "FrameType | None"], Any]


class _Shield:
    """Whether things are being put away, and what arrived meanwhile."""

    depth = 0
    waiting = 0


class _Import:
    """Whether a signal waits for the end of an import."""

    waited_for = False


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """While inside, ``handler`` gets the signals that stop a job. Outside of the main thread it does nothing."""
    before: dict[int, Any] = {}
    try:
        for signum in SIGNALS:
            if signal.getsignal(signum) is not signal.SIG_IGN:
                before[signum] = signal.signal(signum, handler)
    except ValueError:
        pass
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def interruptible() -> contextlib.AbstractContextManager[None]:
    """While inside, each of the signals raises KeyboardInterrupt; within ``shielded`` once that is over."""
    return handled(interrupt)


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler: raises KeyboardInterrupt, at once or when things have been put away, or a module has been imported."""
    if _Shield.depth:
        _Shield.waiting += 1
        if _Shield.waiting > 1:
            leave_at_once()
    elif not _imports(frame):
        raise KeyboardInterrupt
    elif _Import.waited_for:
        leave_at_once()
    else:
        _Import.waited_for = True
        threading.Thread(target=_again_after_the_import, args=(number,), daemon=True, name=EXPENDABLE).start()


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is imported in ``frame`` or its callers, up to the function of exl2ray that wants it."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("exl2ray.") and name != __name__ and frame.f_code.co_name != "<module>":
            return False
        frame = frame.f_back
    return False


def _again_after_the_import(number: int) -> None:
    """Sends this process the signal once more when its main thread imports nothing."""
    main = threading.main_thread().ident
    while main is not None and _imports(sys._current_frames().get(main)):
        time.sleep(0.01)
    _Import.waited_for = False
    os.kill(os.getpid(), number)


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """For putting things away: a signal waits until the end, where it is raised unless an exception is under way already."""
    late = 0
    _Shield.depth += 1
    try:
        yield
    finally:
        _Shield.depth -= 1
        if not _Shield.depth:
            late, _Shield.waiting = _Shield.waiting, 0
    if late:
        raise KeyboardInterrupt


def ends_the_program() -> None:
    """From now on a signal that nobody handles ends the process with the status that is documented for a stop: one that comes
    before a command, between its parts, or while the program is leaving.
    """
    _replace(lambda number, frame: leave(Interrupted.exit_code))


_last_acts: list[Callable[[], None]] = []


def at_the_end(act: Callable[[], None]) -> None:
    """Has ``act`` done when the process ends, also where the interpreter is not waited for. It may be done twice."""
    atexit.register(act)
    _last_acts.append(act)


def leave(status: int) -> NoReturn:
    """Ends the process at once, but for what was asked for with ``at_the_end``."""
    for act in _last_acts:
        with contextlib.suppress(Exception):
            act()
    os._exit(status)


def ignore() -> None:
    """From now on the signals do nothing, also while the interpreter ends."""
    _replace(signal.SIG_IGN)


def _replace(handler: Handler | signal.Handlers) -> None:
    with contextlib.suppress(ValueError):  # not in the main thread
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, handler)


def leave_at_once() -> NoReturn:
    """Ends the process without putting anything away: files are whole at any moment, and a dead process holds no lock."""
    with contextlib.suppress(OSError):
        os.write(2, b"stopped at once, as asked for; the same command resumes the job\n")
    os._exit(Interrupted.exit_code)


def ignored() -> contextlib.AbstractContextManager[None]:
    """While inside, the signals do nothing: for the last words of a program that ends anyway."""
    return handled(lambda number, frame: None)


@contextlib.contextmanager
def kept() -> Iterator[Callable[[], None]]:
    """For calls into libraries that take the signals over: yields what puts the handlers back, and does so at the end."""
    handlers = {s: signal.getsignal(s) for s in SIGNALS}

    def put_back() -> None:
        with contextlib.suppress(ValueError):  # not in the main thread: nobody touched them
            for number, handler in handlers.items():
                if handler is not None:
                    signal.signal(number, handler)

    try:
        yield put_back
    finally:
        put_back()
