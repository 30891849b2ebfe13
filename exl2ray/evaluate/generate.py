"""Text from a model, token by token: all modules in memory, keys and values of earlier tokens kept.

The weights are those that `forward.py` evaluates: an EXL2 model is dequantised once, when it is opened. For looking at what a
conversion did to a model, not for serving it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from exl2ray.evaluate.forward import OpenModel, RunOptions, checked_device, load_module
from exl2ray.model.attention import AttentionHalf, KeyValues
from exl2ray.model.blocks import Block, PositionsBlock, check_states


class Generator:
    """A model with its weights on one device. Raises what reading them raises."""

    def __init__(self, model: OpenModel, device: torch.device | str, options: RunOptions | None = None) -> None:
        self.model = model
        self.device = checked_device(device)
        options = options or RunOptions()
        self._blocks = [load_module(model, m, self.device, options) for m in model.spec.modules]

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        """The most probable token after ``prompt`` (one or more ids), then the one after that, without end.

        A family that needs BOS must have it in the prompt. Raises NumericError for states that are not finite.
        """
        past = {b.module.index: KeyValues() for b in self._blocks}
        ids, seen = torch.tensor([prompt], dtype=torch.int64), 0
        while True:
            token = int(self._logits(ids, past, seen).argmax())
            seen += ids.shape[1]
            ids = torch.tensor([[token]], dtype=torch.int64)
            yield token

    @torch.inference_mode()
    def _logits(self, ids: Tensor, past: dict[int, KeyValues], seen: int) -> Tensor:
        """(vocab,) float32 behind the last of ``ids`` (1, T), which follow ``seen`` tokens."""
        *body, head = self._blocks
        x = ids.to(self.device)
        for block in body:
            x = _continued(block, x, past[block.module.index], seen)
        check_states(x, f"{self.model.path}: token {seen + ids.shape[1]}")
        return head.forward(x[:, -1:])[0, 0]


def _continued(block: Block, x: Tensor, past: KeyValues, seen: int) -> Tensor:
    """As ``block.forward``, for states of tokens behind ``seen`` others."""
    if isinstance(block, PositionsBlock):
        return block.added(x, seen)
    attention, *others = block.halves or (None,)
    if not isinstance(attention, AttentionHalf):
        return block.forward(x)
    n = attention.pre(x)
    mixed = attention.continued({linear.role: attention.linear(linear, n) for linear in attention.first}, past)
    out = attention.post(x, attention.linear(attention.second, mixed))
    if not others:
        return out
    (mlp,) = others  # a parallel block: both branches see the same normed states
    return x + out.to(x.dtype) + mlp.post(x, mlp.branch(n)).to(x.dtype)
