"""Our output in ExLlamaV2 itself: it loads, and computes what `exl2ray eval` computes.

The package compiles its extension at the first import (minutes). Its SDPA path without flash-attn is not causal, so it is
switched off. TINY_MODEL may name another model than the shared one.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

os.environ.setdefault("EXLLAMA_NO_SDPA", "1")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("exllamav2") is None, reason="the exllamav2 package is not installed"),
]


@pytest.fixture(scope="module")
def model_dir(request: pytest.FixtureRequest) -> Path:
    given = os.environ.get("TINY_MODEL")
    if given:
        return Path(given)
    shared: Path = request.getfixturevalue("shared_dir")
    return shared / "models" / "tiny-llama-7m"


# 2.15: pure 2 bits in groups as large as a linear (exl2ray.quant.qparams.low_options)
VARIANTS = {
    "2.15": {}, "2.6": {}, "3.0": {}, "4.5": {}, "6.0": {}, "4.0 rotated": {"rotate": True},
    "4.0 best": {"quality": "best", "tune": "64k"},
}  # fmt: skip


@pytest.fixture(scope="module", params=VARIANTS)
def converted(request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from exl2ray.convert import convert
    from exl2ray.events import Silent
    from exl2ray.recipe import Recipe

    root = tmp_path_factory.mktemp("exl2")
    bits = float(request.param.split()[0])
    recipe = Recipe(
        str(model_dir), str(root / "work"), bits=(bits,), compile_full=str(root / "out"), device="cuda",
        executor="inline", length=512, measurement_length=512, **VARIANTS[request.param],
    )  # fmt: skip
    convert(recipe, Silent())
    return root / "out"


def exllamav2_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config

    config = ExLlamaV2Config(str(directory))
    config.max_seq_len = 2048
    config.no_sdpa = True
    model = ExLlamaV2(config)
    model.load()
    rows = []
    for row in ids:
        cache = ExLlamaV2Cache(model, max_seq_len=2048)
        rows.append(model.forward(row[None], cache).float().cpu())
    model.unload()
    return torch.cat(rows)


def test_exllamav2_agrees_with_our_forward(converted: Path) -> None:
    from exl2ray.evaluate.forward import run_model

    vocab = json.loads((converted / "config.json").read_text())["vocab_size"]
    ids = torch.randint(3, vocab, (4, 256), generator=torch.Generator().manual_seed(0))
    theirs = exllamav2_logits(converted, ids)[..., :vocab]
    ours = run_model(converted, ids, "cuda").logits(slice(0, 4), slice(0, 256)).float().cpu()[..., :vocab]
    assert torch.isfinite(theirs).all()
    p = torch.log_softmax(ours.double(), -1)
    q = torch.log_softmax(theirs.double(), -1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    agree = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    print(f"KL(ours || ExLlamaV2) {kl:.2e}, top-1 agreement {agree:.4f}")
    assert kl < 1e-4
    assert agree > 0.99
