"""Complete random models of a size at which a conversion takes seconds: weights, config and tokenizer in one directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

HIDDEN, WIDE, VOCAB, LAYERS = 64, 96, 272, 2
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
CONFIGS = {"Gemma3": "Gemma3TextConfig"}  # where they are not called as the family
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2}


def byte_tokenizer() -> Tokenizer:
    """259 tokens: three special ones and one per byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def write_text(path: Path) -> Path:
    """A small calibration file: random printable characters, so that rows of bytes reach most of the tokens.

    JSON lines unless ``path`` ends with .parquet: the child that reads them starts in half the time without pyarrow.
    """
    g = torch.Generator().manual_seed(0)
    rows = ["".join(chr(32 + i) for i in torch.randint(0, 95, (256,), generator=g).tolist()) for _ in range(16)]
    if path.suffix == ".parquet":
        pq.write_table(pa.table({"text": rows}), path)
    else:
        path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(directory: Path, family: str = "Llama", seed: int = 0, **config: Any) -> Path:
    """A model with random weights, saved in float16 by transformers; ``family``: Llama, Mixtral, Cohere, ..."""
    import transformers

    settings = {**SIZES, **(MIXTRAL if family == "Mixtral" else {}), **config}
    made = getattr(transformers, CONFIGS.get(family, f"{family}Config"))(**settings)
    model = getattr(transformers, f"{family}ForCausalLM")(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(1 + 0.3 * noise if p.dim() == 1 else noise * (1 if "embed" in name else p.shape[-1] ** -0.5))
    model.half().save_pretrained(directory)
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def edit_config(model: Path, **changes: Any) -> None:
    """Sets keys of config.json; None removes them."""
    config = {**json.loads((model / "config.json").read_text()), **changes}
    (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Other weights, by ``change``."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
