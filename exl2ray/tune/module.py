"""One module of the model that is tuned: its forward pass, what is trained of it, and the optimiser of that."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.model.blocks import Block, MoeBlock, NormBlock
from exl2ray.model.half import Norm
from exl2ray.tune.adam import Adam
from exl2ray.tune.gains import Gain
from exl2ray.tune.grid import Grid
from exl2ray.tune.judge import PARTS

NORM_ROLES = ("norm", "post_norm", "q_norm", "k_norm")
ATTENTION_ROLES = ("q_proj", "k_proj", "v_proj", "o_proj")
NORMS, ATTENTION, MLP, HEAD = PARTS


@dataclass(frozen=True, eq=False)
class Snapshot:
    """What tuning has made of a module, on the host: codes (K, N) uint8 by linear, deltas by gain."""

    codes: Mapping[str, Tensor]
    deltas: Mapping[str, Tensor]


@dataclass(eq=False)
class TunedLinear:
    """``before``: as it was packed. ``latents``: (K, N) float32, trained."""

    before: PackedLinear
    grid: Grid
    latents: Tensor


class TunedModule:
    """``block`` computes with what would be stored at the moment: call `refresh` after every change.

    Gradients are asked for with respect to ``leaves``; `update` takes them, summed over the tokens of a step. Leaves stay the
    tensors that they are and change in place, for a recorded step reads them where they were.
    """

    def __init__(self, block: Block, linears: Mapping[str, TunedLinear], gains: Sequence[Gain]) -> None:
        self.block = block
        self.linears = dict(linears)
        self.gains = {gain.name: gain for gain in gains}
        latents = Adam({f"{key}.latents": x.latents for key, x in self.linears.items()})
        self.optimisers = (latents, Adam({f"{name}.delta": g.delta for name, g in self.gains.items()}))
        self.leaves = self._installed()

    @property
    def trained(self) -> bool:
        return bool(self.leaves)

    @property
    def key(self) -> str:
        return self.block.module.profile_key

    def parameters(self) -> dict[str, Tensor]:
        """Latents and deltas by a name of their own."""
        return {name: p for optimiser in self.optimisers for name, p in optimiser.parameters.items()}

    @torch.no_grad()
    def _installed(self) -> list[Tensor]:
        weights = {key: x.grid.weight(x.grid.rounded(x.latents)) for key, x in self.linears.items()}
        leaves = install(self.block, weights, [(g, g.value()) for g in self.gains.values()])
        return [leaf.requires_grad_() for leaf in leaves]

    @torch.no_grad()
    def refresh(self) -> None:
        """Puts the weights that would be stored now into the block."""
        linears, gains = self.leaves[: len(self.linears)], self.leaves[len(self.linears) :]
        for leaf, x in zip(linears, self.linears.values(), strict=True):
            leaf.copy_(x.grid.weight(x.grid.rounded(x.latents)))
        for leaf, gain in zip(gains, self.gains.values(), strict=True):
            leaf.copy_(as_leaf(gain, gain.value(), self.block))

    def update(self, gradients: Sequence[Tensor | None], rate: Tensor, gain_rate: Tensor) -> None:
        """One step of Adam. gradients: float32, in the order of ``leaves``; None for experts that saw no token."""
        latents, deltas = self.optimisers
        of_values = zip(self.gains.values(), gradients[len(self.linears) :], strict=True)
        latents.step(gradients[: len(self.linears)], rate)
        deltas.step([None if g is None else gain.gradient(g) for gain, g in of_values], gain_rate)
        self.refresh()

    @torch.no_grad()
    def snapshot(self) -> Snapshot:
        codes = {key: x.grid.codes(x.grid.rounded(x.latents)).cpu() for key, x in self.linears.items()}
        return Snapshot(codes, {name: g.delta.cpu().clone() for name, g in self.gains.items()})

    @torch.no_grad()
    def install_in(self, block: Block, found: Snapshot, parts: Collection[str]) -> None:
        """Gives another block of this module the weights of a snapshot; those of the beginning for what is none of ``parts``
        (`exl2ray.tune.judge.PARTS`)."""
        weights = {}
        for key, x in self.linears.items():
            codes = x.grid.signed(found.codes[key]) if self.part_of(key) in parts else x.grid.integers(x.before)
            weights[key] = x.grid.weight(codes)
        gains = NORMS in parts
        values = [(g, g.value(found.deltas[n].to(g.scale.device)) if gains else g.stored) for n, g in self.gains.items()]
        install(block, weights, values)

    def part_of(self, key: str) -> str:
        """Which of `exl2ray.tune.judge.PARTS` a linear belongs to."""
        if self.block.module.kind == "head":
            return HEAD
        role = next(x.role for x in self.block.module.linears if x.key == key)
        return ATTENTION if role in ATTENTION_ROLES else MLP

    @property
    def parts(self) -> set[str]:
        """Those that something of this module belongs to."""
        return {self.part_of(key) for key in self.linears} | ({NORMS} if self.gains else set())

    def changed_share(self, found: Snapshot, parts: Collection[str]) -> tuple[int, int]:
        """(integers of ``parts`` that differ from the beginning, all that there are)."""
        changed = total = 0
        for key, x in self.linears.items():
            before = x.grid.codes(x.grid.integers(x.before))
            if self.part_of(key) in parts:
                changed += int((found.codes[key].to(before.device) != before).sum())
            total += before.numel()
        return changed, total


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
