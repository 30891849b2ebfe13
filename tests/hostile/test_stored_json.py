"""JSON files of a work directory and of an output directory that others may have made: bounded when they are looked at."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from small_sources import write_source

from exl2ray.formats.claim import CLAIM, read_claim
from exl2ray.store.local import MAX_LINES_BYTES, LocalStore

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
