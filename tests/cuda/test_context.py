"""The context that is made while torch is imported: by which calls, and that nobody hears of what goes wrong."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from exl2ray.cuda import context


class Driver:
    """Answers with 0, or with the number that a call is to fail with."""

    def __init__(self, **failing: int) -> None:
        self.failing, self.calls = failing, list[str]()

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return self.failing.get(name, 0)

        return call


MADE = ["cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain"]


@pytest.mark.parametrize(
    ("failing", "calls"),
    [
        ({}, [*MADE, "cuDevicePrimaryCtxRelease_v2"]),
        ({"cuInit": 100}, MADE[:1]),
        ({"cuDeviceGet": 101}, MADE[:2]),
        ({"cuDevicePrimaryCtxRetain": 2}, MADE),
    ],
)
def test_it_is_made_once_and_let_go_of(failing: dict[str, int], calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(**failing)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: driver)
    let_go = context.begin("expendable")
    let_go()
    let_go()  # again: nothing is left
    assert driver.calls == calls


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    context.begin("expendable")()
