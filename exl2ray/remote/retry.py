"""Trying again what a network or a server failed to do."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
ATTEMPTS = 6  # with the waits between them: rides out half a minute
FIRST_SECONDS, LONGEST_SECONDS = 0.5, 60.0
SILENT_SECONDS = 5.0  # after which whoever waits is told what for


class Passing(Exception):
    """A failure that may pass. seconds: to wait for, where the server says so. error: to be raised in the end."""

    def __init__(self, error: Exception, seconds: float | None = None) -> None:
        super().__init__(str(error))
        self.error, self.seconds = error, seconds


def attempts() -> int:
    """$EXL2RAY_SOURCE_ATTEMPTS, or ATTEMPTS."""
    text = os.environ.get("EXL2RAY_SOURCE_ATTEMPTS", "")
    return max(1, int(text)) if text.isdecimal() and len(text) < 6 else ATTEMPTS


def patiently(step: Callable[[], T]) -> T:
    """The result of ``step``, which raises `Passing` for what is worth another attempt; else what that holds is raised."""
    count, begin = attempts(), time.monotonic()
    for attempt in range(count):
        try:
            return step()
        except Passing as e:
            if attempt + 1 == count:
                raise e.error from None
            if time.monotonic() - begin > SILENT_SECONDS:
                why = "".join(c if c.isprintable() else " " for c in str(e.error))[:200]
                logging.getLogger(__name__).warning("trying again (%d of %d): %s", attempt + 2, count, why)
            wait = FIRST_SECONDS * 2**attempt if e.seconds is None else e.seconds
            time.sleep(min(wait, LONGEST_SECONDS) * random.uniform(0.8, 1.2))
    raise AssertionError("the last attempt returns or raises")
