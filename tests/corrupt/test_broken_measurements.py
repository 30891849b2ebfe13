"""Broken and hostile measurements: each must raise its typed error, naming file and field, in time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from corrupt_helpers import expect

from exl2ray.errors import FormatError
from exl2ray.formats.measurement import read_measurement

PARAMS = {"group_size": {"4": 128}, "bits": [4], "bits_prop": [1], "scale_bits": 4}
ENTRY = "model.layers.0.mlp"


def measurement(text_of: Callable[[dict[str, Any]], object] = lambda m: m) -> bytes:
    option = {"accuracy": 0.5, "total_bits": 100, "up_proj": dict(PARAMS)}
    obj = {"measurement": {ENTRY: [option]}, "last_module_idx": 2}
    changed = text_of(obj)
    return changed if isinstance(changed, bytes) else json.dumps(changed).encode()


def option(**changes: object) -> bytes:
    def apply(m: dict[str, Any]) -> dict[str, Any]:
        m["measurement"][ENTRY][0].update(changes)
        return m

    return measurement(apply)


def params(**changes: object) -> bytes:
    return option(up_proj={**PARAMS, **changes})


def entry(key: str, value: object) -> bytes:
    return measurement(lambda m: {**m, "measurement": {key: value}})


MEASUREMENTS: dict[str, tuple[bytes, list[str]]] = {
    "empty": (b"", ["not valid JSON"]),
    "a list": (b"[]", ["list"]),
    "another file": (b'{"hidden_size": 4}', ["'measurement' is missing"]),
    "no entries": (b'{"measurement": {}, "last_module_idx": 0}', ["'measurement'"]),
    "entries a list": (b'{"measurement": [], "last_module_idx": 0}', ["'measurement'"]),
    "nested": (b'{"measurement": ' + b"[" * 100_000, ["nested"]),
    "no index": (measurement(lambda m: {"measurement": m["measurement"]}), ["last_module_idx"]),
    "index a string": (measurement(lambda m: {**m, "last_module_idx": "2"}), ["last_module_idx"]),
    "duplicate entry": (b'{"measurement": {"a.norm": null, "a.norm": null}, "last_module_idx": 0}', ["'a.norm'"]),
    "unknown mode": (entry("model.layers.0.conv", []), ["model.layers.0.conv", "mode"]),
    "no key": (entry("mlp", []), ["'mlp'"]),
    "null for a measured module": (entry(ENTRY, None), [ENTRY]),
    "options for a norm": (entry("model.norm.norm", []), ["model.norm.norm", "null"]),
    "no options": (entry(ENTRY, []), [ENTRY, "non-empty"]),
    "option a number": (entry(ENTRY, [3]), [ENTRY, "option 0"]),
    "half a parallel decoder": (entry("l.0.parallel_decoder", {"attn": []}), ["l.0.parallel_decoder", "mlp"]),
    "accuracy missing": (measurement(lambda m: json.dumps(m).replace("accuracy", "acc").encode()), [ENTRY, "accuracy"]),
    "accuracy NaN": (option(accuracy=float("nan")), ["NaN"]),
    "accuracy infinite": (measurement(lambda m: json.dumps(m).replace("0.5", "1e999").encode()), [ENTRY, "accuracy"]),
    "accuracy a string": (option(accuracy="0.5"), [ENTRY, "accuracy"]),
    "accuracy a boolean": (option(accuracy=True), [ENTRY, "accuracy"]),
    "accuracy above one": (option(accuracy=1.5), [ENTRY, "accuracy is 1.5"]),
    "accuracy negative": (option(accuracy=-0.1), [ENTRY, "accuracy"]),
    "bits negative": (option(total_bits=-5), [ENTRY, "total_bits"]),
    "bits fractional": (option(total_bits=1.5), [ENTRY, "total_bits"]),
    "parameters a list": (option(up_proj=[4]), [ENTRY, "up_proj"]),
    "parameters null": (option(up_proj=None), [ENTRY, "up_proj"]),
    "parameters empty": (option(up_proj={}), [ENTRY, "up_proj", "bits"]),
    "width seven": (params(bits=[7], group_size={"7": 32}), [ENTRY, "up_proj", "bits"]),
    "no widths": (params(bits=[], bits_prop=[]), [ENTRY, "up_proj", "bits"]),
    "width infinite": (
        measurement(lambda m: json.dumps(m).replace('"bits": [4]', '"bits": [1e999]').encode()),
        [ENTRY, "up_proj"],
    ),
    "no group size for a width": (params(bits=[5]), [ENTRY, "up_proj", "'5' is missing"]),
    "group size 0": (params(group_size={"4": 0}), [ENTRY, "up_proj", "group_size"]),
    "group size 48": (params(group_size={"4": 48}), [ENTRY, "up_proj", "group_size"]),
    "shares do not sum to 1": (params(bits_prop=[0.5]), [ENTRY, "up_proj", "bits_prop"]),
    "a share too many": (params(bits_prop=[0.5, 0.5]), [ENTRY, "up_proj", "bits_prop"]),
    "scale bits 3": (params(scale_bits=3), [ENTRY, "up_proj", "scale_bits"]),
    "options of different linears": (
        entry(ENTRY, [{"accuracy": 1, "total_bits": 1, r: PARAMS} for r in ("up_proj", "down_proj")]),
        [ENTRY, "option 1", "down_proj"],
    ),
    "extra not objects": (measurement(lambda m: {**m, "exl2ray": {ENTRY: 1}}), ["exl2ray"]),
}


@pytest.mark.parametrize("case", MEASUREMENTS)
def test_broken_measurement(tmp_path: Path, case: str) -> None:
    content, named = MEASUREMENTS[case]
    path = tmp_path / "measurement.json"
    path.write_bytes(content)
    expect(FormatError, lambda: read_measurement(path), "measurement.json", *named)


def test_absent_measurement(tmp_path: Path) -> None:
    expect(FormatError, lambda: read_measurement(tmp_path / "m.json"), "m.json", "missing")


def test_the_unbroken_one_is_accepted(tmp_path: Path) -> None:
    """The cases above fail for their defect, not for the frame around it."""
    (tmp_path / "m.json").write_bytes(measurement())
    assert read_measurement(tmp_path / "m.json")[ENTRY].options[0].accuracy == 0.5
