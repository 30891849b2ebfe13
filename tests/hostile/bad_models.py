"""Models that are bad on purpose, and what checks and conversions say of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from exl2ray.convert import Summary, convert
from exl2ray.events import Silent
from exl2ray.plan.problems import examine
from exl2ray.recipe import Recipe

Tensors = dict[str, torch.Tensor]
Edit = Callable[[Tensors], None]
EMBED, HEAD, LAYER = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1."
DOWN, QUERY = LAYER + "mlp.down_proj.weight", LAYER + "self_attn.q_proj.weight"


def parquet(path: Path, *texts: str) -> str:
    pq.write_table(pa.table({"text": list(texts)}), path)
    return str(path)


def edited(source: Path, target: Path, edit: Edit | None = None, **config: Any) -> Path:
    """A copy with other tensors, and other keys in config.json (None: without the key)."""
    shutil.copytree(source, target)
    if edit is not None:
        tensors = load_file(target / "model.safetensors")
        edit(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    settings = {**json.loads((target / "config.json").read_text()), **config}
    (target / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v is not None}))
    return target


def recipe(model: Path, out: Path, text: str, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "bits": (4.0,), "length": 128, "measurement_length": 128, "executor": "inline", "device": "cpu",
        "quality": "reference", "evaluate": "never", "cal_dataset": text, "measurement_rows": 2, "dataset_rows": 4,
    }  # fmt: skip
    return Recipe(**{"in_dir": str(model), "out_dir": str(out), **settings, **changes})


def doubts(model: Path, tmp_path: Path, text: str, **changes: Any) -> list[str]:
    found = examine(recipe(model, tmp_path / "work", text, **changes))
    found.raise_any()
    return found.doubts


def fill(pattern: str, value: float = 0.0) -> Edit:
    """Sets every tensor whose name holds ``pattern`` to one value."""

    def edit(tensors: Tensors) -> None:
        for name in [n for n in tensors if pattern in n]:
            tensors[name] = torch.full_like(tensors[name], value)

    return edit


def run(job: Recipe) -> tuple[Summary, Silent]:
    reporter = Silent()
    return convert(job, reporter), reporter
