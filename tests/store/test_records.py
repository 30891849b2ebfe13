"""Records: canonical JSON, names, commits, and what becomes of damaged ones."""

from __future__ import annotations

import dataclasses
import enum
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.errors import StoreError
from exl2ray.store.fs import Store, check_name
from exl2ray.store.local import LocalStore
from exl2ray.store.records import FileRef, Record, Records, canonical_json, hash_inputs, item_file, item_name

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1) | st.text("aé/.", min_size=100)
HASH = hash_inputs(rows=16)


@settings(max_examples=60, deadline=None)
@given(JSON_VALUES)
def test_canonical_json_round_trips_and_is_a_fixed_point(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(), st.integers(), min_size=2, max_size=6))
def test_order_of_keys_does_not_matter(value: dict[str, int]) -> None:
    assert canonical_json(dict(reversed(list(value.items())))) == canonical_json(value)


def test_canonical_json_examples() -> None:
    assert canonical_json({"b": (1, 2.5), "a": None}) == b'{"a":null,"b":[1,2.5]}'
    assert canonical_json(0.1) == b"0.1"
    assert canonical_json(np.float64(0.1)) == b"0.1"
    assert canonical_json(4) != canonical_json(4.0)
    assert hash_inputs(a=1, b=2) == hash_inputs(b=2, a=1)
    assert hash_inputs(a=1) != hash_inputs(a=True)


class Colour(enum.IntEnum):
    RED = 1


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), Path("x"), {1: 2}, {None: 2}, b"x", {1, 2}, np.float32(1), np.int64(1), Colour.RED],
)
def test_values_without_a_canonical_text_are_refused(value: Any) -> None:
    with pytest.raises(StoreError, match=r"value\.deep\[0\]"):
        canonical_json({"deep": [value]})


@settings(max_examples=80, deadline=None)
@given(st.lists(KEYS, min_size=2, max_size=2, unique=True))
def test_item_names_are_file_names_and_tell_keys_apart(keys: list[str]) -> None:
    names = [item_name(k, HASH) for k in keys]
    assert names[0] != names[1]
    for name in names:
        assert check_name(name) == name
        assert "/" not in name
        assert not name.startswith(".")
        assert len(f"{name}.safetensors".encode()) <= 255
        assert name.endswith("." + HASH[:16])


def test_ordinary_keys_stay_readable() -> None:
    assert item_name("model.layers.3.self_attn", "0123456789abcdef" * 4) == "model.layers.3.self_attn.0123456789abcdef"
    assert item_file("quant/4.0", "tensors", "lm_head", "f" * 64) == f"quant/4.0/tensors/lm_head.{'f' * 16}.safetensors"
    with pytest.raises(StoreError, match="inputs hash"):
        item_name("lm_head", "XYZ")


def commit_item(store: Store, key: str, inputs_hash: str = HASH, kind: str = "measure") -> Record:
    rel = item_file(kind, "states", key, inputs_hash)
    data = f"states of {key}".encode()
    store.put(rel, data)
    ref = FileRef(rel, store.sha256(rel), len(data))
    record = Record(kind, key, inputs_hash, {"error": 0.1, "shape": [1, 2]}, (ref,), seconds=1.5)
    Records(store).commit(record)
    return record


def test_commit_find_scan(store: Store) -> None:
    a = commit_item(store, "model.layers.0.mlp")
    b = commit_item(store, "model.layers.0.mlp", hash_inputs(rows=32))  # other settings, side by side
    c = commit_item(store, "lm_head", kind="quant/4.0")
    records = pickle.loads(pickle.dumps(Records(store)))
    assert records.find("measure", "model.layers.0.mlp", HASH) == a
    assert records.find("measure", "model.layers.0.mlp", hash_inputs(rows=64)) is None
    assert records.find("measure", "lm_head", HASH) is None
    assert records.scan("measure") == {(r.key, r.inputs_hash): r for r in (a, b)}
    assert records.scan("quant/4.0") == {("lm_head", HASH): c}
    assert records.scan("quant/5.0") == {}
    assert records.notes == []
    assert a.worker.rpartition(":")[2].isdigit()


def test_scans_of_a_prefix_read_nothing_else_and_hash_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))
    for key in ("states-3", "states-12-0", "model.layers.0.mlp", "state"):
        commit_item(store, key)
    read: list[str] = []
    get = store.get
    monkeypatch.setattr(store, "get", lambda rel: read.append(rel) or get(rel))
    monkeypatch.setattr(store, "sha256", lambda rel: pytest.fail(f"{rel} was hashed"))
    assert {key for key, _ in Records(store).scan("measure", "states-")} == {"states-3", "states-12-0"}
    assert len(read) == 2


def test_a_record_removed_while_others_scan_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))
    kept, gone = commit_item(store, "states-3"), commit_item(store, "states-2")
    names = store.list("measure/records")
    Records(store).remove(gone)
    monkeypatch.setattr(store, "list", lambda prefix="": names)
    assert list(Records(store).scan("measure").values()) == [kept]


def test_committing_again_replaces_the_record(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    record = commit_item(store, "lm_head")
    again = dataclasses.replace(record, seconds=9.0)
    Records(store).commit(again)
    assert Records(store).scan("measure") == {("lm_head", HASH): again}


def test_a_record_cannot_be_committed_before_its_files(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    missing = Record("measure", "lm_head", HASH, {}, (FileRef("measure/states/x.safetensors", "0" * 64, 3),))
    with pytest.raises(StoreError, match=r"x\.safetensors"):
        Records(store).commit(missing)
    store.put("measure/states/x.safetensors", b"four")
    with pytest.raises(StoreError, match=r"the record of lm_head: .* has 4 bytes instead of 3"):
        Records(store).commit(missing)
    assert store.list("measure/records") == []


def test_nan_is_not_recorded(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="finite"):
        Records(LocalStore(str(tmp_path))).commit(Record("measure", "lm_head", HASH, {"error": float("nan")}))


@pytest.mark.parametrize("damage", ["truncated", "removed", "flipped"])
def test_damaged_files_make_the_record_absent_and_are_reported(tmp_path: Path, damage: str) -> None:
    store = LocalStore(str(tmp_path))
    good = commit_item(store, "model.norm")
    ref = commit_item(store, "lm_head").files[0]
    path = tmp_path / ref.rel
    data = path.read_bytes()
    if damage == "truncated":
        path.write_bytes(data[:-1])
    elif damage == "removed":
        path.unlink()
    else:
        path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    records = Records(store)
    assert records.find("measure", "lm_head", HASH) is None
    assert records.find("measure", "model.norm", HASH) == good
    seen = {key for key, _ in records.scan("measure")}  # sizes only
    assert seen == ({"model.norm", "lm_head"} if damage == "flipped" else {"model.norm"})
    assert len(records.notes) == 1
    assert ref.rel in records.notes[0]
    assert "computed again" in records.notes[0]
    commit_item(store, "lm_head")
    assert len(Records(store).scan("measure")) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: d[: len(d) // 2],
        lambda d: d.replace(b"0.1", b"0.2"),
        lambda d: d.replace(b'"seconds"', b'"second"'),
        lambda d: b"[" * 100_000,
        lambda d: b"[1, 2]",
        lambda d: b'{"record": [], "sha256": ""}',
        lambda d: b"\xff\xfe\x00",
    ],
)
def test_corrupted_record_is_an_error_naming_the_file(tmp_path: Path, damage: Any) -> None:
    store = LocalStore(str(tmp_path))
    commit_item(store, "lm_head")
    rel = store.list("measure/records")[0]
    (tmp_path / rel).write_bytes(damage(store.get(rel)))
    for look in (lambda r: r.find("measure", "lm_head", HASH), lambda r: r.scan("measure")):
        with pytest.raises(StoreError, match="lm_head") as caught:
            look(Records(store))
        assert str(tmp_path / rel) in caught.value.message
        assert "delete this file" in caught.value.hint


def test_record_under_another_name_is_not_used(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    commit_item(store, "lm_head")
    rel = store.list("measure/records")[0]
    store.put(rel.replace("lm_head", "model.norm"), store.get(rel))
    records = Records(store)
    assert records.find("measure", "model.norm", HASH) is None
    assert "not used" in records.notes[0]
