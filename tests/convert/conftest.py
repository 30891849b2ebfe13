"""A tiny model and one quiet conversion of it, which most tests compare with."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from convert_helpers import Quiet, run
from tiny_models import write_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def quiet(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Quiet:
    root = tmp_path_factory.mktemp("quiet")
    summary, reporter = run(llama, root / "work", bits=(4.0, 5.0), compile_full=str(root / "out-{bpw}"))
    outputs = {bits: root / f"out-{bits}" for bits in (4.0, 5.0)}
    return Quiet(llama, root / "work", outputs, summary, reporter)


@pytest.fixture
def finished(quiet: Quiet, tmp_path: Path) -> Path:
    """A copy of the quiet work directory, which thinks that it was made for outputs below tmp_path."""
    settings = {"bits": (4.0, 5.0), "compile_full": str(tmp_path / "out-{bpw}")}
    shutil.copytree(quiet.work, tmp_path / "work")
    run(quiet.model, tmp_path / "work", reuse=True, **settings)
    return tmp_path
