"""What several files of this folder use."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from bad_models import parquet
from tiny_models import write_model
from workdir_cases import Conversion, Victim, make_conversion


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    torch.set_num_threads(1)  # sums depend on it
    root = tmp_path_factory.mktemp("made")
    return make_conversion(root, write_model(root / "model", vocab_size=9000))  # the embedding fills a shard


@pytest.fixture
def work(made: Conversion, tmp_path: Path) -> Path:
    return made.copy_of_work(tmp_path / "work")


@pytest.fixture
def target(made: Conversion, tmp_path: Path) -> Path:
    return made.copy_of_target(tmp_path / "target")


@pytest.fixture
def victim(tmp_path: Path) -> Victim:
    return Victim(tmp_path / "victim")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama; not to be changed."""
    torch.set_num_threads(1)
    return write_model(tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ordinary prose and code, of the project itself."""
    root = Path(__file__).resolve().parents[2]
    files = [root / "docs" / "quality.md", root / "docs" / "architecture.md", root / "exl2ray" / "allocation" / "planning.py"]
    return parquet(tmp_path_factory.mktemp("text") / "rows.parquet", *(f.read_text(encoding="utf-8") for f in files))
