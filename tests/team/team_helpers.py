"""What the tests of the distribution share: recipes of tiny conversions, fake sessions, workers that go wrong on purpose."""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exl2ray.recipe import Recipe
from exl2ray.team.messages import Begun, GroupBroken, Pass
from exl2ray.team.worker import Worker

BITS = (4.0,)


def recipe(model: Path, work: Path | str, **changes: Any) -> Recipe:
    """A conversion of seconds; ``gpus`` None runs in this process."""
    settings: dict[str, Any] = {
        "in_dir": str(model), "out_dir": str(work), "bits": BITS, "length": 128, "measurement_length": 128,
        "device": "cpu", "evaluate": "never", "quality": "reference", "executor": "ray" if changes.get("gpus") else "inline",
    }  # fmt: skip
    if "://" not in str(work):
        settings["compile_full"] = f"{work}-out/{{bpw}}"
    return Recipe(**{**settings, **changes})


def digests(work: Path) -> dict[str, str]:
    """SHA-256 of measurement.json and of every file of the model directories."""
    files = [work / "measurement.json", *sorted(p for p in Path(f"{work}-out").rglob("*") if p.is_file())]
    return {f.name if f.parent == work else "/".join(f.parts[-2:]): sha(f) for f in files}


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def faults(work: Path, *lines: str) -> None:
    """What is to go wrong: see FaultyWorker."""
    folder = Path(f"{work}.faults")
    folder.mkdir()
    for number, line in enumerate(lines):
        (folder / f"{line} {number}").touch()


def left(work: Path) -> list[str]:
    """Faults that have not happened."""
    return sorted(p.name for p in Path(f"{work}.faults").iterdir())


class FaultyWorker(Worker):
    """Goes wrong as the files in ``<work>.faults`` say, once for each: "<method> <module index> <what> <number>"; the method
    is that of what the worker says that it begins.

    what: kill (SIGKILL), stop (SIGSTOP), memory (MemoryError), gpu (torch.OutOfMemoryError), cuda (a CUDA error), full (disk
    full), value (ValueError), commit (SIGKILL after the item was committed), broken (GroupBroken).
    """

    def run(self, part: Pass) -> Iterator[Any]:
        begun: Begun | None = None
        for said in super().run(part):
            if begun is not None and not isinstance(said, Begun):
                self._fault(begun, "after")
            yield said
            if isinstance(said, Begun):
                begun = said
                self._fault(begun, "before")

    def _fault(self, begun: Begun, when: str) -> None:
        folder = Path(f"{self.setup.work_root}.faults")
        for path in sorted(folder.glob(f"{begun.method} {begun.index} *")):
            what = path.name.split()[2]
            if (what == "commit") == (when == "after"):
                try:
                    path.unlink()  # only one worker succeeds
                except FileNotFoundError:
                    continue
                self._go_wrong(what)

    def _go_wrong(self, what: str) -> None:
        import torch

        from exl2ray.errors import StoreError

        if what in ("kill", "commit", "stop"):
            time.sleep(0.5)  # faults come while an item is worked on: that it was begun has been heard by then
        if what in ("kill", "commit"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif what == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif what == "memory":
            raise MemoryError("cannot allocate 4 GiB")
        elif what == "gpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        elif what == "cuda":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        elif what == "full":
            raise StoreError("cannot write here: No space left on device")
        elif what == "broken":
            raise GroupBroken("said so")
        else:
            raise ValueError("a defect")


class HeldWorker(Worker):
    """Does not go on with the second MLP while ``<work>.held`` names the method that it belongs to."""

    def run(self, part: Pass) -> Iterator[Any]:
        for said in super().run(part):
            yield said
            while isinstance(said, Begun) and said.index == 4 and self._held(said.method):
                time.sleep(0.1)

    def _held(self, method: str) -> bool:
        path = Path(f"{self.setup.work_root}.held")
        return path.exists() and path.read_text() == method


WIDE = {
    "exl2ray.quant.cholesky.BLOCK": 32,
    "exl2ray.quant.hessian.FLOAT64_ROWS": 48,
    "exl2ray.quant.sharing.TOGETHER_ROWS": 48,
}  # tiny models have wide Hessians


class WideWorker(Worker):
    """Factorises Hessians in groups, as if they were wide; ``<work>.together`` tells which."""

    def __init__(self, setup: Any) -> None:
        import importlib

        import exl2ray.quant.sharing as sharing

        for name, value in WIDE.items():
            module, _, attribute = name.rpartition(".")
            setattr(importlib.import_module(module), attribute, value)
        together = sharing.factorise_together

        def noted(comm: Any, tree: Any, held: Any, owner: int, device: Any, damping: float, where: str, *more: Any) -> Any:
            with open(f"{setup.work_root}.together", "a", encoding="utf-8") as f:
                f.write(f"{where} {comm.size}\n")
            return together(comm, tree, held, owner, device, damping, where, *more)

        sharing.factorise_together = noted
        super().__init__(setup)
