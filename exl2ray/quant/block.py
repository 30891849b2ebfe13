"""What quantisation needs to know of a model: linears, modules, and blocks that can run. `exl2ray.model` has them.

A dense block is one or two halves (attention, MLP): a norm, linears on the common input, a core without weights, one linear
back to the residual stream. A mixture of experts has a router and experts in their place. All tensors of weights are (K, N).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeGuard, TypeVar

import torch
from torch import Tensor

Capture = Callable[[str, Tensor], None]  # (input group, inputs (tokens, K) in compute dtype)
Check = Callable[[Tensor, str], int]  # (states, where): NumericError for NaN; clamps infinities, and says how many


class Linear(Protocol):
    """One linear layer. ``input_group`` names the input that its Hessian comes from; others may share it."""

    @property
    def role(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...
    @property
    def padded_out(self) -> int: ...
    @property
    def weights(self) -> int: ...
    @property
    def padded_weights(self) -> int: ...
    @property
    def input_group(self) -> str: ...
    @property
    def has_bias(self) -> bool: ...


class Module(Protocol):
    """One step of the forward pass, without weights. kind: "attention", "mlp", "parallel", "moe", "head" and others."""

    @property
    def kind(self) -> str: ...
    @property
    def linears(self) -> Sequence[Linear]: ...
    @property
    def quantized(self) -> bool: ...
    @property
    def profile_key(self) -> str: ...


class Half(Protocol):
    """Attention or MLP, stage by stage: ``post(x, linear(second, mid({role: linear(first, pre(x))})))`` is all of it."""

    @property
    def first(self) -> Sequence[Linear]: ...
    @property
    def second(self) -> Linear: ...

    add_residual: bool
    residual_scale: float

    @property
    def post_norm(self) -> object | None: ...
    @property
    def plain_residual(self) -> bool: ...

    def pre(self, x: Tensor) -> Tensor: ...
    def linear(self, linear: str, inputs: Tensor, weight: Tensor | None = None) -> Tensor: ...
    def prepare(self, role: str, out: Tensor) -> Tensor: ...
    def mix(self, outs: Mapping[str, Tensor]) -> Tensor: ...
    def mid(self, outs: Mapping[str, Tensor]) -> Tensor: ...
    def post(self, x: Tensor, out: Tensor) -> Tensor: ...
    def branch(self, n: Tensor, capture: Capture | None = None) -> Tensor: ...


class Bank(Protocol):
    """The weights of a block's linears. watch: sees key, input and output of every linear, for gradients."""

    watch: Callable[[str, Tensor, Tensor], None] | None

    def instead(self, weights: Mapping[str, Tensor]) -> AbstractContextManager[None]: ...
    def linear(self, linear: str, inputs: Tensor, weight: Tensor | None = None) -> Tensor: ...


class Block(Protocol):
    """A module with its weights, on one device. halves: none in a mixture of experts or the head."""

    @property
    def module(self) -> Module: ...
    @property
    def bank(self) -> Bank: ...
    @property
    def halves(self) -> Sequence[Half]: ...
    @property
    def weights(self) -> Mapping[str, Tensor]: ...
    @property
    def biases(self) -> Mapping[str, Tensor]: ...

    def set_weight(self, key: str, weight: Tensor) -> None: ...
    def forward(self, x: Tensor, capture: Capture | None = None) -> Tensor: ...
    def forward_some(self, x: Tensor, rows: slice | None, capture: Capture | None = None) -> Tensor: ...


class Routing(Protocol):
    """Where tokens go: one slot is one (token, choice) pair. ``order``: slots by expert; ``counts``: slots per expert."""

    @property
    def experts(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def order(self) -> Tensor: ...
    @property
    def tokens(self) -> Tensor: ...
    @property
    def counts(self) -> Sequence[int]: ...


class Expert(Protocol):
    """down(act(gate(x)) * up(x))."""

    @property
    def gate(self) -> Linear: ...
    @property
    def up(self) -> Linear: ...
    @property
    def down(self) -> Linear: ...


class Run(Protocol):
    """Experts that are computed together, by number."""

    @property
    def experts(self) -> Sequence[int]: ...


class Experts(Protocol):
    """All experts of a layer."""

    @property
    def experts(self) -> Sequence[Expert]: ...

    def mix(self, gate: Tensor, up: Tensor) -> Tensor: ...
    def computed_in_runs(self, slots: int, device: torch.device) -> bool: ...

    # the run of experts, the token of each of its rows, and two tensors for these
    def differences(
        self, h: Tensor, other: Tensor, routing: Any, source: Mapping[str, Tensor]
    ) -> Iterator[tuple[Run, Tensor, Tensor, Tensor]]: ...


class ExpertBlock(Block, Protocol):
    """A mixture of experts: its stages are public, to route once and then run any candidate weights."""

    @property
    def experts(self) -> Experts: ...

    def pre(self, x: Tensor) -> Tensor: ...
    def route(self, h: Tensor) -> Routing: ...
    def post(self, x: Tensor, y: Tensor) -> Tensor: ...
    def inputs_of_all_experts(self, x: Tensor) -> Iterator[tuple[str, Tensor, int]]: ...

    # routing: what `route` gave, which a Protocol cannot say
    def forward_experts(self, h: Tensor, routing: Any, weights: Mapping[str, Tensor] | None = None) -> Tensor: ...


def has_experts(block: Block) -> TypeGuard[ExpertBlock]:
    """Whether a block is a mixture of experts."""
    return block.module.kind == "moe"


def device_of(block: Block) -> torch.device:
    """Where a block with linears is."""
    return next(iter(block.weights.values())).device


L = TypeVar("L", bound=Linear)


def by_input(linears: Sequence[L]) -> dict[str, list[L]]:
    """Linears by the input they share, in order."""
    groups: dict[str, list[L]] = {}
    for linear in linears:
        groups.setdefault(linear.input_group, []).append(linear)
    return groups
