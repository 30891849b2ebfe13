"""What huggingface_hub reads from the environment when it is imported."""

from __future__ import annotations

import sys

import pytest

from exl2ray.errors import UsageError
from exl2ray.remote.hub_library import need_hub_library


@pytest.mark.parametrize("name", ["HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"])
def test_numbers_that_are_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "abc")
    with pytest.raises(UsageError, match=f"environment variable {name} is 'abc', not a number of seconds") as e:
        need_hub_library("publishing")
    assert e.value.hint == f"unset {name}"


def test_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match="publishing: huggingface_hub is not installed") as e:
        need_hub_library("publishing")
    assert "exl2ray[hub]" in str(e.value.hint)
