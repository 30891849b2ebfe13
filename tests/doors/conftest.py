"""One small model for all tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import write_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers; not to be changed."""
    return write_model(tmp_path_factory.mktemp("base") / "model", rms_norm_eps=1e-5)


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head that shares the embedding; not to be changed."""
    return write_model(tmp_path_factory.mktemp("tied") / "model", rms_norm_eps=1e-5, tie_word_embeddings=True)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    """A copy of the model that the test may change."""
    return Path(shutil.copytree(base, tmp_path / "model"))


@pytest.fixture
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    def make(family: str, **config: object) -> Path:
        return write_model(tmp_path_factory.mktemp(family) / "model", family, **config)

    return make
