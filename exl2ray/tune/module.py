"""One module of the model that is tuned: its forward pass, what is trained of it, and the optimiser of that."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.formats import roles
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.model.blocks import Block, MoeBlock, NormBlock
from exl2ray.model.half import Norm
from exl2ray.model.spec import LinearSpec, ModuleSpec
from exl2ray.team.packed_files import HostCopies, recorded
from exl2ray.tune.adam import Adam
from exl2ray.tune.gains import Gain
from exl2ray.tune.grid import Grid
from exl2ray.tune.judge import PARTS
from exl2ray.tune.sums import owners_of

NORM_ROLES = ("norm", "post_norm", "q_norm", "k_norm")
NORMS, ATTENTION, MLP, HEAD = PARTS


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What tuning has made of a module, on the host: codes (K, N) uint8 by linear; values by gain, float16."""

    codes: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


@dataclass(eq=False)
class TunedLinear:
    """``before``: as it was packed. ``latents``: (K, N) float32, trained; None: another worker has them."""

    before: PackedLinear
    grid: Grid
    latents: Tensor | None

    def weight(self) -> Tensor:
        """(K, N) float16, as it would be stored now."""
        integers = self.grid.integers(self.before) if self.latents is None else self.grid.rounded(self.latents)
        return self.grid.weight(integers)


class TunedModule:
    """``block`` computes with what would be stored at the moment.

    Gradients are asked for with respect to ``leaves``; `update` takes them, summed over the tokens of a step. Leaves stay the
    tensors that they are and change in place, for a recorded step reads them where they were. ``owners``: the worker, of
    ``size``, that each leaf belongs to; this is worker ``rank``.
    """

    def __init__(
        self, block: Block, linears: Mapping[str, TunedLinear], gains: Sequence[Gain], rank: int = 0, size: int = 1
    ) -> None:
        self.block, self.rank = block, rank
        self.linears = dict(linears)
        self.gains = {gain.name: gain for gain in gains}
        self.leaves = self._installed()
        self.owners = owners_of([leaf.numel() for leaf in self.leaves], size)
        own = {name for name, owner in zip(self.names, self.owners, strict=True) if owner == rank}
        for key in self.linears.keys() - own:
            self.linears[key].latents = None
        latents = {f"{key}.latents": x.latents for key, x in self.linears.items() if x.latents is not None}
        deltas = {f"{name}.delta": g.delta for name, g in self.gains.items() if name in own}
        self.optimisers = (Adam(latents), Adam(deltas))
        self.owned = own
        self.updating: Callable[[TunedModule], None] = lambda module: None  # called before every step
        self.updated: Callable[[TunedModule], None] = lambda module: None  # and after it

    @property
    def names(self) -> list[str]:
        """Of the linears and gains, in the order of ``leaves``."""
        return [*self.linears, *self.gains]

    @property
    def trained(self) -> bool:
        return bool(self.leaves)

    @property
    def key(self) -> str:
        return self.block.module.profile_key

    def state(self) -> dict[str, Tensor]:
        """Latents, deltas and moments of what this worker owns, by names of their own; the tensors themselves."""
        out = {}
        for optimiser in self.optimisers:
            out.update({f"now/{name}": p for name, p in optimiser.parameters.items()})
            for kind, moments in optimiser.moments.items():
                out.update({f"{kind}/{name}": m for name, m in moments.items()})
        return out

    def of_others(self) -> dict[str, Tensor]:
        """The leaves that other workers own, by name."""
        return {name: leaf for name, leaf in zip(self.names, self.leaves, strict=True) if name not in self.owned}

    @torch.no_grad()
    def take(self, state: Mapping[str, Tensor], others: Mapping[str, Tensor], steps: int) -> None:
        """Takes up this worker's `state` after ``steps`` steps and the leaves of others. What ``state`` lacks stays."""
        for name, tensor in self.state().items():
            if name in state:
                tensor.copy_(state[name], non_blocking=True)
        for optimiser in self.optimisers:
            optimiser.count(steps)
        self.refresh()
        for name, leaf in self.of_others().items():
            leaf.copy_(others[name])

    @torch.no_grad()
    def restore(self, found: Mapping[str, Tensor], steps: int) -> None:
        """Takes up a checkpoint after ``steps`` steps; found: the states of all workers together."""
        others = {}
        for name in self.of_others():
            if name in self.linears:
                grid = self.linears[name].grid
                others[name] = grid.weight(grid.rounded(found[f"now/{name}.latents"].to(grid.low.device, copy=True)))
            else:
                gain = self.gains[name]
                others[name] = as_leaf(gain, gain.value(found[f"now/{name}.delta"].to(gain.scale.device)), self.block)
        self.take(found, others, steps)

    @torch.no_grad()
    def _installed(self) -> list[Tensor]:
        weights = {key: x.weight() for key, x in self.linears.items()}
        leaves = install(self.block, weights, [(g, g.value()) for g in self.gains.values()])
        return [leaf.requires_grad_() for leaf in leaves]

    @torch.no_grad()
    def refresh(self) -> None:
        """Puts the weights of this worker that would be stored now into the block."""
        linears, gains = self.leaves[: len(self.linears)], self.leaves[len(self.linears) :]
        for leaf, x in zip(linears, self.linears.values(), strict=True):
            if x.latents is not None:
                leaf.copy_(x.weight())
        for leaf, gain in zip(gains, self.gains.values(), strict=True):
            if gain.name in self.owned:
                leaf.copy_(as_leaf(gain, gain.value(), self.block))

    def update(self, gradients: Sequence[Tensor | None], rate: Tensor, gain_rate: Tensor) -> None:
        """One step of Adam. gradients: float32, in the order of ``leaves``; None for those of other workers."""
        self.updating(self)
        latents, deltas = self.optimisers
        found = {name: g for name, g in zip(self.names, gradients, strict=True) if g is not None}
        latents.step([found[key] for key, x in self.linears.items() if x.latents is not None], rate)
        deltas.step([g.gradient(found[name]) for name, g in self.gains.items() if name in self.owned], gain_rate)
        self.refresh()

    @torch.no_grad()
    def snapshot(self, before: Snapshot | None = None, copies: HostCopies | None = None) -> Snapshot:
        """Of what this worker owns. before: an earlier one, whose memory may be used again. copies: those of a GPU."""
        latents = {key: (x.grid, x.latents) for key, x in self.linears.items() if x.latents is not None}
        codes = {key: grid.codes(grid.rounded(found)) for key, (grid, found) in latents.items()}
        if copies is not None:
            codes = copies.copy(codes, recorded(), before.codes if before is not None else None)
        return Snapshot(codes, {name: g.value().cpu() for name, g in self.gains.items() if name in self.owned})


def install(block: Block, weights: Mapping[str, Tensor], gains: Sequence[tuple[Gain, Tensor]]) -> list[Tensor]:
    """Puts float16 weights and values of gains into a block; what the block computes with, in that order."""
    leaves = []
    for key, weight in weights.items():
        block.bank.weights[key] = weight.to(block.bank.dtype)
        leaves.append(block.bank.weights[key])
    norms = norms_of(block)
    for gain, value in gains:
        if gain.role in block.bank.specs:
            block.bank.biases[gain.role] = as_leaf(gain, value, block)
            leaves.append(block.bank.biases[gain.role])
            continue
        leaf = as_leaf(gain, value, block)
        role, is_bias = gain.role.removesuffix(".bias"), gain.role.endswith(".bias")
        for norm in norms[role]:
            if is_bias:
                norm.bias = leaf
            else:
                norm.weight = leaf
        leaves.append(leaf)
    return leaves


def as_leaf(gain: Gain, value: Tensor, block: Block) -> Tensor:
    """A value of a gain, float16, as the block computes with it: a bias in its dtype, a norm in float32 with its offset."""
    return value.to(block.bank.dtype) if gain.role in block.bank.specs else value.float() + gain.offset


def norms_of(block: Block) -> dict[str, list[Norm]]:
    """The norms of a block by role; those of a parallel block share one weight."""
    found: dict[str, list[Norm]] = {}
    if isinstance(block, NormBlock):
        found["norm"] = [block.norm]
    if isinstance(block, MoeBlock):
        found["norm"] = [block.experts.norm]
    for half in block.halves:
        for role in NORM_ROLES:
            norm = getattr(half, role, None)
            if norm is not None:
                found.setdefault(role, []).append(norm)
    return found


def part_of(module: ModuleSpec, linear: LinearSpec) -> str:
    """Which of `exl2ray.tune.judge.PARTS` a linear belongs to."""
    if module.kind == "head":
        return HEAD
    return ATTENTION if linear.role in roles.ATTENTION else MLP
