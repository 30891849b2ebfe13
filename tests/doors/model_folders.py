"""Folders as people have them, made from one small random model: weights of transformers, one thing changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from exl2ray.evaluate.forward import run_model

Tensors = dict[str, Tensor]
Change = Callable[[Path], Any]  # of a folder
IDS = torch.randint(3, 250, (2, 24), generator=torch.Generator().manual_seed(5))
WHOLE = "model.safetensors"


def read_weights(folder: Path) -> Tensors:
    return {n: t.clone() for n, t in load_file(folder / WHOLE).items()}


def write_weights(folder: Path, tensors: Tensors, name: str = WHOLE) -> None:
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / name, metadata={"format": "pt"})


def edited(change: Callable[[Tensors], Any]) -> Change:
    """Other weights, by ``change``."""

    def apply(f: Path) -> None:
        tensors = read_weights(f)
        change(tensors)
        write_weights(f, tensors)

    return apply


def write_sharded(folder: Path, tensors: Tensors, parts: int = 2, index: bool = True, stem: str = "model") -> None:
    """The tensors in ``parts`` files with their index, in place of model.safetensors."""
    names, weight_map = sorted(tensors), {}
    for i in range(parts):
        file = f"{stem}-{i + 1:05d}-of-{parts:05d}.safetensors"
        some = names[i::parts]
        write_weights(folder, {n: tensors[n] for n in some}, file)
        weight_map |= dict.fromkeys(some, file)
    if index:
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def edit_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json; None removes them."""
    config = {**json.loads((folder / "config.json").read_text()), **changes}
    write_json(folder / "config.json", {k: v for k, v in config.items() if v is not None})


def renamed(folder: Path, change: Callable[[str], str]) -> None:
    """Tensors under other names."""
    write_weights(folder, {change(n): t for n, t in read_weights(folder).items()})


def copied(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def our_logits(folder: Path, ids: Tensor = IDS) -> Tensor:
    """(R, T, vocab) float32, by what a conversion and `eval` read."""
    with torch.inference_mode():
        out = run_model(folder, ids, "cpu")
        return out.logits(slice(None), slice(None))


def transformers_logits(folder: Path, ids: Tensor = IDS, **settings: Any) -> Tensor:
    """The same by transformers, in float32, from the same folder."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **settings).eval()
    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())
