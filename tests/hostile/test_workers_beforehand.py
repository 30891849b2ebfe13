"""A private Ray is begun while a job is looked at: a refusal is the one that is seen without it, and leaves nothing; where no
workers will be needed, none are begun.

That one was begun is read from the time of the folder in which Ray's files lie, which no other test uses.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from bounded import Run, exl2ray
from workdir_cases import Conversion, contents


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for Ray's sockets; as it was an hour ago."""
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as folder:
        os.utime(folder, ns=(0, 0))
        yield Path(folder)


def ray_began(short: Path) -> bool:
    return short.stat().st_mtime_ns > 0


def left_of(short: Path) -> list[str]:
    """Processes that speak of the folder, and files in it."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if str(short) in line] + [str(p) for p in short.rglob("*")]


def run(made: Conversion, work: Path, target: Path, short: Path, *more: str, executor: str = "ray") -> Run:
    env = {"RAY_TMPDIR": str(short), "RAY_ADDRESS": ""}
    return exl2ray(*made.arguments(work, target), *more, "--executor", executor, env=env)


def test_a_check_that_refuses_a_job_says_what_it_said(made: Conversion, tmp_path: Path, short: Path) -> None:
    places = tmp_path / "work", tmp_path / "target", short
    alone = run(made, *places, "-b", "4", "--set", "nothing=4", executor="inline")
    assert not ray_began(short)
    beside = run(made, *places, "-b", "4", "--set", "nothing=4")
    assert ray_began(short), "nothing was begun, so nothing was tried"
    assert (beside.status, beside.out, beside.err) == (alone.status, alone.out, alone.err)
    assert beside.status != 0
    assert left_of(short) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["dry run", "finished job", "another's folder"])
def test_nothing_is_begun_where_no_workers_will_be_needed(what: str, made: Conversion, tmp_path: Path, short: Path) -> None:
    work, target = tmp_path / "work", tmp_path / "target"
    if what == "dry run":
        run(made, work, target, short, "-b", "4", "--dry-run").ends_with(0)
    elif what == "finished job":
        made.copy_of_work(work)
        run(made, work, target, short, "-b", "4").ends_with(0)
        assert contents(target) == contents(made.target)
    else:
        target.mkdir()
        (target / "model.safetensors").touch()
        run(made, work, target, short, "-b", "4").ends_with(7, "model.safetensors")
    assert not ray_began(short)
