"""Tokenizer files in a model's folder, and the folder that tests change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import byte_tokenizer

from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer

ROWS, BASE = 272, 259  # rows of the embedding; tokens of the byte tokenizer
TEXTS = (
    "<|im_start|>user\nhi<|im_end|>\n", "a [PAD] b</s>", "x  <|im_end|>  y <|im_start|>z", "<a><b><c> <tool>",
    "Straße 今日 \t\n", "ABC<|im_start|><|im_start|>", "<s>no</s><unk>",
)  # fmt: skip


def token_folder(path: Path) -> Path:
    """A folder with a byte tokenizer and its settings, without weights."""
    path.mkdir(exist_ok=True)
    byte_tokenizer().save(str(path / "tokenizer.json"))
    put(path, "config.json", {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": ROWS})
    put(path, "tokenizer_config.json", {})
    return path


def put(folder: Path, name: str, value: Any) -> None:
    if name == "tokenizer_config.json":
        value = {"tokenizer_class": "PreTrainedTokenizerFast", **value}
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def load(folder: Path, rows: int = ROWS, **config: Any) -> ModelTokenizer:
    return load_tokenizer(folder, config, rows)
