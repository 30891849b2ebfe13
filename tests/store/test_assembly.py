"""Shards filled in any order are those that are written in one go; records lead to what is in them."""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from exl2ray.errors import FormatError, StoreError
from exl2ray.formats.shards import TensorEntry, write_shards
from exl2ray.store.assembly import Assembly, linkable, neighbours, write_parts
from exl2ray.store.local import LocalStore
from exl2ray.store.records import FileRef, Record, Records, hash_inputs
from exl2ray.store.tensors import get_tensors, put_tensors

HASH, KIND = "0123456789abcdef" * 4, "quant/4.0"
DTYPES = (torch.int32, torch.int16, torch.float16)
Files = dict[str, dict[str, torch.Tensor]]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(str(tmp_path / "work"))


def made(seed: int = 0) -> Files:
    """File -> tensors, of all dtypes and odd sizes; one of them empty."""
    torch.manual_seed(seed)
    return {
        f"item{i}": {f"item{i}.{d}": torch.randint(0, 99, (5, i * 7 * d % 11), dtype=t) for d, t in enumerate(DTYPES)}
        for i in range(1, 6)
    }


def entries(files: Files) -> list[TensorEntry]:
    return [TensorEntry.of(name, t) for tensors in files.values() for name, t in tensors.items()]


def filled(store: LocalStore, files: Files, limit: int) -> tuple[Assembly, list[Record]]:
    """Committed by workers, then put into shards in another order, as the driver does it."""
    rel = {key: f"{KIND}/tensors/{key}.safetensors" for key in files}
    records = [Record(KIND, key, HASH, {}, (put_tensors(store, rel[key], files[key]),)) for key in files]
    assembly = Assembly(store, KIND, HASH, entries(files), limit)
    assembly.open()
    for i, r in random.Random(3).sample(list(enumerate(records)), len(records)):
        (file,) = r.files
        records[i] = replace(r, files=(assembly.put_file(file, get_tensors(store, file.rel, expect=file)),))
        assembly.sync()
        Records(store).commit(records[i])
        store.delete(file.rel)
    return assembly, records


@pytest.mark.parametrize("most", [1, 7, 1 << 20])
def test_parts_are_written_whole_however_little_a_call_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    calls = []

    def limited(handle: int, views: list[memoryview], offset: int) -> int:
        calls.append(len(views))
        return os.pwrite(handle, b"".join(views)[:most], offset)

    monkeypatch.setattr(os, "pwritev", limited)
    parts = [bytes([i % 251]) * (i % 5) for i in range(1500)]
    with (tmp_path / "file").open("wb+") as f:
        write_parts(f.fileno(), [memoryview(p) for p in parts], 3)
        assert (tmp_path / "file").read_bytes() == bytes(3) + b"".join(parts)
    assert max(calls) == 1024  # more than the system takes in one call


def test_files_that_cannot_be_put_into_shards(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    files = made()
    assembly = Assembly(store, KIND, HASH, entries({"item1": files["item1"]}), 0)
    assembly.open()
    ref = put_tensors(store, f"{KIND}/tensors/item2.safetensors", files["item2"])
    with pytest.raises(StoreError, match=r"item2\.safetensors: item2\.\d is no tensor of the output"):
        assembly.put_file(ref, files["item2"])

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwritev", full)
    with pytest.raises(StoreError, match="No space left on device"):
        assembly.put_file(ref, files["item1"])


def test_neighbours_are_told_from_others() -> None:
    sizes = {"a": 4, "b": 0, "c": 2, "d": 1}
    entries = {n: TensorEntry.of(n, torch.zeros(size, dtype=torch.uint8)) for n, size in sizes.items()}

    def runs(places: dict[str, tuple[str, int]]) -> list[tuple[str, int, str]]:
        found = neighbours((entries[n], *place) for n, place in places.items())
        return [(shard, begin, "".join(e.name for e in run)) for shard, begin, run in found]

    places = {"c": ("one", 14), "a": ("one", 10), "b": ("one", 14), "d": ("two", 16)}
    assert runs(places) == [("one", 10, "abc"), ("two", 16, "d")]
    assert runs({**places, "c": ("one", 15)}) == [("one", 10, "ab"), ("one", 15, "c"), ("two", 16, "d")]


@pytest.mark.parametrize("limit", [0, 100])
def test_any_order_gives_the_same_files(store: LocalStore, tmp_path: Path, limit: int) -> None:
    files = made()
    assembly, records = filled(store, files, limit)
    target = tmp_path / "out"
    target.mkdir()
    shards = assembly.link(target)
    expected = write_shards(tmp_path / "expected", entries(files), limit)
    assert [s.name for s in shards] == [s.name for s in expected]
    assert (len(shards) > 1) == (limit > 0)
    for s in shards:
        assert (target / s.name).read_bytes() == (tmp_path / "expected" / s.name).read_bytes()
        assert s.is_intact(target)
        os.utime(target / s.name, ns=(1, 1))
        assert not s.is_intact(target)  # whoever made it has to say
    files_of_all = [f for r in records for f in r.files]
    assert assembly.same(target, files_of_all)
    assert not assembly.same(target, files_of_all[1:])
    with (target / shards[-1].name).open("r+b") as f:
        f.seek(-1, 2)
        f.write(b"\xff")
    assert not assembly.same(target, files_of_all)
    assert assembly.same(target, files_of_all, files_of_all[:1])
    assert assembly.link(target)[0].name == shards[0].name  # once more: they are there
    assert not list(target.glob(".*"))
    assembly.close()


def test_records_lead_to_what_is_in_shards(store: LocalStore) -> None:
    files = made()
    assembly, committed = filled(store, files, 100)
    records = Records(store)
    for record in committed:
        found = records.find(KIND, record.key, HASH)
        assert found == record
        read = get_tensors(store, found.files[0].rel, expect=found.files[0])
        assert {n: t.tolist() for n, t in read.items()} == {n: t.tolist() for n, t in files[record.key].items()}
    assert records.scan(KIND).keys() == {(r.key, HASH) for r in committed}
    # Damage in one place, in a header, and at the end of a file.
    piece = next(p for p in committed[2].files[0].pieces if 0 not in p.shape)
    for path in (Path(store.root) / p.file for p in committed[2].files[0].pieces):
        with path.open("r+b") as f:
            f.write(b"\0" * 8)
    with (Path(store.root) / piece.file).open("r+b") as f:
        f.seek(piece.offset)
        f.write(b"\x7f")
    assert [r.key for r in committed if records.find(KIND, r.key, HASH) is None] == [committed[2].key]
    with pytest.raises(StoreError, match="SHA-256"):
        get_tensors(store, committed[2].files[0].rel, expect=committed[2].files[0])
    last = committed[-1].files[0].pieces[-1]
    os.truncate(Path(store.root) / last.file, last.offset)
    assert committed[-1].key not in {key for key, _ in records.scan(KIND)}
    assert any("go to byte" in note for note in records.notes)
    assembly.close()


def test_a_record_that_changes_while_it_is_looked_at(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that saw the record before, and then finds no file, looks again."""
    files = made()
    file = put_tensors(store, f"{KIND}/tensors/item1.safetensors", files["item1"])
    records, record = Records(store), Record(KIND, "item1", HASH, {}, (file,))
    records.commit(record)
    real, seen = records._read, []

    def read(rel: str) -> Record:
        found = real(rel)
        if not seen:
            filled(store, files, 0)[0].close()
        seen.append(rel)
        return found

    monkeypatch.setattr(records, "_read", read)
    found = records.find(KIND, "item1", HASH)
    assert found is not None
    assert found.files[0].pieces
    assert records.notes == []


def test_what_is_announced_is_what_comes(store: LocalStore) -> None:
    assembly = Assembly(store, KIND, HASH, entries(made()), 0)
    assembly.open()
    with pytest.raises(FormatError, match=r"announced as I16 \[5, 7\] and is I32"):
        assembly.put("item1.1", torch.zeros(5, 7, dtype=torch.int32))
    assembly.close()


PLACES = {
    "unknown dtype": ["a", "I31", [1], "quant/4.0/tensors/output.safetensors", 0],
    "negative offset": ["a", "I32", [1], "quant/4.0/tensors/output.safetensors", -4],
    "shape of texts": ["a", "I32", ["1"], "quant/4.0/tensors/output.safetensors", 0],
    "beyond the file": ["a", "I32", [1 << 40], "quant/4.0/tensors/output.safetensors", 0],
    "outside": ["a", "I32", [1], "../../etc/passwd", 0],
    "too few": ["a", "I32"],
}


@pytest.mark.parametrize("case", PLACES)
def test_places_that_cannot_be(case: str, store: LocalStore) -> None:
    store.put("quant/4.0/tensors/output.safetensors", b"12345678")
    file = {"rel": "quant/4.0/tensors/a.safetensors", "sha256": HASH, "size": 8, "pieces": json.dumps([PLACES[case]])}
    body = {"kind": KIND, "key": "a", "inputs_hash": HASH, "payload": {}, "files": [file], "seconds": 0.0, "worker": "",
            "created": 0.0}  # fmt: skip
    store.put(f"{KIND}/records/a.{HASH[:16]}.json", json.dumps({"record": body, "sha256": hash_inputs(record=body)}).encode())
    records = Records(store)
    if case == "beyond the file":
        assert records.find(KIND, "a", HASH) is None
        assert "go to byte" in records.notes[0]
    else:
        with pytest.raises(StoreError):
            records.find(KIND, "a", HASH)


def test_what_can_be_linked(store: LocalStore, tmp_path: Path) -> None:
    here = tmp_path / "out"
    here.mkdir()
    assert linkable(store, KIND, here) is not None
    memory = Path("/dev/shm")
    if memory.is_dir() and memory.stat().st_dev != here.stat().st_dev:
        assert linkable(store, KIND, memory) is None
    if os.geteuid() == 0:
        here.chmod(0o2775)
        os.chown(here, -1, 12345)  # files made there are of this group
        assert linkable(store, KIND, here) is None
    assert list(here.iterdir()) == []
    assert store.list() == []
    with pytest.raises(FileNotFoundError):
        os.lstat(here / "probe")


def test_a_reference_without_places_is_kept_as_it_was(store: LocalStore) -> None:
    """Records of files are read by older versions."""
    store.put("x.safetensors", b"1")
    rel = Records(store).commit(Record(KIND, "a", HASH, {}, (FileRef("x.safetensors", HASH, 1),)))
    assert b"pieces" not in store.get(rel)
