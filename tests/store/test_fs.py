"""Stores: the same behaviour on a directory and on object stores."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from exl2ray.beneath import existing_parent
from exl2ray.errors import StoreError
from exl2ray.store.faults import MissingFileError
from exl2ray.store.fs import TEMP_NAME, TEMP_PREFIX, Store, check_name, temp_name
from exl2ray.store.local import LocalStore
from exl2ray.store.open import open_store


def test_put_get_size_exists_delete(store: Store) -> None:
    store.put("a/b/c.bin", b"first")
    store.put("a/b/c.bin", memoryview(b"second!"))
    assert store.get("a/b/c.bin") == b"second!"
    assert store.size("a/b/c.bin") == 7
    assert store.exists("a/b/c.bin")
    assert not store.exists("a/b")
    assert not store.exists("a/b/d.bin")
    assert store.sha256("a/b/c.bin") == hashlib.sha256(b"second!").hexdigest()
    store.put("empty", b"")
    assert store.get("empty") == b""
    store.delete("a/b/c.bin")
    store.delete("a/b/c.bin")
    assert not store.exists("a/b/c.bin")


def test_missing_files_are_typed_errors_naming_the_file(store: Store) -> None:
    store.put("there", b"x")
    for access in (store.get, store.size, store.mtime, store.sha256, store.reader):
        with pytest.raises(MissingFileError, match="not/there") as caught:
            access("not/there")
        assert store.root in caught.value.message


def test_list_is_recursive_sorted_and_without_temporary_files(store: Store) -> None:
    assert store.list() == []
    assert store.entries() == []
    for name in ("b/2.json", "b/1.json", "b/deep/er/3", "a.json", "bb/4"):
        store.put(name, b"x")
    store.put(f"b/{temp_name()}", b"torn")
    assert store.list("b") == ["b/1.json", "b/2.json", "b/deep/er/3"]
    assert store.list() == ["a.json", "b/1.json", "b/2.json", "b/deep/er/3", "bb/4"]
    assert store.list("none") == []
    assert store.entries() == ["a.json", "b", "bb"]


def test_large_and_empty_files(store: Store) -> None:
    data = os.urandom(12 << 20)  # on S3 more than one part
    store.put_parts("big/file.bin", [data[: 5 << 20], b"", data[5 << 20 :]])
    store.put("big/empty.bin", b"")
    assert store.size("big/empty.bin") == 0
    assert store.get("big/file.bin") == data
    assert (store.local_path("big/file.bin") is not None) is store.is_local


def test_pickled_store_reopens_the_same_place(store: Store) -> None:
    store.put("x", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.root == store.root
    assert copy.get("x") == b"1"


def test_log_lines(store: Store) -> None:
    assert store.read_lines("events.jsonl") == []
    for i in range(450):  # more than two batches of an object store
        store.append_line("events.jsonl", f'{{"n": {i}}}')
    store.flush()
    store.append_line("events.jsonl", "last")
    store.flush()
    assert store.read_lines("events.jsonl") == [f'{{"n": {i}}}' for i in range(450)] + ["last"]
    if not store.is_local:
        assert len(store.list("events")) == 4


def test_clock_is_the_time_of_new_files_and_leaves_nothing(store: Store) -> None:
    store.put("x", b"1")
    assert 0 <= store.clock() - store.mtime("x") < 30
    assert store.entries() == ["x"]


@pytest.mark.parametrize("name", ["", "/etc/passwd", "a/../b", "..", "a//b", "./a", "a\\b", "a/", "a\0b"])
def test_names_outside_the_root_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a name inside"):
        check_name(name)
    with pytest.raises(StoreError, match="not a name inside"):
        LocalStore(str(tmp_path)).put(name, b"x")


@pytest.mark.parametrize("bad", ["", "ftp://host/x", "s3://", "s3:///x", "s3://b/x?y=1"])
def test_bad_roots_are_refused(bad: str) -> None:
    with pytest.raises(StoreError):
        open_store(bad)


def test_missing_bucket_is_a_typed_error(s3_bucket: str) -> None:
    store = open_store("s3://no-such-bucket-here/x")
    with pytest.raises(StoreError, match=r"s3://no-such-bucket-here/x/a") as caught:
        store.put("a", b"1")
    assert "bucket" in caught.value.hint


def test_root_is_absolute_and_file_urls_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_store("work").root == str(tmp_path / "work")
    assert open_store(f"file://{tmp_path}/work").root == str(tmp_path / "work")


def test_full_disk_leaves_old_content_and_no_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))
    store.put("record", b"old")
    written = []

    def full_after_some(fd: int, data: memoryview) -> int:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(os.pwrite(fd, bytes(data[:10]), 0))
        return written[0]

    monkeypatch.setattr(os, "write", full_after_some)
    with pytest.raises(StoreError, match="No space left") as caught:
        store.put("record", b"n" * 1000)
    monkeypatch.undo()
    assert written == [10]
    assert "free some space" in caught.value.hint
    assert str(tmp_path / "record") in caught.value.message
    assert store.get("record") == b"old"
    assert os.listdir(tmp_path) == ["record"]


def test_failing_fsync_is_an_error_not_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(str(tmp_path))

    def bad_disk(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", bad_disk)
    with pytest.raises(StoreError, match="I/O error"):
        store.put("record", b"new")
    assert os.listdir(tmp_path) == []


def test_file_size_limit_is_a_typed_error(tmp_path: Path) -> None:
    code = """
import resource, sys
from exl2ray.beneath import existing_parent
from exl2ray.errors import StoreError
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
store = open_store(sys.argv[1])
store.put("small", b"x" * 1000)
try:
    store.put("large", b"x" * 1_000_000)
except StoreError as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "File too large" in done.stdout
    assert "ulimit" in done.stdout
    assert os.listdir(tmp_path) == ["small"]


def test_unwritable_directory_is_a_typed_error() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        as_root = os.geteuid() == 0
        if as_root:
            os.seteuid(65534)  # root may write anywhere
        try:
            with pytest.raises(StoreError, match="Permission denied") as caught:
                LocalStore(name).put("x", b"1")
        finally:
            if as_root:
                os.seteuid(0)
        assert "another one with -o" in caught.value.hint
        os.chmod(name, 0o755)


def test_file_in_place_of_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="file/work"):
        LocalStore(str(tmp_path / "file" / "work")).put("x", b"1")
    with pytest.raises(StoreError, match="file"):
        LocalStore(str(tmp_path / "file")).put("x", b"1")


def test_sweep_removes_our_temporary_files_only(store: Store) -> None:
    ours = [temp_name(), f"measure/records/{temp_name()}"] if store.is_local else [temp_name()]
    kept = [".tmp-somebody", f"{TEMP_PREFIX}x", "measure/records/a.json", f"foreign/{temp_name()}"]
    for name in ours + kept:
        store.put(name, b"x")
    assert sorted(store.sweep(["measure", "quant"])) == sorted(ours)
    assert all(store.exists(name) for name in kept)
    assert not any(store.exists(name) for name in ours)
    assert TEMP_NAME.fullmatch(temp_name())


def test_files_get_the_usual_mode(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        LocalStore(str(tmp_path)).put("x", b"1")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_opening_a_work_directory_loads_nothing_heavy() -> None:
    heavy = "('torch', 'ray', 'pyarrow', 'numpy')"
    code = f"import sys, exl2ray.store.workdir; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_nearest_directory_that_may_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a directory that this user may not enter counts as not there, and is no error of its own."""
    seen = os.stat

    def stat(path, *more, **named):
        if str(path).startswith(f"{tmp_path}/"):
            raise PermissionError(13, "Permission denied", str(path))
        return seen(path, *more, **named)

    monkeypatch.setattr(os, "stat", stat)
    assert existing_parent(tmp_path / "a" / "b") == tmp_path
