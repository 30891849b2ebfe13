"""The process that compiles the solver's kernels: when there is one, what it may import, and that nobody depends on it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from exl2ray.quality import PLAIN
from exl2ray.quant import precompiling


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
