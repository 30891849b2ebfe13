"""What the tests of the distribution share: recipes of tiny conversions, fake sessions, workers that go wrong on purpose."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from exl2ray.dist.faults import GroupBroken
from exl2ray.dist.items import Meeting
from exl2ray.dist.session import Lost, Outcome
from exl2ray.dist.worker import Worker
from exl2ray.recipe import Recipe

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


class FakeSession:
    """Workers that answer in random order what ``behave(worker, method, args)`` returns; exceptions count as results."""

    def __init__(self, size: int, behave: Callable[[int, str, tuple[Any, ...]], Any], seed: int = 0) -> None:
        self.size, self._behave, self._random = size, behave, random.Random(seed)
        self.calls: dict[int, tuple[str, tuple[Any, ...], int]] = {}
        self.notes: list[str] = []
        self.killed: list[int] = []
        self.asleep: set[int] = set()  # workers that do not answer

    def idle(self) -> list[int]:
        return [w for w in range(self.size) if w not in self.calls]

    def starting(self) -> int:
        return 0

    def name(self, worker: int) -> str:
        return f"fake:{worker}"

    def submit(self, worker: int, method: str, *args: Any, returns: int = 1) -> None:
        assert worker not in self.calls
        self.calls[worker] = (method, args, returns)

    def wait(self, timeout_seconds: float) -> Outcome | None:
        ready = [w for w in self.calls if w not in self.asleep]
        if not ready:
            time.sleep(0.01)
            return None
        worker = self._random.choice(ready)
        method, args, returns = self.calls.pop(worker)
        try:
            value = self._behave(worker, method, args)
        except Exception as e:
            value = e
        if isinstance(value, (Lost, Exception)):
            return Outcome(worker, value)
        return Outcome(worker, *value) if returns == 2 else Outcome(worker, value)

    def kill(self, worker: int) -> None:
        self.killed.append(worker)
        self.calls.pop(worker, None)
        self.asleep.discard(worker)

    def store_bytes(self) -> int | None:
        return None

    def meeting(self, workers: Sequence[int]) -> list[Meeting]:
        return [Meeting(("127.0.0.1", 1), rank, len(workers)) for rank in range(len(workers))]

    def log_place(self) -> str:
        return "the logs"

    def close(self) -> None:
        self.calls.clear()


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
    """Goes wrong as the files in ``<work>.faults`` say, once for each: "<method> <module index> <what> <number>"; the index
    is 0 for what is not about one module.

    what: kill (SIGKILL), stop (SIGSTOP), memory (MemoryError), gpu (torch.OutOfMemoryError), cuda (a CUDA error), full (disk
    full), value (ValueError), commit (SIGKILL after the item was committed), broken (GroupBroken).
    """

    def _fault(self, method: str, index: int, when: str) -> None:
        folder = Path(f"{self.setup.work_root}.faults")
        for path in sorted(folder.glob(f"{method} {index} *")):
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

    def _around(self, method: str, item: Any, *args: Any) -> Any:
        index = getattr(item, "index", 0)
        self._fault(method, index, "before")
        result = getattr(Worker, method)(self, item, *args)
        self._fault(method, index, "after")
        return result

    def sweep(self, item: Any) -> Any:
        return self._around("sweep", item)

    def perplexity(self, item: Any) -> Any:
        return self._around("perplexity", item)

    def enter(self, item: Any, entry: Any = None) -> Any:
        return self._around("enter", item, entry)

    def measure(self, item: Any) -> Any:
        return self._around("measure", item)

    def quantize(self, item: Any) -> Any:
        return self._around("quantize", item)

    def chain(self, item: Any) -> Any:
        return self._around("chain", item)

    def join(self, item: Any) -> Any:
        return self._around("join", item)


class Unsocial(Worker):
    """The second member of a group does not come."""

    def meet(self, meeting: Meeting) -> None:
        if meeting.rank == 1:
            raise ValueError("no")
        super().meet(meeting)


WIDE = {
    "exl2ray.quant.cholesky.BLOCK": 32,
    "exl2ray.quant.hessian.FLOAT64_ROWS": 48,
    "exl2ray.dist.owning.TOGETHER_ROWS": 48,
}  # tiny models have wide Hessians


class WideWorker(Worker):
    """Factorises Hessians in groups, as if they were wide; ``<work>.together`` tells which."""

    def __init__(self, setup: Any) -> None:
        import importlib

        import exl2ray.dist.owning as owning

        for name, value in WIDE.items():
            module, _, attribute = name.rpartition(".")
            setattr(importlib.import_module(module), attribute, value)
        together = owning.factorise_together

        def noted(comm: Any, tree: Any, held: Any, owner: int, device: Any, damping: float, where: str, *more: Any) -> Any:
            with open(f"{setup.work_root}.together", "a", encoding="utf-8") as f:
                f.write(f"{where} {comm.size}\n")
            return together(comm, tree, held, owner, device, damping, where, *more)

        owning.factorise_together = noted
        super().__init__(setup)
