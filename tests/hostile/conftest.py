"""What several files of this folder use."""

from __future__ import annotations

import pytest
import torch
from tiny_models import write_model
from workdir_cases import Conversion, make_conversion


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    torch.set_num_threads(1)  # sums depend on it
    root = tmp_path_factory.mktemp("made")
    return make_conversion(root, write_model(root / "model", vocab_size=9000))  # the embedding fills a shard
