"""Where the seconds go between the command and the first module: steps of this process, with their beginning and end.

The work directory's event log gets them as one event, "start", when the first pass begins; `scripts/start_timeline.py` shows
them. A step costs some microseconds, so it is always kept. Seconds count from the start of the process, as the system has it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def _lived() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    with suppress(OSError, ValueError, AttributeError, IndexError):
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    return 0.0


_BEGAN = time.monotonic() - _lived()
_STEPS: list[dict[str, Any]] = []


@contextmanager
def step(name: str, begin: float | None = None) -> Iterator[None]:
    """Keeps the time that the block takes. ``begin``: seconds from which it counts, where it began before the block."""
    begin = time.monotonic() - _BEGAN if begin is None else begin
    try:
        yield
    finally:
        end = time.monotonic() - _BEGAN
        beside = threading.current_thread() is not threading.main_thread()
        _STEPS.append({"step": name, "begin": round(begin, 3), "end": round(end, 3), "beside": beside})


def taken() -> dict[str, Any]:
    """``seconds`` up to now and the ``steps`` so far, by their beginning; they are forgotten. ``beside``: in a thread."""
    found, _STEPS[:] = sorted(_STEPS, key=lambda s: (s["begin"], -s["end"])), []
    return {"seconds": round(time.monotonic() - _BEGAN, 3), "steps": found}
