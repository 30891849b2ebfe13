"""How much an error in one linear's output changes what the whole model says.

To second order the KL divergence between the source's next-token distributions and those of a model in which one linear is
quantised is proportional to the squared error of that linear's output, and for errors in several linears it adds up. So one
number per linear is enough: the sensitivity a = KL / squared error, measured with one perturbation. It is forward-only: a few
rows of tokens run through the model once as they are and once for every linear of which a perturbed copy was used.

The perturbation is rounding to `BITS` bits without feedback, less its part along the mean input: what GPTQ leaves has hardly
any of that, and in v_proj an error that all tokens share counts up to twice as much as one that they do not.

All linears of one role in a module (the experts of a mixture) are perturbed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.quant.rows import batches

BITS = 3
GROUP = 32  # rows that share a step
POSITIONS = 256  # whose logits exist at once


@dataclass
class Probe:
    """A perturbed copy of the model on its way: key and role of what was perturbed, and the states it has reached.

    error: squared error of the role's outputs, summed over outputs, mean over tokens.
    """

    key: str
    role: str
    error: float
    states: Tensor  # (R, T, hidden)


def perturbed(weight: Tensor, mean: Tensor) -> Tensor:
    """weight (K, N) with the error of `BITS`-bit rounding that is orthogonal to ``mean`` (K,), the mean input. Float32."""
    w = weight.float()
    groups = w.view(-1, GROUP, w.shape[1])
    step = groups.abs().amax(dim=1, keepdim=True) / (2 ** (BITS - 1) - 0.5)
    codes = torch.round(groups / step.clamp(min=1e-30)).clamp_(-(2 ** (BITS - 1)), 2 ** (BITS - 1) - 1)
    error = (codes * step).view_as(w) - w
    direction = mean / torch.linalg.vector_norm(mean).clamp(min=1e-30)
    out: Tensor = w + error - torch.outer(direction, direction @ error)
    return out


def probes_of(block: Any, x: Tensor, device: torch.device, batch_rows: int) -> tuple[Tensor, list[Probe]]:
    """The states after a module, and one probe for each role of its linears. On return the block is as it was.

    x: (R, T, hidden) float32 states of the source model before the module, on any device.
    """
    inputs: dict[str, list[Tensor]] = {}

    def keep(group: str, captured: Tensor) -> None:
        inputs.setdefault(group, []).append(captured.clone())

    out = advanced(block, x, device, batch_rows, keep)
    tokens = x.shape[0] * x.shape[1]
    probes = []
    for role in dict.fromkeys(linear.role for linear in block.module.linears):
        kept, total = {}, 0.0
        for linear in block.module.linears:
            if linear.role != role or linear.input_group not in inputs:  # no token came to this expert
                continue
            kept[linear.key] = w = block.weights[linear.key]
            changed, squares = _changed(w, inputs[linear.input_group])
            total += squares
            block.set_weight(linear.key, changed)
        states = advanced(block, x, device, batch_rows)
        for key, w in kept.items():
            block.set_weight(key, w)
        probes.append(Probe(block.module.profile_key, role, total / tokens, states))
    return out, probes


def _changed(weight: Tensor, inputs: list[Tensor]) -> tuple[Tensor, float]:
    """`perturbed` in the weight's own dtype, and the sum over all inputs (tokens, K) of its squared error."""
    mean = torch.stack([p.float().sum(0) for p in inputs]).sum(0) / sum(len(p) for p in inputs)
    changed = perturbed(weight, mean).to(weight.dtype)
    error = changed.float() - weight.float()
    return changed, sum(float(torch.linalg.vector_norm(p.float() @ error).double() ** 2) for p in inputs)


def advanced(
    block: Any, x: Tensor, device: torch.device, batch_rows: int, capture: Callable[[str, Tensor], None] | None = None
) -> Tensor:
    """States after a block, float32, where x lives. Each call has the same shapes, so nothing depends on its neighbours."""
    out: Tensor | None = None
    for part in batches(len(x), batch_rows):
        y = block.forward(x[part].to(device)) if capture is None else block.forward(x[part].to(device), capture)
        if out is None:
            out = torch.empty((len(x), *y.shape[1:]), dtype=torch.float32, device=x.device)
        out[part] = y.to(torch.float32)
    if out is None:
        raise NumericError(f"{block.module.profile_key}: no rows to probe with")
    return out


def divergences(head: Any, reference: Tensor, others: list[Tensor]) -> list[float]:
    """Mean KL(reference || other) in nats per token for each of ``others``; all (R, T, hidden) normed states."""
    sums = [0.0] * len(others)
    count = 0
    for rows, positions in _slices(reference):
        expected = _log_probabilities(head, reference[rows, positions])
        count += expected.shape[0] * expected.shape[1]
        for i, states in enumerate(others):
            sums[i] += _divergence(expected, _log_probabilities(head, states[rows, positions]))
    return [s / count for s in sums]


def head_probe(head: Any, reference: Tensor) -> tuple[float, float]:
    """(mean KL, mean squared error of the logits) of a perturbed head; reference: (R, T, hidden) normed states."""
    key = head.module.linears[0].key
    original = head.weights[key]
    inputs = reference.flatten(0, 1).to(original.device).to(original.dtype)
    changed, squares = _changed(original, list(torch.split(inputs, POSITIONS)))
    total = 0.0
    for rows, positions in _slices(reference):
        expected = _log_probabilities(head, reference[rows, positions])
        head.set_weight(key, changed)
        total += _divergence(expected, _log_probabilities(head, reference[rows, positions]))
        head.set_weight(key, original)
    return total / len(inputs), squares / len(inputs)


def _slices(states: Tensor) -> Iterator[tuple[slice, slice]]:
    """One row and up to `POSITIONS` positions at a time."""
    for r in range(states.shape[0]):
        for start in range(0, states.shape[1], POSITIONS):
            yield slice(r, r + 1), slice(start, start + POSITIONS)


def _log_probabilities(head: Any, states: Tensor) -> Tensor:
    device = head.weights[head.module.linears[0].key].device
    return torch.log_softmax(head.forward(states.to(device)).float(), dim=-1)


def _divergence(p: Tensor, q: Tensor) -> float:
    """Sum over positions of KL(p || q) from log probabilities.

    sum p (e^d - 1 - d) with d = log q - log p: no term is negative, so that divergences far below the rounding error of a
    single logarithm come out right.
    """
    d = q - p
    near = d.clamp(-1.0, 1.0)
    terms = torch.where(d.abs() < 1.0, p.exp() * (torch.expm1(near) - near), q.exp() - p.exp() * (1 + d))
    return float(terms.double().sum())
