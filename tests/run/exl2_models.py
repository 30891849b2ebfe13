"""Random EXL2 models of any family, written without the converter: a model of transformers with its linears replaced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from exl2_numpy import pack_linear_numpy
from safetensors.torch import save_file
from tiny_models import write_model

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import GroupLayout, pad32
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config
from exl2ray.model.weights import read_plain


def layout_of(rows: int, widths: Sequence[int]) -> GroupLayout:
    """Groups of 32 rows, the last one with what is left, of widths that fall along the rows."""
    bits = sorted(widths, reverse=True)[: rows // 32]
    return GroupLayout(tuple(bits), (*(32,) * (len(bits) - 1), rows - 32 * (len(bits) - 1)))


def packed(key: str, k: int, n: int, widths: Sequence[int], rng: np.random.Generator, bias: bool) -> PackedLinear:
    """Random integers whose weights have about the size of those of ``write_model``."""
    layout, columns = layout_of(k, widths), pad32(n)
    values = np.concatenate([rng.integers(0, 1 << b, (r, columns)) for b, r in zip(layout.bits, layout.rows, strict=True)])
    codes = rng.integers(8, 17, (len(layout.bits), columns))
    tops = np.array([6.0 / (1 << b) * k**-0.5 for b in layout.bits], np.float16)
    biases = rng.standard_normal(columns).astype(np.float16) / 4 if bias else None
    return pack_linear_numpy(key, values.astype(np.uint8), codes, tops, rng.permutation(k), layout, biases)


def write_exl2(
    directory: Path, family: str = "Llama", widths: Sequence[int] = (5, 4), head: int | None = 6, files: int = 1,
    **config: Any,
) -> Path:  # fmt: skip
    """An EXL2 directory in ``files`` files; ``head``: bits of the head, None: in float16."""
    write_model(directory, family, **config)
    source = SourceModel(directory)
    spec, rng = load_spec(source), np.random.default_rng(7)
    tensors = {}
    for module in spec.modules:
        for linear in module.linears:
            is_head = linear.key.endswith("lm_head")
            if is_head and head is None:
                if not spec.tied:
                    tensors[f"{linear.key}.weight"] = source.load(f"{linear.key}.weight")
                continue
            tensors |= packed(
                linear.key, linear.in_features, linear.out_features, [head] if is_head else widths, rng, linear.has_bias
            ).tensors()  # fmt: skip
        tensors |= {plain.output_name: read_plain(spec, plain, source) for plain in module.plain}
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    for i in range(files):
        name = "output.safetensors" if files == 1 else f"output-{i + 1:05}-of-{files:05}.safetensors"
        save_file({n: tensors[n] for n in names[i::files]}, directory / name)
    path = directory / "config.json"
    quantization = {"quant_method": "exl2", "version": "0.3.2", "bits": 4.5, "head_bits": head or 16, "calibration": {}}
    settings = loader_config(spec.arch, source.config)
    path.write_text(json.dumps({**settings, "quantization_config": quantization}, indent=1))
    return directory


def tokens(vocab: int = 272) -> torch.Tensor:
    """(2, 40) token ids, the first one BOS."""
    ids = torch.randint(3, vocab, (2, 40), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 1
    return ids


def losses_of_training(model: Any) -> list[float]:
    """Of eight steps on `tokens`, of whatever of the model takes gradients."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def divergence(p: torch.Tensor, q: torch.Tensor) -> float:
    """Mean KL divergence of logits in nats."""
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((a.exp() * (a - b)).sum(-1).mean())
