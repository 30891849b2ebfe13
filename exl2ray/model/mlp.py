"""Gated and plain MLPs, and their activations (architectures 5.8)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from exl2ray.formats.layout import FLOAT16_MAX
from exl2ray.model.half import Half, LinearBank
from exl2ray.model.hyper import Hyper
from exl2ray.model.norms import Norm
from exl2ray.model.rules import Activation
from exl2ray.model.spec import LinearSpec


def activate(kind: Activation, x: Tensor) -> Tensor:
    """silu, GELU in its tanh approximation, or exact GELU."""
    if kind == "silu":
        return F.silu(x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def gated(kind: Activation, gate: Tensor, up: Tensor) -> Tensor:
    """act(gate) * up, clamped to +-65504 as at run time; a new tensor."""
    if torch.is_grad_enabled() and gate.requires_grad:  # what a backward pass needs must not be overwritten
        return (activate(kind, gate) * up).clamp(-FLOAT16_MAX, FLOAT16_MAX)
    if kind == "silu" and gate.is_cuda:
        from exl2ray.cuda import elementwise

        if elementwise.usable(gate, up):
            return elementwise.gated_silu(gate, up)
    return activate(kind, gate).mul_(up).clamp_(-FLOAT16_MAX, FLOAT16_MAX)


class MlpHalf(Half):
    """gate, up -> act(gate) * up -> down; or up -> act(up) -> down."""

    def __init__(
        self,
        bank: LinearBank,
        linears: tuple[LinearSpec, ...],  # [gate,] up, down
        hyper: Hyper,
        activation: Activation,
        norm: Norm,
        post_norm: Norm | None = None,
        add_residual: bool = True,
    ) -> None:
        super().__init__(bank, linears[:-1], linears[-1], norm, post_norm, hyper.residual_scale, add_residual)
        self.activation = activation

    def mix(self, outs: Mapping[str, Tensor]) -> Tensor:
        """gate_proj (if there is one) and up_proj, (R, T, I) each -> (R, T, I)."""
        if "gate_proj" in outs:
            return gated(self.activation, outs["gate_proj"], outs["up_proj"])
        return activate(self.activation, outs["up_proj"])
