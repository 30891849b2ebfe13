"""A finished job that is run again writes nothing: no file of the output or of the work directory but its log. Nothing is
called finished whose source was exchanged meanwhile.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from workdir_cases import PLACES, Conversion, contents

from exl2ray.convert import convert
from exl2ray.errors import JobMismatchError, SourceError
from exl2ray.events import Silent

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


def test_a_measurement_that_is_a_link_of_another_name(made: Conversion, tmp_path: Path) -> None:
    """However the finished job is named again, and whether by the link, by its target or through a folder that is a link."""
    measured, work, target = tmp_path / "files" / "measured-7.json", tmp_path / "work", tmp_path / "target"
    measured.parent.mkdir()
    shutil.copy(made.work / "measurement.json", measured)
    (tmp_path / "m.json").symlink_to(measured)
    (tmp_path / "link").symlink_to(measured.parent)
    with_flags = made.arguments(work, target, "-b", "4", "-m")
    exl2ray(*with_flags, tmp_path / "m.json", seconds=60).ends_with(0)
    assert "-m measurement.json" in (target / "README.md").read_text()
    before = written(work, target)
    names = (tmp_path / "m.json", measured, tmp_path / "link" / "measured-7.json")
    for arguments in (["convert", "-o", str(work), *PLACES], *([*with_flags, name] for name in names)):
        run = exl2ray(*arguments, seconds=60)
        run.ends_with(0, "has the model already")
        assert written(work, target) == before, str(run)


SWAPPED = ("config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("swapped", SWAPPED)
@pytest.mark.parametrize("how", ["replaced", "added or deleted"])
def test_a_file_of_the_source_that_is_exchanged_meanwhile(swapped: str, how: str, made: Conversion, tmp_path: Path) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / "model"))
    file = model / swapped

    class Swapping(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "start":
                if how == "replaced" and file.exists():
                    file.write_bytes(file.read_bytes() + b"\n ")
                elif file.exists():
                    file.unlink()
                else:
                    file.write_text("{}")

    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "target"
    with pytest.raises((JobMismatchError, SourceError), match=swapped.replace(".", "\\.")):
        convert(made.recipe(work, target, in_dir=str(model)), Swapping())


def test_a_file_that_is_only_touched_is_the_same(made: Conversion, tmp_path: Path) -> None:
    model = Path(shutil.copytree(made.model, tmp_path / "model"))

    class Touching(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "start":
                os.utime(model / "config.json", ns=(1, 1))

    convert(made.recipe(made.copy_of_work(tmp_path / "work"), tmp_path / "target", in_dir=str(model)), Touching())
    assert contents(tmp_path / "target") == contents(made.target)
