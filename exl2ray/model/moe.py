"""Mixture-of-experts blocks: routing, and the experts as batches of the tokens routed to them.

Many narrow experts are computed in *runs*: experts with about the same number of tokens, padded to the largest of them, one
batched product per role. One after another, 128 experts cost a thousand launches for a millisecond of work.

Few, wide or well-fed experts (Mixtral, DBRX) hide their launches and stay one by one, and so do CPUs, where runs took 1.1
to 2.3 times as long. Weights are stacked anew for every run: a stack that is kept would not spare the copy, since runs
follow the routing and differ from one batch of rows to the next, and it would hold a second set of weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from exl2ray.model.half import Capture, LinearBank, Norm, gated
from exl2ray.model.rules import Activation
from exl2ray.model.spec import LinearSpec

# Where runs pay: on GPUs, whose launches they save. An expert of its own costs some 100 us of them, hidden by its products if
# those take longer; in a run it costs three copies of its weights. Only shapes and the kind of device decide, since the two
# ways differ in the last bits.
LEAST_EXPERTS = 16
MOST_WEIGHTS = 1 << 24  # of one linear; copying 2^24 halves takes about 20 us
MOST_PRODUCTS = 1 << 33  # weights of one linear times tokens per expert; 2^33 take 25 us or more in half precision
MOST_PADDING = 0.25  # of the rows of a run
RUN_BYTES = 512 << 20  # stacked weights of one role and activations of one run


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


class _Distribute(torch.autograd.Function):
    """h (tokens, hidden) -> (slots, hidden) in the routing's order. A token's gradient is the sum over its choices, in order:
    that of an index would be added up in no fixed order.
    """

    @staticmethod
    def forward(ctx: Any, h: Tensor, tokens: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return h[tokens]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (place,), (gradient,) = ctx.saved_tensors, gradients
        total = gradient[place[:, 0]]
        for choice in range(1, place.shape[1]):
            total = total + gradient[place[:, choice]]
        return total, None, None


class _Collect(torch.autograd.Function):
    """outputs (slots, hidden) in the routing's order -> (tokens, k, hidden); every output has one reader."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, place: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return outputs[place]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return gradients[0].flatten(0, 1)[order], None, None


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
        in_runs: bool | None = None,
    ) -> Tensor:
        """Weighted sum of the chosen experts, (tokens, hidden) in h's dtype; summed in float32 in order of choice.

        in_runs: whether experts are computed in runs; None: as `runs_pay` says. Candidate ``weights`` and biases are
        always computed expert by expert.
        """
        use_runs = self.computed_in_runs(routing.experts.numel(), h.device) if in_runs is None else in_runs
        if use_runs and not weights and not self.bank.biases:
            outputs, place = self._in_runs(h, routing, capture)
        else:
            outputs, place = self._one_by_one(h, routing, weights or {}, capture), routing.place
        if torch.is_grad_enabled() and outputs.requires_grad:
            chosen: Tensor = _Collect.apply(outputs, routing.place, routing.order)  # type: ignore[no-untyped-call]
            weighted = (chosen * routing.weights[:, :, None]).sum(1)
            return weighted.to(h.dtype)
        total = torch.zeros_like(h, dtype=torch.float32)
        for choice in range(routing.experts.shape[1]):
            total += outputs[place[:, choice]] * routing.weights[:, choice : choice + 1]
        return total.to(h.dtype)

    def runs_pay(self, slots: int, device: torch.device) -> bool:
        """Whether `forward` computes experts in runs. slots: (token, choice) pairs."""
        size = self.experts[0].gate.in_features * self.experts[0].gate.out_features
        narrow = size <= MOST_WEIGHTS and slots // len(self.experts) * size <= MOST_PRODUCTS
        return device.type == "cuda" and len(self.experts) >= LEAST_EXPERTS and narrow

    def computed_in_runs(self, slots: int, device: torch.device) -> bool:
        """Whether experts with the stored weights are: where that pays, unless somebody watches linear by linear."""
        return self.bank.watch is None and not self.bank.biases and self.runs_pay(slots, device)

    def mid(self, expert: Expert, x: Tensor) -> Tensor:
        """Input of an expert's down linear, (n, hidden) -> (n, width), with the stored weights."""
        return self.mix(self.bank.linear(expert.gate, x), self.bank.linear(expert.up, x))

    def mix(self, gate: Tensor, up: Tensor) -> Tensor:
        """Outputs of gate and up, (n, width) each -> input of down."""
        return gated(self.activation, gate, up)

    def _one_by_one(
        self, h: Tensor, routing: Routing, weights: Mapping[str, Tensor], capture: Capture | None
    ) -> Tensor:
        """Outputs of the experts, (slots, hidden), in the routing's order."""
        gradients = torch.is_grad_enabled() and h.requires_grad
        if gradients:
            inputs: Tensor = _Distribute.apply(h, routing.tokens, routing.place)  # type: ignore[no-untyped-call]
        else:
            inputs = h[routing.tokens]
        outputs = torch.empty_like(inputs)
        start = 0
        for expert, count in zip(self.experts, routing.counts, strict=True):
            stop = start + count
            if count:
                outputs[start:stop] = self._expert(expert, inputs[start:stop], weights, capture)
            start = stop
        return outputs

    def _expert(self, expert: Expert, x: Tensor, weights: Mapping[str, Tensor], capture: Capture | None) -> Tensor:
        """x: the tokens routed to one expert, (n, hidden) -> (n, hidden)."""
        gate = self.bank.linear(expert.gate, x, weights.get(expert.gate.key))
        up = self.bank.linear(expert.up, x, weights.get(expert.up.key))
        m = self.mix(gate, up)
        if capture is not None:
            capture(expert.gate.input_group, x)
            capture(expert.down.input_group, m)
        return self.bank.linear(expert.down, m, weights.get(expert.down.key))

    def _in_runs(self, h: Tensor, routing: Routing, capture: Capture | None) -> tuple[Tensor, Tensor]:
        """Outputs of the experts, padded, (rows, hidden), and for each (token, choice) its row, (tokens, k).

        A padding row repeats the last token of its expert; nobody reads its output.
        """
        hidden, width = self.experts[0].gate.in_features, self.experts[0].gate.out_features
        size = h.element_size()
        runs = list(cut_runs(routing.counts, hidden * width * size, (hidden + 3 * width) * size))
        first, last, place = _padded(routing, runs)
        outputs = h.new_empty(sum(len(run.experts) * run.rows for run in runs), hidden)
        row = 0
        for run, tokens in _tokens_of(routing, runs, first, last):
            x = h[tokens]  # (experts, rows, hidden)
            self._run(run, x, outputs[row : row + tokens.numel()].view(x.shape), routing.counts, capture)
            row += tokens.numel()
        return outputs, place

    def differences(
        self, h: Tensor, other: Tensor, routing: Routing, source: Mapping[str, Tensor]
    ) -> Iterator[tuple[Run, Tensor, Tensor, Tensor]]:
        """What the inputs of down linears, of h with the stored gate and up, lack to those of ``other`` with ``source``.

        h, other: (tokens, hidden). For each run of experts: the token of each of its rows (experts, rows), the inputs of down
        (experts, rows, width), and what is missing times down's stored weight (experts, rows, hidden). Padding repeats the
        last token of an expert.
        """
        hidden, width = self.experts[0].gate.in_features, self.experts[0].gate.out_features
        size = h.element_size()
        runs = list(cut_runs(routing.counts, hidden * width * size, (5 * hidden + 6 * width) * size))
        first, last, _ = _padded(routing, runs)
        for run, tokens in _tokens_of(routing, runs, first, last):
            experts = [self.experts[e] for e in run.experts]
            gates, ups = [expert.gate for expert in experts], [expert.up for expert in experts]
            x, twin = h[tokens], other[tokens]
            own = self.mix(torch.bmm(x, self._stacked(gates)), torch.bmm(x, self._stacked(ups)))
            wanted = self.mix(torch.bmm(twin, self._stacked(gates, source)), torch.bmm(twin, self._stacked(ups, source)))
            missing = torch.bmm(wanted - own, self._stacked([expert.down for expert in experts]))
            yield run, tokens, own, missing

    def _run(self, run: Run, x: Tensor, out: Tensor, counts: Sequence[int], capture: Capture | None) -> None:
        """x (experts, rows, hidden) -> out, of the same shape."""
        experts = [self.experts[e] for e in run.experts]
        gate = torch.bmm(x, self._stacked([expert.gate for expert in experts]))
        up = torch.bmm(x, self._stacked([expert.up for expert in experts]))
        m = self.mix(gate, up)
        if capture is not None:
            for i, (e, expert) in enumerate(zip(run.experts, experts, strict=True)):
                capture(expert.gate.input_group, x[i, : counts[e]])
                capture(expert.down.input_group, m[i, : counts[e]])
        torch.bmm(m, self._stacked([expert.down for expert in experts]), out=out)

    def _stacked(self, linears: Sequence[LinearSpec], weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """(experts, K, N), copied at every call. weights: in place of the stored ones.

        Runs differ from one batch of rows to the next, and a batched product wants its matrices in a row, so a stack that is
        kept would be copied from as well; without one, replaced weights cannot be missed.
        """
        found = [(self.bank.weights if weights is None else weights)[linear.key] for linear in linears]
        if all(w.t().is_contiguous() for w in found):  # as checkpoints store them: a plain copy, read transposed
            return torch.stack([w.t() for w in found]).transpose(1, 2)
        return torch.stack(found)


@dataclass(frozen=True)
class Run:
    """Experts that are computed together, each with its tokens padded to ``rows``."""

    experts: tuple[int, ...]
    rows: int


def cut_runs(counts: Sequence[int], weight_bytes: int, row_bytes: int, limit_bytes: int = RUN_BYTES) -> Iterator[Run]:
    """Experts that have tokens, by falling number of tokens, in runs with little padding that fit into ``limit_bytes``.

    counts: tokens per expert. weight_bytes: one stacked matrix; row_bytes: activations of one row. An expert that does not
    fit makes a run of its own.
    """
    members: list[int] = []
    tokens = 0
    for e in sorted((e for e, count in enumerate(counts) if count), key=lambda e: -counts[e]):
        rows = counts[members[0]] if members else counts[e]
        padded = rows * (len(members) + 1)
        wasteful = padded - tokens - counts[e] > MOST_PADDING * padded
        if members and (wasteful or padded * row_bytes + (len(members) + 1) * weight_bytes > limit_bytes):
            yield Run(tuple(members), rows)
            members, tokens = [], 0
        members.append(e)
        tokens += counts[e]
    if members:
        yield Run(tuple(members), counts[members[0]])


def _padded(routing: Routing, runs: Sequence[Run]) -> tuple[Tensor, Tensor, Tensor]:
    """Per expert of the runs, in order, its first and last slot in the routing; per (token, choice) its padded row."""
    starts = list(accumulate(routing.counts, initial=0))
    shift, row = [0] * len(routing.counts), 0  # from the places of an expert's slots to its rows
    for run in runs:
        for e in run.experts:
            shift[e] = row - starts[e]
            row += run.rows
    experts = [e for run in runs for e in run.experts]
    device = routing.order.device
    first = _uploaded([starts[e] for e in experts], device)
    last = _uploaded([starts[e + 1] - 1 for e in experts], device)
    return first, last, routing.place + _uploaded(shift, device)[routing.experts]


def _tokens_of(routing: Routing, runs: Sequence[Run], first: Tensor, last: Tensor) -> Iterator[tuple[Run, Tensor]]:
    """For each run the token of each of its rows, (experts, rows). first, last: as `_padded` has them."""
    tokens, done = routing.tokens, 0
    for run in runs:
        members = slice(done, done + len(run.experts))
        slots = first[members, None] + torch.arange(run.rows, device=tokens.device)
        yield run, tokens[torch.minimum(slots, last[members, None])]
        done = members.stop


def _uploaded(numbers: Sequence[int], device: torch.device) -> Tensor:
    """An int64 tensor of host numbers, without waiting for the GPU."""
    return torch.tensor(numbers, dtype=torch.int64).to(device, non_blocking=True)
