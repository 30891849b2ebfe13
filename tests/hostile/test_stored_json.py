"""JSON files of a work directory and of an output directory that others may have made: bounded when they are looked at."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from small_sources import write_source

from exl2ray.errors import StoreError, UnfitError, why_not_read
from exl2ray.formats.claim import CLAIM, read_claim
from exl2ray.formats.file_states import from_json
from exl2ray.store import status
from exl2ray.store.job_file import decode_job
from exl2ray.store.local import MAX_LINES_BYTES, LocalStore
from exl2ray.store.open import open_store
from exl2ray.store.records import Record, Records, hash_inputs

SPOILED: dict[str, Callable[[Path], Any]] = {
    "sparse": lambda p: (p.touch(), os.truncate(p, 6 << 30)),
    "deep": lambda p: p.write_text('{"a":' * 100_000),
    "a long number": lambda p: p.write_text('{"a":' + "9" * 100_000 + "}"),
    "of zeros": lambda p: p.write_bytes(bytes(1 << 20)),
}


@pytest.mark.parametrize("name", ["job.json", "measurement.json", "events.jsonl"])
@pytest.mark.parametrize(("command", "case"), [*(("status", case) for case in SPOILED), ("report", "sparse")])
def test_looking_at_a_work_directory_is_bounded(name: str, case: str, command: str, tmp_path: Path) -> None:
    SPOILED[case](tmp_path / name)
    run = exl2ray(command, tmp_path)
    assert run.status in (0, 7), str(run)
    assert not run.stopped, str(run)
    assert "Traceback" not in run.text


@pytest.mark.parametrize("case", SPOILED)
def test_going_on_with_a_spoiled_job_is_refused(case: str, tmp_path: Path) -> None:
    SPOILED[case](tmp_path / "job.json")
    model = write_source(tmp_path.parent / f"{tmp_path.name}-model")
    exl2ray("convert", "-i", model, "-o", tmp_path, "-b", "4", "--dry-run").ends_with(7, "job.json")


class Unreached:
    """An object store without a network, where each request is tried for 20 s."""

    is_local, root, asked = False, "s3://bucket/w", 0

    def get(self, rel: str) -> bytes:
        self.asked += 1
        raise StoreError(f"cannot read {self.root}/{rel}: NETWORK_CONNECTION")


def test_a_store_that_gives_nothing_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """status noted that there was no answer, and went on to the events."""
    store = Unreached()
    monkeypatch.setattr(status, "open_store", lambda root: store)
    with pytest.raises(StoreError, match="NETWORK_CONNECTION"):
        status.read_status(store.root)
    assert store.asked == 1


FORMS = {
    b"[]": "another form", b"{}": "is missing", b"null": "another form", b"5": "another form", b'"x"': "another form",
    b"{": "not JSON at line 1 column 2", b"": "not JSON", b'{"record": 5, "sha256": 1}': "", b"\xff{": "not UTF-8 at byte 0",
    b'{"record": {"files": "x"}, "sha256": ""}': "does not match its checksum", b"[" * 100_000: "nested too deeply",
}  # fmt: skip


@pytest.mark.parametrize("data", FORMS, ids=lambda data: data[:9].decode("latin-1"))
def test_what_is_no_job_and_no_record_is_told_in_words(data: bytes, tmp_path: Path) -> None:
    """Python's own names of its errors (KeyError, TypeError) stood there."""
    store = open_store(str(tmp_path))
    records = Records(store)
    (tmp_path / records.commit(Record("measure", "x", hash_inputs(), {}))).write_bytes(data)
    with pytest.raises(StoreError, match=FORMS[data]) as of_record:
        records.find("measure", "x", hash_inputs())
    with pytest.raises(StoreError) as of_job:
        decode_job(data, "job.json")
    for text in (str(of_record.value), str(of_job.value)):
        assert not re.search(r"[A-Z]\w+Error|indices|subscript|NoneType", text), text


def pair(values: Any) -> tuple[Any, Any]:
    first, second = values
    return first, second


OF_PYTHON: dict[str, Callable[[], Any]] = {
    "a number": lambda: int("x"),
    "a fraction": lambda: float("x"),
    "endless digits": lambda: int("1" * 10_000),
    "too few": lambda: pair([1]),
    "too many": lambda: pair([1, 2, 3]),
    "no pairs": lambda: dict([[1, 2, 3]]),
    "lists of two lengths": lambda: list(zip([1], [1, 2], strict=True)),
    "a time": lambda: datetime.fromisoformat("soon"),
    "a root": lambda: math.sqrt(-1),
    "a character": lambda: chr(-1),
    "bytes": lambda: bytes.fromhex("x"),
    "a place": lambda: [1].index(2),
    "no list": lambda: {}["x"]["y"],
    "a member": lambda: [].append_line,  # type: ignore[attr-defined]
    "a number of None": lambda: int(None),  # type: ignore[call-overload]
}


@pytest.mark.parametrize("case", OF_PYTHON)
def test_whatever_this_python_says_is_not_passed_on(case: str) -> None:
    with pytest.raises((ValueError, KeyError, TypeError, AttributeError)) as e:
        OF_PYTHON[case]()
    assert why_not_read(e.value) in ("what it holds has another form", "'x' is missing")


def test_what_the_program_says_of_a_file_is_passed_on() -> None:
    assert why_not_read(UnfitError("the place of x is not made of counts")) == "the place of x is not made of counts"
    with pytest.raises(UnfitError, match=r"no state of a file: FileState\(name=5") as e:
        from_json([{"name": 5, "size": 1, "stamp": "", "sha256": None}])
    assert "no state of a file" in why_not_read(e.value)


def test_the_end_of_a_long_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with path.open("wb") as f:
        f.truncate(1 << 40)
        f.seek(0, os.SEEK_END)
        f.write(b"\nfirst\nsecond\n")
    lines = LocalStore(str(tmp_path)).read_lines("events.jsonl")
    assert lines == ["first", "second"]
    assert path.stat().st_size > MAX_LINES_BYTES


@pytest.mark.parametrize("case", SPOILED)
def test_a_claim_that_is_none_is_no_claim(case: str, tmp_path: Path) -> None:
    SPOILED[case](tmp_path / CLAIM)
    assert read_claim(tmp_path) is None
