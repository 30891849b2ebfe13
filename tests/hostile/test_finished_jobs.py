"""A finished job that is run again writes nothing: no file of the output or of the work directory but its log."""

from __future__ import annotations

import os
from pathlib import Path

from bounded import exl2ray
from workdir_cases import PLACES, Conversion

LOGS = ("events.jsonl", "driver.lock")


def written(*roots: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of the last change of every file, and of every folder of which names came and went."""
    found = {}
    for root in roots:
        for folder, _, files in os.walk(root):
            for path in (Path(folder, name) for name in files if name not in LOGS):
                found[str(path)] = (path.lstat().st_ino, path.lstat().st_mtime_ns)
    return found


def test_a_finished_job_writes_nothing_however_it_is_named(made: Conversion, tmp_path: Path) -> None:
    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "target"
    with_flags = [*made.arguments(work, target), "-b", "4"]
    exl2ray(*with_flags, seconds=60).ends_with(0)
    before = written(work, target)
    for arguments in (["convert", "-o", str(work), *PLACES], with_flags, ["convert", "-o", str(work), "-hb", "6", *PLACES]):
        run = exl2ray(*arguments, seconds=60)
        run.ends_with(0, "has the model already")
        assert written(work, target) == before, str(run)
