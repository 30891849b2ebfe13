"""Waiting for a server that does not answer is not done in silence."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from exl2ray.errors import HubError, SourceError
from exl2ray.remote import retry
from exl2ray.remote.address import Address
from exl2ray.remote.block_cache import Blocks
from exl2ray.remote.objects import Bucket


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


class Clock(SimpleNamespace):
    """Time that passes while somebody sleeps, and in attempts."""

    def __init__(self, attempt_seconds: float) -> None:
        super().__init__(now=0.0, attempts=0, attempt_seconds=attempt_seconds, monotonic=lambda: self.now)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def attempt(self, **kind: bool) -> None:
        self.attempts += 1
        self.now += self.attempt_seconds
        raise retry.Passing(SourceError("no answer"), **kind)


@pytest.mark.parametrize(
    ("attempt_seconds", "unreached", "asked", "attempts", "most"),
    [
        (0.0, True, None, 5, 10.0),  # no route: at once
        (1.0, True, None, 4, 9.0),  # no name: after a second, and another one
        (8.0, True, None, 1, 9.0),  # packets are dropped
        (1.0, False, None, 6, 30.0),  # busy: a server that answers
        (60.0, False, None, 6, 400.0),  # slow
        (1.0, True, "8", 8, 90.0),  # who asked for more has it
    ],
)
def test_a_place_that_is_not_reached_is_given_up_early_at_the_first_look(
    attempt_seconds: float, unreached: bool, asked: str | None, attempts: int, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(attempt_seconds)
    monkeypatch.setattr(retry, "time", clock)
    monkeypatch.delenv("EXL2RAY_SOURCE_ATTEMPTS", raising=False)
    if asked is not None:
        monkeypatch.setenv("EXL2RAY_SOURCE_ATTEMPTS", asked)
    with pytest.raises(SourceError, match="no answer"):
        retry.patiently(lambda: clock.attempt(unreached=unreached), first_look=True)
    assert clock.attempts == attempts
    assert clock.now < most
    before, clock.attempts = clock.now, 0
    with pytest.raises(SourceError, match="no answer"):
        retry.patiently(lambda: clock.attempt(unreached=unreached))
    assert clock.attempts == max(6, attempts), "later, an hour of work may be waiting"
    assert clock.now > before + 12


def test_sdks_say_that_a_place_was_not_reached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By names of their kinds of errors: S3 at a port where nobody listens; as GCS has it without a network."""
    for name, value in {"ENDPOINT_URL": "http://127.0.0.1:9", "ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    bucket = Bucket(Address("s3", "models", "a"), Blocks(tmp_path, 1))
    with pytest.raises(retry.Passing) as e:
        bucket._look()
    assert e.value.unreached
    for text, unreached in (
        ("google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of Could not create", True),
        ("AWS Error SLOW_DOWN during ListObjectsV2 operation: Please reduce your request rate", False),
        ("AWS Error UNKNOWN (HTTP status 503) during HeadObject operation: No response body.", False),
    ):
        with pytest.raises(retry.Passing) as e, bucket._typed(""):
            raise OSError(text)
        assert e.value.unreached == unreached
