"""Header-only models and small real ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from header_models import LLAMA_8B, LLAMA_70B, write_header_model
from tiny_models import write_model, write_text


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("calibration") / "rows.jsonl")


@pytest.fixture(scope="session")
def llama_8b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_header_model(tmp_path_factory.mktemp("headers") / "8b", LLAMA_8B)


@pytest.fixture(scope="session")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_header_model(tmp_path_factory.mktemp("headers") / "70b", LLAMA_70B)
