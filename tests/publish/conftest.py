"""Two converted directories, and a Hub on loopback."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import FakeHub
from published import convert_source, hub_on_loopback, write_source


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models 4.0bpw and 5.0bpw; not to be changed."""
    return convert_source(source, tmp_path_factory.mktemp("converted"))


@pytest.fixture
def models(converted: Path, tmp_path: Path) -> Path:
    """A copy of the converted models that a test may change."""
    for name in ("4.0bpw", "5.0bpw"):
        shutil.copytree(converted / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """The Hub on loopback, a login for it, and plain transfers instead of Xet's."""
    with hub_on_loopback(monkeypatch, tmp_path) as hub:
        yield hub
