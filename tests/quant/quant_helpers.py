"""Random layers, and blocks of the tiny models, for the tests of the numerics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import QParams
from exl2ray.formats.measurement import ModuleProfile
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import Block, check_states, load_block
from exl2ray.model.spec import ModelSpec
from exl2ray.quality import Settings
from exl2ray.quant.entering import enter_module
from exl2ray.quant.gptq import Quantized, feedback_factor, quantize_reference
from exl2ray.quant.hessian import Factor
from exl2ray.quant.module import QuantizedModule, cut, measure_module, quantize_module


def correlated_inputs(k: int, tokens: int = 256, seed: int = 0) -> Tensor:
    """(tokens, K) float32 with strong correlations and channels of very different size, as activations have."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=g) * 0.4 + torch.eye(k)
    return torch.randn(tokens, k, generator=g) @ mix * torch.logspace(-1, 1, k)[torch.randperm(k, generator=g)]


def hessian(k: int, seed: int = 0, tokens: int = 256) -> Tensor:
    x = correlated_inputs(k, tokens, seed)
    return x.T @ x / 4


def weights(k: int, n: int, seed: int = 0) -> Tensor:
    """(K, N) float32, values of halves as checkpoints have them; columns of different size."""
    g = torch.Generator().manual_seed(1000 + seed)
    return (torch.randn(k, n, generator=g) * torch.linspace(0.3, 2, n) * k**-0.5).half().float()


def reference(factor: Factor, w: Tensor, layout: object) -> Quantized:
    return quantize_reference(w, factor.perm, feedback_factor(factor), layout)  # type: ignore[arg-type]


def load(
    directory: Path, module: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[ModelSpec, Block]:
    source = SourceModel(directory)
    spec = load_spec(source)
    return spec, load_block(spec, spec.modules[module], source, device, dtype)


def states(spec: ModelSpec, rows: int = 3, tokens: int = 40, seed: int = 0) -> Tensor:
    """(rows, tokens, hidden) random hidden states in the model's state dtype."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, tokens, spec.hyper.hidden_size, generator=g)
    return x.to(getattr(torch, spec.hyper.state_dtype))


class Packed(dict[str, PackedLinear]):
    """Takes packed linears as a work directory does."""

    add = dict[str, PackedLinear].update

    def flush(self) -> None:
        pass


def measured(
    block: Block, x: Tensor, settings: Settings, report: Callable[[str], None] = print
) -> tuple[ModuleProfile, Tensor | None]:
    """A module's profile, and the states after it."""
    entered = enter_module(block, x, settings, check_states)
    return measure_module(entered, report), entered.y


def quantized(
    block: Block, x: Tensor, params: Mapping[str, QParams], settings: Settings
) -> tuple[QuantizedModule, Packed, Tensor]:
    """A module quantised by a worker alone: the result, what was packed in the module's order, and the states after it."""
    packed = Packed()
    result = quantize_module(block, cut(x), cut(x), len(x), params, settings, check_states, packed)
    ordered = Packed((linear.key, packed[linear.key]) for linear in block.module.linears)
    return result, ordered, torch.cat(list(result.x.values())) if result.x else x
