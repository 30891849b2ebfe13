"""What a worker does before its first module."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import write_model

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import load_block
from exl2ray.quant.settings import Settings
from exl2ray.quant.warm import rehearse_solving


def test_every_linear_of_the_block_is_quantised(tmp_path: Path) -> None:
    source = SourceModel(write_model(tmp_path / "llama", "Llama"))
    spec = load_spec(source, None, None)
    for module in spec.modules[1:3]:
        block = load_block(spec, module, source, "cpu", torch.float32)
        before = dict(block.weights)
        rehearse_solving(block, Settings())
        assert len(before) == len(module.linears)
        for key, weight in before.items():
            assert block.weights[key].shape == weight.shape
            assert not torch.equal(block.weights[key], weight)
            assert torch.nn.functional.mse_loss(block.weights[key].float(), weight.float()) < 0.02 * weight.float().var()
