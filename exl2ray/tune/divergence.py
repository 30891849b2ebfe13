"""The loss: KL(source || model) in nats, summed over positions, and its gradient at the model's last states.

d KL / d logits = softmax(logits) - softmax(source logits). Logits are made for some positions at a time, since 2048 positions
of 262144 words take 2 GiB in float32, and several such arrays are needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from exl2ray.model.blocks import Block
from exl2ray.tune.sums import Gradients

LOGITS_AT_ONCE = 1 << 27  # of one model: 512 MiB in float32


def divergence_backward(
    head: Block,
    leaves: Sequence[Tensor],
    source_head: Block,
    states: Tensor,  # (positions, hidden): what the final norm gives
    source_states: Tensor,  # (positions, hidden): of the source model
    scale: float,  # of the loss, for its gradients
) -> tuple[Tensor, Tensor, Gradients]:
    """(sum of the divergences, float64; gradient of scale times it at the states; its gradients at the head's leaves)."""
    total = torch.zeros((), dtype=torch.float64, device=states.device)
    gradient, of_leaves = torch.empty_like(states), []  # type: Tensor, Gradients
    for part in _parts(len(states), source_head):
        with torch.enable_grad():
            x = states[part].detach().requires_grad_()
            logits = head.forward(x[None])[0]
            with torch.no_grad():
                upstream, kl = _difference(source_head.forward(source_states[part][None])[0], logits.detach(), scale)
            mine, *others = torch.autograd.grad(logits, [x, *leaves], upstream)
        total += kl.sum(dtype=torch.float64)
        gradient[part] = mine
        if of_leaves:
            of_leaves = [t.add_(g) for t, g in zip(of_leaves, others, strict=True)]
        else:
            of_leaves = [g.float() for g in others]
    return total, gradient, of_leaves


@torch.no_grad()
def divergences(head: Block, source_head: Block, states: Tensor, source_states: Tensor) -> Tensor:
    """KL of each position, (positions,) float32."""
    parts = []
    for part in _parts(len(states), source_head):
        p = source_head.forward(source_states[part][None])[0].log_softmax(-1)
        q = head.forward(states[part][None])[0].log_softmax(-1)
        parts.append((p.exp() * (p - q)).sum(-1))
    return torch.cat(parts)


def _difference(source: Tensor, logits: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(positions, vocabulary) logits of both -> scale (q - p), and KL(p || q) of each position."""
    p, q = source.log_softmax(-1), logits.log_softmax(-1)
    weights = p.exp()
    kl = (weights * p.sub_(q)).sum(-1)
    return q.exp_().sub_(weights).mul_(scale), kl


def _parts(positions: int, head: Block) -> Iterator[slice]:
    step = max(1, LOGITS_AT_ONCE // head.spec.hyper.vocab_size)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))
