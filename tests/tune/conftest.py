"""A tiny random model of each family, and the same rounded, once per session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from rounded_models import write_rounded
from tiny_models import write_model

Pairs = Callable[..., tuple[Path, Path]]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """(source, EXL2) directories of a family; they must not be changed."""
    built: dict[str, tuple[Path, Path]] = {}

    def get(family: str = "Llama") -> tuple[Path, Path]:
        if family not in built:
            root = tmp_path_factory.mktemp(family)
            extra = {"attention_bias": True} if family == "Qwen2" else {}
            source = write_model(root / "source", family, **extra)
            built[family] = (source, write_rounded(source, root / "exl2"))
        return built[family]

    return get


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of random characters, of two kinds."""
    root = tmp_path_factory.mktemp("text")
    files = []
    for name, low, high in (("letters", 65, 122), ("figures", 33, 63)):
        g = torch.Generator().manual_seed(low)
        lines = ["".join(map(chr, torch.randint(low, high, (60,), generator=g).tolist())) for _ in range(160)]
        path = root / f"{name}.txt"
        path.write_text("\n".join(lines))
        files.append(path)
    return files[0], files[1]
