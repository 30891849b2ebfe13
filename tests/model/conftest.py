"""One saved random model per family and test session."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from oracles import ORACLES, Oracle


@pytest.fixture(scope="session")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Oracle]:
    """Build (once) the random model of a family; its directory must not be changed."""
    built: dict[str, Oracle] = {}

    def get(name: str) -> Oracle:
        if name not in built:
            built[name] = ORACLES[name](tmp_path_factory.mktemp(name))
        return built[name]

    return get


@pytest.fixture
def checkpoint(oracle: Callable[[str], Oracle], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's checkpoint that the test may damage."""

    def copy(name: str = "LlamaForCausalLM") -> Path:
        target = tmp_path / "model"
        shutil.copytree(oracle(name).path, target)
        return target

    return copy
