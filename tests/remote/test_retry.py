"""Waiting for a server that does not answer is not done in silence."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from exl2ray.errors import HubError
from exl2ray.remote import retry


@pytest.mark.parametrize("seconds", [0.0, 3.0])
def test_who_waits_is_told_what_for(
    seconds: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(n * seconds for n in range(100))
    monkeypatch.setattr(retry, "time", SimpleNamespace(monotonic=lambda: next(clock), sleep=lambda _: None))

    def step() -> None:
        raise retry.Passing(HubError("no answer\x1b[2J in 10 s"))

    with caplog.at_level(logging.WARNING), pytest.raises(HubError, match="no answer"):
        retry.patiently(step)
    told = [r.getMessage() for r in caplog.records]
    assert told == ([] if not seconds else [f"trying again ({n} of 6): no answer [2J in 10 s" for n in (3, 4, 5, 6)])
