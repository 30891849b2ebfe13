"""Processes that compile kernels: when there are some, what they may import, and that nobody depends on them."""

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
from exl2ray.cuda import compiling
from exl2ray.quality import PLAIN, PRESETS, Numerics
from exl2ray.quant import precompiling, warm
from exl2ray.recipe import Recipe


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with a GPU and an empty cache, whose folder is given."""
    monkeypatch.setattr(precompiling, "has_gpu", lambda: True)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    return tmp_path


def test_without_a_gpu_there_is_none(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(gpu))
    assert precompiling.begin(PLAIN) == ()


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Holds the names that each process is given; on four processor cores, and none is begun."""
    found: list[list[str]] = []
    monkeypatch.setattr(precompiling, "_begun", lambda names: found.append(list(names)))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(4), raising=False)
    return found


def test_kernels_in_the_cache_are_not_compiled_again_unless_the_source_changed(gpu: Path, begun: list[list[str]]) -> None:
    places = {}
    for name in compiling.SIGNATURES:
        places[name] = gpu / "exl2ray" / f"{name}-10.py312.nbi"
        places[name].parent.mkdir(exist_ok=True)
        places[name].touch()
    precompiling.begin(PRESETS["balanced"])
    assert not begun
    os.utime(places["kernels.choose"], (1, 1))
    os.utime(places["elementwise_kernels.plus_behind"], (1, 1))
    precompiling.begin(PRESETS["balanced"])
    assert begun == [["kernels.choose"], ["elementwise_kernels.plus_behind"]]
    begun.clear()
    precompiling.begin(PLAIN)  # which has no corrected targets
    assert begun == [["kernels.choose"]]


def test_what_is_compiled(gpu: Path, begun: list[list[str]]) -> None:
    for numerics in (PLAIN, PRESETS["balanced"]):
        begun.clear()
        precompiling.begin(numerics)
        assert len(begun) == 3
        refined = "kernels.trial" in begun[1]
        assert refined == (numerics.scale_search == "feedback")
        assert sorted(n for names in begun for n in names) == sorted(compiling.needed(refined, refined))


def test_it_imports_nothing_of_the_current_directory(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("json", "torch", "exl2ray"):
        (gpu / f"{name}.py").write_text("open('imported', 'w').close()")
    monkeypatch.chdir(gpu)
    children = precompiling.begin(PLAIN)
    assert children
    precompiling.finish(children)
    assert all(child.returncode is not None for child in children)
    assert not (gpu / "imported").exists()


def test_they_compile(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as a machine without a GPU comes: to Numba's refusal, and not to a mistake before it."""
    told = gpu / "told"
    boot = precompiling.BOOT.replace("; compile", f"; sys.stderr = open({str(told)!r}, 'a'); compile")
    monkeypatch.setattr(precompiling, "BOOT", boot)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    children = precompiling.begin(PLAIN)
    precompiling.finish(children)
    assert {child.returncode for child in children} == {1}
    assert told.read_text().count("in compile_kernels") == len(children)
    assert told.read_text().count("CudaSupportError: ") == len(children)


def test_one_that_hangs_is_ended(gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompiling, "BOOT", "import time; time.sleep(600)")
    monkeypatch.setattr(precompiling, "PATIENCE", 0.2)
    children = precompiling.begin(PLAIN)
    begin = time.monotonic()
    precompiling.finish(children)
    assert {child.returncode for child in children} == {-9}
    assert time.monotonic() - begin < 60


def test_it_ends_with_the_program_however_that_ends(gpu: Path) -> None:
    program = """
import exl2ray.quant.precompiling as p
from exl2ray.quality import PLAIN
from exl2ray.stopping import leave
p.has_gpu, p.BOOT = (lambda: True), "import time; time.sleep(600)"
print(*(child.pid for child in p.begin(PLAIN)), flush=True)
leave(130)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 130, done.stderr
    end = time.monotonic() + 10
    children = [int(text) for text in done.stdout.split()]
    assert children
    while time.monotonic() < end and any(map(_lives, children)):
        time.sleep(0.05)
    assert not any(map(_lives, children))


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
    monkeypatch.setattr(precompiling, "finish", lambda children: found.append("finished"))
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
    monkeypatch.setattr(warm, "_run_solver", lambda factor, numerics: found.append("solver"))
    warm._run_kernels(torch.device("cuda"), PLAIN, lambda: found.append("compiled"))
    assert found == ["forward", *(["compiled", "forward"] if taken else []), "compiled", "solver"]
