"""How broken input has to be refused."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from exl2ray.errors import Exl2RayError

LIMIT_SECONDS = 10.0  # of the processor: other processes may have it


def expect(error: type[Exl2RayError], action: Callable[[], Any], *parts: str) -> None:
    """``action`` raises exactly ``error`` in time, and the message holds all ``parts``."""
    started = time.process_time()
    with pytest.raises(Exl2RayError) as e:
        action()
    seconds = time.process_time() - started
    assert type(e.value) is error
    for part in parts:
        assert part in str(e.value), str(e.value)
    assert len(str(e.value)) < 2000
    assert seconds < LIMIT_SECONDS
