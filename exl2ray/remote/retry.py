"""Trying again what a network or a server failed to do."""

from __future__ import annotations

import logging
import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
ASKED = "EXL2RAY_SOURCE_ATTEMPTS"
ATTEMPTS = 6  # with the waits between them: rides out half a minute
FIRST_SECONDS, LONGEST_SECONDS = 0.5, 60.0
SILENT_SECONDS = 5.0  # after which whoever waits is told what for
UNREACHED_SECONDS = 5.0  # after which a place that was never reached is not tried again: most often there is no network


class Passing(Exception):
    """A failure that may pass. seconds: to wait for, where the server says so. error: to be raised in the end. unreached: no
    server has answered."""

    def __init__(self, error: Exception, seconds: float | None = None, unreached: bool = False) -> None:
        super().__init__(str(error))
        self.error, self.seconds, self.unreached = error, seconds, unreached


def attempts() -> int:
    """$EXL2RAY_SOURCE_ATTEMPTS, or ATTEMPTS."""
    text = os.environ.get(ASKED, "")
    return max(1, int(text)) if text.isdecimal() and len(text) < 6 else ATTEMPTS


def patiently(step: Callable[[], T], first_look: bool = False) -> T:
    """The result of ``step``, which raises `Passing` for what is worth another attempt; else what that holds is raised.

    first_look: nothing has been computed, and somebody may be waiting for the message: a place that is not reached is given
    up early, unless $EXL2RAY_SOURCE_ATTEMPTS says how often it is to be tried. A server that is slow, or busy, is not.
    """
    count, begin = attempts(), time.monotonic()
    early = first_look and ASKED not in os.environ
    for attempt in range(count):
        try:
            return step()
        except Passing as e:
            waited = time.monotonic() - begin
            if attempt + 1 == count or (early and e.unreached and waited > UNREACHED_SECONDS):
                raise e.error from None
            if waited > SILENT_SECONDS:
                why = "".join(c if c.isprintable() else " " for c in str(e.error))[:200]
                logging.getLogger(__name__).warning("trying again (%d of %d): %s", attempt + 2, count, why)
            wait = FIRST_SECONDS * 2**attempt if e.seconds is None else e.seconds
            time.sleep(min(wait, LONGEST_SECONDS) * random.uniform(0.8, 1.2))
    raise AssertionError("the last attempt returns or raises")
