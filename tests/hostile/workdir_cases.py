"""A finished conversion of a tiny model, and a victim's folder beside it: what tests of work directories and targets use."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiny_models import write_text

from exl2ray.convert import Summary, convert
from exl2ray.events import Silent
from exl2ray.recipe import Recipe

ROWS, LENGTH = 2, 128
FLAGS = ("-r", str(ROWS), "-mr", str(ROWS), "-l", str(LENGTH), "-ml", str(LENGTH), "--quality", "reference", "--reuse",
         "-ss", "1", "--device", "cpu", "--executor", "inline", "--evaluate", "never")  # fmt: skip
PLACES = ("--device", "cpu", "--executor", "inline", "--evaluate", "never")  # of a resume: the rest is in the job


@dataclass(frozen=True)
class Conversion:
    """A conversion finished at 4 bits, in two shards; its work directory has what 5 bits need, too. Copies of its folders
    are what tests change.
    """

    model: Path
    text: Path
    work: Path
    target: Path
    target5: Path  # at 5 bits

    def recipe(self, work: Path, target: Path | None, **changes: Any) -> Recipe:
        settings: dict[str, Any] = {
            "bits": (4.0,), "length": LENGTH, "measurement_length": LENGTH, "dataset_rows": ROWS,
            "measurement_rows": ROWS, "executor": "inline", "device": "cpu", "evaluate": "never",
            "quality": "reference", "cal_dataset": str(self.text), "reuse": True, "shard_size": 1,
            "compile_full": None if target is None else str(target),
        }  # fmt: skip
        return Recipe(**{"in_dir": str(self.model), "out_dir": str(work), **settings, **changes})

    def convert(self, work: Path, target: Path | None, **changes: Any) -> tuple[Summary, Silent]:
        reporter = Silent()
        return convert(self.recipe(work, target, **changes), reporter), reporter

    def arguments(self, work: Path, target: Path | None, *more: str) -> list[str]:
        """Of `convert`, as a user types them."""
        to = [] if target is None else ["-cf", str(target)]
        return ["convert", "-i", str(self.model), "-o", str(work), "-c", str(self.text), *to, *FLAGS, *more]

    def copy_of_work(self, place: Path) -> Path:
        return Path(shutil.copytree(self.work, place, symlinks=True))

    def copy_of_target(self, place: Path) -> Path:
        return Path(shutil.copytree(self.target, place, symlinks=True))


def make_conversion(root: Path, model: Path) -> Conversion:
    """Its outputs are made on another file system, where there is one, so that packed tensors stay in files of their own, as
    they do there and as older versions left them.
    """
    made = Conversion(model, write_text(root / "text.jsonl"), root / "work", root / "target", root / "target5")
    with tempfile.TemporaryDirectory(dir=elsewhere(root)) as other:
        made.convert(made.work, Path(other, "target5"), bits=(5.0,))
        made.convert(made.work, Path(other, "target"))
        for target in (made.target, made.target5):
            shutil.move(Path(other, target.name), target)
    assert len(list(made.target.glob("output-*-of-00002.safetensors"))) == 2
    return made


def elsewhere(root: Path) -> Path:
    """A folder on another file system than ``root``; ``root`` where there is none."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() and memory.stat().st_dev != root.stat().st_dev else root


class Victim:
    """Somebody's folder outside; ``unharmed`` asserts that all in it is as it was, and nothing came to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("data.txt", "notes.json", "sub.log", "deep/er/thesis.txt", "deep/x.safetensors"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("years of work\n")
        (root / "empty" / "folder").mkdir(parents=True)
        self.before = snapshot(root)

    @property
    def file(self) -> Path:
        return self.root / "data.txt"

    def unharmed(self) -> None:
        assert snapshot(self.root) == self.before


def snapshot(root: Path) -> dict[str, str]:
    """Every name below a folder, with the hash and time of files and where links lead."""
    found = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            text = os.readlink(path) if path.is_symlink() else "folder"
            if path.is_file() and not path.is_symlink():
                text = f"{hashlib.sha256(path.read_bytes()).hexdigest()} {path.stat().st_mtime_ns}"
            found[str(path.relative_to(root))] = text
    return found


def contents(root: Path) -> dict[str, str]:
    """SHA-256 of every file of a model's folder, less the claim, which names the work directory."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(root.iterdir()) if p.is_file() and p.name != ".exl2ray.json"
    }  # fmt: skip
