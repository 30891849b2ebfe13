"""What tests of publishing begin with: converted directories, and a Hub on loopback with a login for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fake_hub import TOKEN, FakeHub, serving
from tiny_models import write_model, write_text

from exl2ray.commands.publish import publish
from exl2ray.convert import convert
from exl2ray.events import Silent
from exl2ray.recipe import Recipe

REPO = "me/tiny-exl2"
SOURCE_CARD = """\
---
license: other
license_name: loopback
language:
- no
- en
base_model: somebody/an-older-model
pipeline_tag: text-generation
tags: [transformers, poetry]
---
# Tiny model

Made of noise. --- Really.
"""


def write_source(root: Path) -> Path:
    """A tiny model with a card."""
    torch.set_num_threads(1)
    model = write_model(root / "tiny")
    (model / "README.md").write_text(SOURCE_CARD)
    return model


def convert_source(source: Path, root: Path, bits: tuple[float, ...] = (4.0, 5.0), evaluate: str = "always") -> Path:
    """A folder with the model at each bitrate (4.0bpw, 5.0bpw) and the work directory."""
    np.save(root / "eval.npy", np.random.default_rng(0).integers(3, 259, (3, 64)))
    recipe = Recipe(
        str(source), str(root / "work"), bits=bits, compile_full=str(root / "{bpw}bpw"), length=128,
        measurement_length=128, cal_dataset=str(write_text(root / "text.parquet")), measurement_rows=4, dataset_rows=6,
        device="cpu", executor="inline", shard_size=0, evaluate=evaluate,
        eval_text=str(root / "eval.npy"),
    )  # fmt: skip
    convert(recipe, Silent())
    return root


@contextmanager
def hub_on_loopback(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[FakeHub]:
    """The Hub on loopback, a login for it, and plain transfers instead of Xet's. ``folder``: where there is no login."""
    pytest.importorskip("huggingface_hub", reason="the extra [hub] is not installed")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-login"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(FakeHub()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)  # both are of the environment at its import
        template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def send(*directories: Path, repo: str = REPO, **settings: Any) -> Any:
    """Publishes; ``settings`` in place of what the flags are if none is given."""
    return publish([str(d) for d in directories], repo, **settings)
