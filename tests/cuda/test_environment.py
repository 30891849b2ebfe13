"""Variables that libraries read when they are loaded: one that makes no sense is named before anything is computed."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import cast

import pytest

from exl2ray.cuda.backend import Workspace
from exl2ray.cuda.cpu import CpuGroups
from exl2ray.environment import check_environment, slow_variables
from exl2ray.errors import UsageError

WRONG = [
    ("NUMBA_NUM_THREADS", "abc"), ("NUMBA_NUM_THREADS", "0"), ("NUMBA_NUM_THREADS", "-3"), ("NUMBA_NUM_THREADS", "2.5"),
    ("OMP_NUM_THREADS", "abc"), ("OMP_NUM_THREADS", "2,x"), ("NUMBA_THREADING_LAYER", "abc"),
]  # fmt: skip
RIGHT = [
    ("NUMBA_NUM_THREADS", "2"), ("NUMBA_NUM_THREADS", ""), ("NUMBA_NUM_THREADS", " 08 "), ("OMP_NUM_THREADS", "4, 2"),
    ("OMP_NUM_THREADS", "0"), ("NUMBA_THREADING_LAYER", "omp"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_what_makes_no_sense_is_named(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=f"environment variable {name} is '{value}'") as e:
        check_environment()
    assert e.value.hint == f"unset {name}"


@pytest.mark.parametrize(("name", "value"), RIGHT)
def test_what_makes_sense_is_taken(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    check_environment()


@pytest.mark.parametrize("name", ["NUMBA_DISABLE_JIT", "NUMBA_ENABLE_CUDASIM", "CUDA_LAUNCH_BLOCKING"])
@pytest.mark.parametrize(("value", "slow"), [("1", True), (" 2", True), ("0", False), ("", False), ("no", False)])
def test_what_makes_it_crawl(monkeypatch: pytest.MonkeyPatch, name: str, value: str, slow: bool) -> None:
    for other in ("NUMBA_DISABLE_JIT", "NUMBA_ENABLE_CUDASIM", "CUDA_LAUNCH_BLOCKING"):
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setenv(name, value)
    assert list(slow_variables()) == [name] * slow


def test_whatever_loads_a_kernel_first() -> None:
    code = "from exl2ray.cuda import cpu"
    env = {**os.environ, "NUMBA_NUM_THREADS": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert "UsageError: environment variable NUMBA_NUM_THREADS is '0', not a number of threads" in done.stderr


def test_a_layer_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(count: int) -> None:
        raise ValueError("No threading layer could be loaded.")

    monkeypatch.setenv("NUMBA_THREADING_LAYER", "tbb")
    monkeypatch.setattr("numba.set_num_threads", refuse)
    with pytest.raises(UsageError, match="environment variable NUMBA_THREADING_LAYER is 'tbb': No threading layer"):
        CpuGroups(cast(Workspace, None))
