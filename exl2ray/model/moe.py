"""Mixture-of-experts blocks: routing, and the experts as batches of the tokens routed to them (architectures 5.18)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.model.half import Capture, LinearBank
from exl2ray.model.mlp import gated
from exl2ray.model.norms import Norm
from exl2ray.model.rules import Activation
from exl2ray.model.spec import LinearSpec


@dataclass(frozen=True)
class Routing:
    """Where tokens go. One slot is one (token, choice) pair, slot = token * k + choice.

    experts: (tokens, k) int64, weights: (tokens, k) float32, rows sum to 1. order: slots sorted by expert, stable.
    place: (tokens, k) position of each slot in ``order``. counts: slots per expert, on the host.
    """

    experts: Tensor
    weights: Tensor
    order: Tensor
    place: Tensor
    counts: tuple[int, ...]

    @property
    def tokens(self) -> Tensor:
        """Token of each entry of ``order``."""
        return self.order // self.experts.shape[1]


def route(router: Tensor, h: Tensor, per_token: int) -> Routing:
    """h (tokens, hidden) -> top-k of softmax(router @ h) in float32, renormalised. router: (experts, hidden) float32.

    Reading the counts back is the one synchronisation of a block; the result can be used for any number of
    ``MoeBlock.forward_experts``.
    """
    probabilities = torch.softmax(h.float() @ router.t(), dim=-1)
    weights, experts = probabilities.topk(per_token, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    order = experts.flatten().argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    counts = torch.zeros(router.shape[0], dtype=torch.int64, device=h.device)
    counts.scatter_add_(0, experts.flatten(), torch.ones_like(order))
    return Routing(experts, weights, order, place.view_as(experts), tuple(counts.tolist()))


@dataclass(frozen=True)
class Expert:
    """The three linears of one expert: down(act(gate(x)) * up(x))."""

    gate: LinearSpec
    up: LinearSpec
    down: LinearSpec


class ExpertBank:
    """All experts of a layer, and the router."""

    def __init__(
        self,
        bank: LinearBank,
        experts: tuple[Expert, ...],
        router: Tensor,  # (experts, hidden)
        per_token: int,
        activation: Activation,
        norm: Norm,
    ) -> None:
        self.bank = bank
        self.experts = experts
        self.router = router.float()
        self.per_token = per_token
        self.activation = activation
        self.norm = norm

    def forward(
        self,
        h: Tensor,  # (tokens, hidden) compute dtype
        routing: Routing,
        weights: Mapping[str, Tensor] | None = None,
        capture: Capture | None = None,
    ) -> Tensor:
        """Weighted sum of the chosen experts, (tokens, hidden) in h's dtype; summed in float32 in order of choice."""
        replaced = weights or {}
        inputs = h[routing.tokens]
        outputs = torch.empty_like(inputs)
        start = 0
        for index, (expert, count) in enumerate(zip(self.experts, routing.counts, strict=True)):
            stop = start + count
            if count:
                x = inputs[start:stop]
                outputs[start:stop] = self._expert(index, expert, x, replaced, capture)
            start = stop
        total = torch.zeros_like(h, dtype=torch.float32)
        for choice in range(routing.experts.shape[1]):
            total += outputs[routing.place[:, choice]] * routing.weights[:, choice : choice + 1]
        return total.to(h.dtype)

    def mid(self, expert: Expert, x: Tensor) -> Tensor:
        """Input of an expert's down linear, (n, hidden) -> (n, width), with the stored weights."""
        return self.mix(self.bank.linear(expert.gate, x), self.bank.linear(expert.up, x))

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        """Outputs of gate and up, (n, width) each -> input of down."""
        return gated(self.activation, gate, up)

    def _expert(
        self, index: int, expert: Expert, x: Tensor, weights: Mapping[str, Tensor], capture: Capture | None
    ) -> Tensor:
        """x: the tokens routed to one expert, (n, hidden) -> (n, hidden)."""
        gate = self.bank.linear(expert.gate, x, weights.get(expert.gate.key))
        up = self.bank.linear(expert.up, x, weights.get(expert.up.key))
        m = self.mix(gate, up)
        if capture is not None:
            capture(expert.gate.input_group, x)
            capture(expert.down.input_group, m)
        return self.bank.linear(expert.down, m, weights.get(expert.down.key))
