"""Real small file systems that fill up, run out of inodes, turn read-only or go away while a conversion runs."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from workdir_cases import Conversion, contents

from exl2ray.convert import convert
from exl2ray.driver.policy import Limits
from exl2ray.errors import StoreError
from exl2ray.events import Silent

SIZE = 8 << 20


class SmallDisk:
    """A tmpfs of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SIZE},nr_inodes=2000", "exl2ray-test", str(path)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(self.path)], check=True, capture_output=True)

    def fill(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as f:
            for size in (65536, 4096):
                with contextlib.suppress(OSError):
                    while True:
                        f.write(b"x" * size)
        assert shutil.disk_usage(self.path).free == 0

    def enlarge(self) -> None:
        self.remount(f"size={4 * SIZE}")

    def use_up_inodes(self) -> None:
        (self.path / "many").mkdir()
        with contextlib.suppress(OSError):
            for i in range(2000):
                (self.path / "many" / str(i)).touch()
        with pytest.raises(OSError, match="No space"):
            (self.path / "one more").touch()

    def more_inodes(self) -> None:
        self.remount("nr_inodes=5000")

    def read_only(self) -> None:
        self.remount("ro")

    def writable(self) -> None:
        self.remount("rw")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    if shutil.which("mount") is None:
        pytest.skip("there is no mount here")
    small = SmallDisk(tmp_path / "disk")
    yield small
    subprocess.run(["umount", "-l", str(small.path)], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write is tried again after some seconds; not in a test."""
    monkeypatch.setattr(Limits.__init__, "__defaults__", (*Limits.__init__.__defaults__[:-1], 0.01))  # type: ignore[misc]
    assert Limits().rest == 0.01


class At(Silent):
    """Does something once, at an event: its name, and for stages and items how the stage's name begins."""

    def __init__(self, moment: tuple[str, str], act: Callable[[], None]) -> None:
        super().__init__()
        self.moment, self.act, self.done = moment, act, False

    def event(self, name: str, **fields: Any) -> None:
        super().event(name, **fields)
        if not self.done and name == self.moment[0] and str(fields.get("stage", "")).startswith(self.moment[1]):
            self.done = True
            self.act()


MOMENTS = [("start", ""), ("item", "measure"), ("item", "quantize"), ("stage", "compile")]
FAULTS: list[tuple[Callable[[SmallDisk], None], Callable[[SmallDisk], None], str, str]] = [
    (SmallDisk.fill, SmallDisk.enlarge, "No space left on device", "free"),
    (SmallDisk.use_up_inodes, SmallDisk.more_inodes, "No space left on device", "free"),
    (SmallDisk.read_only, SmallDisk.writable, "Read-only file system", "read-only"),
]
faults = pytest.mark.parametrize(("harm", "help_", "words", "hint"), FAULTS, ids=["full", "inodes", "read-only"])


def fails_then_ends_with_the_same_bytes(
    made: Conversion, work: Path, target: Path, moment: tuple[str, str], harm: Callable[[], None],
    help_: Callable[[], None], words: str, hint: str,
) -> None:  # fmt: skip
    reporter = At(moment, harm)
    with pytest.raises(StoreError, match=words) as caught:
        convert(made.recipe(work, target), reporter)
    assert reporter.done
    assert caught.value.exit_code == 7
    assert hint in caught.value.hint or hint in caught.value.message
    assert not (target / "config.json").exists()
    help_()
    (work / "driver.lock").unlink(missing_ok=True)  # where it could not be; its process would be gone, which here goes on
    made.convert(work, target)
    assert contents(target) == contents(made.target)


@faults
@pytest.mark.parametrize("moment", MOMENTS[:3])
def test_the_disk_of_the_work_directory(
    moment: tuple[str, str], harm: Any, help_: Any, words: str, hint: str, made: Conversion, disk: SmallDisk, tmp_path: Path
) -> None:
    work, target = disk.path / "work", tmp_path / "out"
    fails_then_ends_with_the_same_bytes(
        made, work, target, moment, lambda: harm(disk), lambda: help_(disk), words, hint
    )


@faults
def test_the_disk_of_the_output(
    harm: Any, help_: Any, words: str, hint: str, made: Conversion, disk: SmallDisk, tmp_path: Path
) -> None:
    work, target = made.copy_of_work(tmp_path / "work"), disk.path / "out"
    fails_then_ends_with_the_same_bytes(
        made, work, target, MOMENTS[3], lambda: harm(disk), lambda: help_(disk), words if words[0] == "R" else "", hint
    )


@faults
def test_the_disk_of_a_model_that_is_replaced(
    harm: Any, help_: Any, words: str, hint: str, made: Conversion, disk: SmallDisk, tmp_path: Path
) -> None:
    """The old model stays whole, or is none; never a part of it."""
    work, target = made.copy_of_work(tmp_path / "work"), made.copy_of_target(disk.path / "out")
    with pytest.raises(StoreError) as caught:
        convert(made.recipe(work, target, bits=(5.0,)), At(MOMENTS[3], lambda: harm(disk)))
    assert hint in caught.value.hint or hint in caught.value.message
    found = {n: h for n, h in contents(target).items() if n != ".exl2ray.lock"}
    assert "config.json" not in found or found == contents(made.target)
    help_(disk)
    made.convert(work, target, bits=(5.0,))
    assert contents(target) == contents(made.target5)


def delete(folder: Path) -> None:
    """Delete a folder in which somebody may be making and deleting files: moved away, then gone through until it is gone."""
    away = folder.rename(folder.with_name(folder.name + "-deleted"))
    while away.exists():
        shutil.rmtree(away, ignore_errors=True)


@pytest.mark.parametrize("moment", MOMENTS[1:])
def test_a_work_directory_that_is_deleted(moment: tuple[str, str], made: Conversion, tmp_path: Path) -> None:
    work, target = tmp_path / "work", tmp_path / "out"
    with pytest.raises(StoreError) as caught:
        convert(made.recipe(work, target), At(moment, lambda: delete(work)))
    assert caught.value.exit_code == 7
    assert not (target / "config.json").exists()


@pytest.mark.parametrize("moment", [("stage", "measure"), *MOMENTS[2:]])
def test_an_output_that_is_deleted(moment: tuple[str, str], made: Conversion, tmp_path: Path) -> None:
    work, target = tmp_path / "work", tmp_path / "out"
    with pytest.raises(StoreError, match="was deleted") as caught:
        convert(made.recipe(work, target), At(moment, lambda: delete(target)))
    assert caught.value.exit_code == 7
    made.convert(work, target)
    assert contents(target) == contents(made.target)


def test_a_full_folder_for_temporary_files(made: Conversion, disk: SmallDisk, tmp_path: Path) -> None:
    """What is kept there (compiled kernels) only saves time."""
    disk.fill()
    command = [sys.executable, "-c", "from exl2ray.cli import main; main()"]
    arguments = made.arguments(tmp_path / "work", tmp_path / "out", "-b", "4")
    environment = {**os.environ, "TMPDIR": str(disk.path), "OMP_NUM_THREADS": "1"}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(tmp_path / "out") == contents(made.target)


def test_a_full_folder_for_the_files_of_ray(made: Conversion, disk: SmallDisk, tmp_path: Path) -> None:
    """It would wait for them for a while, and then name one of them."""
    disk.fill()
    arguments = made.arguments(tmp_path / "work", tmp_path / "out", "--executor", "ray", "--gpus", "2")
    run = exl2ray(*arguments, env={"RAY_TMPDIR": str(disk.path), "RAY_ADDRESS": ""})
    run.ends_with(7, "folder for temporary files is full", "TMPDIR")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_compiled_kernels_of_somebody_else_are_not_run(tmp_path: Path) -> None:
    """Numba unpickles what it finds in its cache."""
    prepared = tmp_path / f"exl2ray-numba-{os.getuid()}"
    prepared.mkdir()
    command = [sys.executable, "-c", "import os, exl2ray.cuda; print(os.environ['NUMBA_CACHE_DIR'])"]
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | {"TMPDIR": str(tmp_path)}

    def chosen() -> str:
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout.strip()

    assert chosen() == str(prepared)
    os.chown(prepared, 12345, 12345)
    assert chosen() != str(prepared)
    os.chown(prepared, os.getuid(), os.getgid())
    prepared.chmod(0o777)
    assert chosen() != str(prepared)
    prepared.rmdir()
    prepared.symlink_to(tmp_path)
    assert chosen() != str(prepared)
