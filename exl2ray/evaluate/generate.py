"""Text from a model, token by token: all modules in memory, keys and values of earlier tokens kept.

The weights are those that `forward.py` evaluates: an EXL2 model is dequantised once, when it is opened. For looking at what a
conversion did to a model, not for serving it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.evaluate.forward import Ahead, OpenModel, RunOptions, checked_device, load_module
from exl2ray.model.blocks import Block, PositionsBlock, check_states
from exl2ray.model.half import AttentionHalf, KeyValues

UNLIKELY = 0.02  # tokens less probable than this, relative to the most probable one, are not drawn


@dataclass(frozen=True)
class Draft:
    """How one row begins and goes on. prompt: one or more ids. turns: ids that are put behind a token that ends a turn, one
    after the other and round again; none: such a token ends the row."""

    prompt: Sequence[int]
    temperature: float = 1.0
    turns: tuple[tuple[int, ...], ...] = ()


class Generator:
    """A model with its weights on one device. Raises what reading them raises."""

    def __init__(self, model: OpenModel, device: torch.device | str, options: RunOptions | None = None) -> None:
        self.model = model
        self.device = checked_device(device)
        options = options or RunOptions()
        ahead = Ahead(model, self.device)
        self._blocks = [load_module(model, m, self.device, options, ahead.at(m.index)) for m in model.spec.modules]

    def greedy(self, prompt: list[int]) -> Iterator[int]:
        """The most probable token after ``prompt`` (one or more ids), then the one after that, without end.

        A family that needs BOS must have it in the prompt. Raises NumericError for states that are not finite.
        """
        past = {b.module.index: KeyValues() for b in self._blocks}
        ids, seen = torch.tensor([prompt], dtype=torch.int64), 0
        while True:
            token = int(self._last_logits(ids, past, seen).argmax())
            seen += ids.shape[1]
            ids = torch.tensor([[token]], dtype=torch.int64)
            yield token

    def sampled(self, drafts: Sequence[Draft], length: int, stops: frozenset[int], seed: int) -> list[list[int]]:
        """Rows of at most ``length`` tokens, prompts and turns included, written side by side; drawn as ``seed`` says.

        All rows advance together: first through what the shortest prompt has, then token by token, longer prompts and turns
        among them, so that no row is padded. Raises NumericError for states that are not finite.
        """
        past = {b.module.index: KeyValues(length) for b in self._blocks}
        rng = torch.Generator().manual_seed(seed)
        common = min(len(d.prompt) for d in drafts)
        rows = [list(d.prompt[:common]) for d in drafts]
        given = [deque(d.prompt[common:]) for d in drafts]
        turns, over = [0] * len(drafts), [False] * len(drafts)
        warmth = torch.tensor([d.temperature for d in drafts], device=self.device)[:, None]
        ids, seen = torch.tensor(rows, dtype=torch.int64), 0
        while seen + ids.shape[1] < length and not all(over):
            drawn = _drawn(self._last_logits(ids, past, seen) / warmth, torch.rand(len(drafts), 1, generator=rng))
            seen += ids.shape[1]
            found = []
            for r, token in enumerate(drawn):
                forced = bool(given[r])
                token = given[r].popleft() if forced else token
                if not over[r]:
                    rows[r].append(token)
                    if token in stops and not forced:
                        over[r] = not drafts[r].turns
                        given[r].extend(drafts[r].turns[turns[r] % len(drafts[r].turns)] if drafts[r].turns else ())
                        turns[r] += 1
                found.append(token)
            ids = torch.tensor(found, dtype=torch.int64)[:, None]
        return rows

    @torch.inference_mode()
    def _last_logits(self, ids: Tensor, past: dict[int, KeyValues], seen: int) -> Tensor:
        """(R, vocab) float32 behind the last of ``ids`` (R, T), which follow ``seen`` tokens."""
        *body, head = self._blocks
        x = ids.to(self.device)
        for block in body:
            x = _continued(block, x, past[block.module.index], seen)
        check_states(x, f"{self.model.path}: token {seen + ids.shape[1]}")
        return head.forward(x[:, -1:])[:, 0]


def _drawn(logits: Tensor, uniform: Tensor) -> list[int]:
    """A token for each row of logits (R, vocab), by its number ``uniform`` (R, 1) from 0 to 1."""
    shares = logits.float().softmax(-1)
    shares = shares * (shares >= UNLIKELY * shares.amax(-1, keepdim=True))
    upto = shares.cumsum(-1)
    places = torch.searchsorted(upto, uniform.to(upto.device) * upto[:, -1:])
    return [int(t) for t in places[:, 0].clamp(max=logits.shape[-1] - 1).tolist()]


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
