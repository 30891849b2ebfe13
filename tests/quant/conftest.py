"""Tiny random models, one directory per family and session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import write_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directory of a family's tiny model; it must not be changed."""
    built: dict[str, Path] = {}

    def get(family: str = "Llama") -> Path:
        if family not in built:
            built[family] = write_model(tmp_path_factory.mktemp(family), family)
        return built[family]

    return get
