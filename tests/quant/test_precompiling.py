"""The process that compiles the solver's kernels: when there is one, what it may import, and that nobody depends on it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from exl2ray import beforehand
from exl2ray.quality import PLAIN, Numerics
from exl2ray.quant import precompiling, warm
from exl2ray.recipe import Recipe


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a GPU and an empty cache, whose folder is given."""
    monkeypatch.setattr(precompiling, "_has_gpu", lambda: True)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_without_a_gpu_there_is_none(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(gpu))
    assert precompiling.begin(PLAIN) is None


@pytest.mark.parametrize("older", [False, True])
def test_kernels_in_the_cache_are_not_compiled_again_unless_the_source_changed(gpu: Path, older: bool) -> None:
    found = gpu / "exl2ray" / "settle._settle-10.py312.nbi"
    found.parent.mkdir()
    found.touch()
    if older:
        os.utime(found, (1, 1))
    child = precompiling.begin(PLAIN)
    assert (child is not None) == older
    precompiling.finish(child)


def test_it_imports_nothing_of_the_current_directory(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "torch", "exl2ray"):
        (gpu / f"{name}.py").write_text("open('imported', 'w').close()")
    monkeypatch.chdir(gpu)
    child = precompiling.begin(PLAIN)
    assert child is not None
    precompiling.finish(child)
    assert child.returncode is not None
    assert not (gpu / "imported").exists()


def test_it_runs_the_solver(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without a GPU comes: to torch's refusal, and not to a mistake before it."""
    told = gpu / "told"
    boot = precompiling.BOOT.replace("; compile", f"; sys.stderr = open({str(told)!r}, 'w'); compile")
    monkeypatch.setattr(precompiling, "BOOT", boot)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    child = precompiling.begin(PLAIN)
    precompiling.finish(child)
    assert child is not None
    assert child.returncode == 1
    assert "compile_solver" in told.read_text()
    assert "CUDA" in told.read_text().splitlines()[-1]


def test_one_that_hangs_is_ended(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompiling, "BOOT", "import time; time.sleep(600)")
    monkeypatch.setattr(precompiling, "PATIENCE", 0.2)
    child = precompiling.begin(PLAIN)
    begin = time.monotonic()
    precompiling.finish(child)
    assert child is not None
    assert child.returncode == -9
    assert time.monotonic() - begin < 60


def test_it_ends_with_the_program_however_that_ends(gpu: Path) -> None:
    program = """
import exl2ray.quant.precompiling as p
from exl2ray.quality import PLAIN
from exl2ray.stopping import leave
p._has_gpu, p.BOOT = (lambda: True), "import time; time.sleep(600)"
print(p.begin(PLAIN).pid, flush=True)
leave(130)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130, done.stderr
    end = time.monotonic() + 10
    while time.monotonic() < end and _lives(int(done.stdout)):
        time.sleep(0.05)
    assert not _lives(int(done.stdout))


def _lives(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


@pytest.mark.parametrize(
    ("changes", "address", "begun"),
    [
        ({}, None, True),
        ({"device": "cpu"}, None, False),
        ({"executor": "ray"}, None, False),
        ({"gpus": 2}, None, False),  # workers of a private Ray
        ({}, "10.0.0.1:6379", False),
        ({"executor": "inline"}, "10.0.0.1:6379", True),
    ],
)
def test_only_for_a_process_that_computes_itself(
    changes: dict[str, Any], address: str | None, begun: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    monkeypatch.setattr(precompiling, "begin", lambda numerics: found.append("begun"))
    monkeypatch.setattr(precompiling, "finish", lambda child: found.append("finished"))
    monkeypatch.setattr("exl2ray.devices.pick_device", lambda recipe: torch.device("cpu"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    beforehand.begin_device(Recipe(str(tmp_path), str(tmp_path / "work"), **{"device": "cuda", **changes}))
    for thread in [t for t in threading.enumerate() if t.name.endswith("GPU")]:
        thread.join()
    warm.warm_up(torch.device("cpu"))  # takes what the thread left
    assert found[: int(begun)] == ["begun"] * begun
    assert found.count("begun") == begun
    if begun:
        assert found == ["begun", "finished"], "waited for, though the device turns out to be a CPU"


@pytest.mark.parametrize("taken", [False, True])
def test_the_solver_waits_for_it(taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """taken: the GPU takes one process at a time, and has the other one."""
    found: list[str] = []

    def forward(device: torch.device, numerics: Numerics) -> Tensor:
        found.append("forward")
        if taken and found == ["forward"]:
            raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
        return torch.zeros(1)

    monkeypatch.setattr(warm, "_run_forward", forward)
    monkeypatch.setattr(warm, "_run_solver", lambda x, numerics: found.append("solver"))
    warm._run_kernels(torch.device("cuda"), PLAIN, lambda: found.append("compiled"))
    assert found == ["forward", *(["compiled", "forward"] if taken else []), "compiled", "solver"]
