"""What records say of files, with values of other types: told as something else than a result, never used."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from exl2ray.errors import UnfitError
from exl2ray.formats.file_states import FileState, from_json
from exl2ray.formats.shards import Shard

SHARD, STATE = Shard("output.safetensors", 5, "ab", 7), FileState("model.safetensors", 5, "7", None)
WRONG: list[Any] = [[1], {"a": 1}, 1.5, None, b"x"]


@pytest.mark.parametrize("name", asdict(SHARD))
@pytest.mark.parametrize("value", WRONG)
def test_shards(name: str, value: Any) -> None:
    assert Shard.parse(asdict(SHARD)) == SHARD
    with pytest.raises(TypeError):
        Shard.parse({**asdict(SHARD), name: value})


@pytest.mark.parametrize("name", asdict(STATE))
@pytest.mark.parametrize("value", WRONG)
def test_states(name: str, value: Any) -> None:
    assert from_json([asdict(STATE)]) == (STATE,)
    if name == "sha256" and value is None:
        return
    with pytest.raises(UnfitError):
        from_json([{**asdict(STATE), name: value}])


@pytest.mark.parametrize("value", [None, 3, "x", [1], {"name": "x"}, {"other": 1}])
def test_what_is_no_mapping_of_the_right_names(value: Any) -> None:
    with pytest.raises(TypeError):
        Shard.parse(value)
    with pytest.raises(TypeError):
        from_json([value])
