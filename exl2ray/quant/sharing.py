"""Which member of a group quantises which inputs of a module: bringing there what that takes, and the result to everybody.

Inputs (q/k/v together, gate/up together) go to owners by cost; linears of one input stay together, since their solver batch
must not depend on the number of workers. Wide Hessians are factorised by all members (`exl2ray.quant.factorising`). Solving
stays with the owner: a group-wide maximum of scales couples all columns at each of 224 groups of rows of a 70B MLP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from exl2ray.errors import NumericError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.quality import Settings
from exl2ray.quant.block import Linear, Module
from exl2ray.quant.factorising import TOGETHER_ROWS, factorise_together
from exl2ray.quant.group import Comm
from exl2ray.quant.hessian import Factor, HessianAccumulator, input_name, keeps_order
from exl2ray.quant.rows import TreeSum, gather_sums

_ALIGNMENT = 16  # of each tensor that is broadcast in the buffer, so that any dtype can be viewed in place


@dataclass(frozen=True)
class PartialSums:
    """A member's part of what is summed over calibration rows, for inputs that are quantised at a time.

    inputs: input -> the linears on it. trees: Hessians by input; crosses: products for corrected targets, if any.
    targets, after: by share, what the module should produce, and the source model's states after it; with the last sums.
    every: targets are of rows alone whose number is a multiple of it.
    middles: by share, batch by batch, what enters the second linear of the quantised module, if it was kept.
    """

    inputs: Mapping[str, Sequence[Linear]]
    trees: dict[str, TreeSum]
    crosses: dict[str, TreeSum] = field(default_factory=dict)
    targets: dict[int, torch.Tensor] = field(default_factory=dict)
    after: dict[int, torch.Tensor] = field(default_factory=dict)
    middles: dict[int, list[torch.Tensor]] = field(default_factory=dict)
    every: int = 1


@dataclass(frozen=True)
class Owned:
    """Who owns which input, and what this member has for its own: Hessians or, of wide ones, factors; products for corrected
    targets. notes: by input, of what happened to it. routed: tokens that the router sent to each input, of all members."""

    owners: Mapping[str, int]
    routed: Mapping[str, int]
    hessians: dict[str, HessianAccumulator] = field(default_factory=dict)
    factors: dict[str, Factor] = field(default_factory=dict)
    crosses: dict[str, HessianAccumulator] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)


def share_out(comm: Comm, module: Module, sums: PartialSums, settings: Settings, device: torch.device) -> Owned:
    """Chooses an owner for each input and brings the sums there. All members call it.

    ``sums`` holds none of them afterwards, so that a Hessian makes room as soon as its owner has used it. Wide Hessians are
    factorised on the way, by all members, but not where memory is short.
    """
    counts = comm.gather([{g: tree.counts() for g, tree in trees.items()} for trees in (sums.trees, sums.crosses)])
    tokens = {g: sum(c[1] for trees, _ in counts for c in trees[g].values()) for g in sums.inputs}
    routed = {g: sum(c[2] for trees, _ in counts for c in trees[g].values()) for g in sums.inputs}
    owned = Owned(assign_owners(module, sums.inputs, tokens, comm.size), routed)
    spread = comm.size > 1 and module.kind != "moe" and not settings.sums_on_host
    for group, (linear, *_) in sums.inputs.items():
        owner, k, tree = owned.owners[group], linear.in_features, sums.trees.pop(group)
        held = [trees[group] for trees, _ in counts]
        if spread and tokens[group] and k > TOGETHER_ROWS:
            where, natural, notes = input_name(module, group), keeps_order(module, group), list[str]()
            factor = factorise_together(comm, tree, held, owner, device, settings.damping, where, notes, natural)
            if factor is not None:
                owned.factors[group], owned.notes[group] = factor, notes
        else:
            gather_sums(comm, tree, held, owner, k, device)
            if owner == comm.rank:
                owned.hessians[group] = tree.total()
        if group in sums.crosses:
            tree, held = sums.crosses.pop(group), [crosses[group] for _, crosses in counts]
            gather_sums(comm, tree, held, owner, k, device)
            if owner == comm.rank:
                owned.crosses[group] = tree.total()
    return owned


def assign_owners(
    module: Module, inputs: Mapping[str, Sequence[Linear]], tokens: Mapping[str, int], size: int
) -> dict[str, int]:
    """Rank that quantises each input's linears: the most expensive first, each to the least loaded member.

    Cost: a factorisation (K^3 / 3) and the error feedback (K^2 N). An expert that saw fewer tokens than its Hessian has
    dimensions borrows from all others, so then one member has all of them.
    """
    cost = {}
    for group, linears in inputs.items():
        k, n = linears[0].in_features, sum(x.padded_out for x in linears)
        cost[group] = k * k * (k / 3 + n)
    units = [[g] for g in inputs]
    if module.kind == "moe":
        w13 = [g for g in inputs if g.startswith("w13.")]
        if any(tokens[g] < inputs[g][0].in_features for g in w13):
            units = [w13] + [[g] for g in inputs if g not in w13]
    load = [0.0] * size
    owners: dict[str, int] = {}
    for unit in sorted(units, key=lambda u: -sum(cost[g] for g in u)):
        rank = load.index(min(load))
        load[rank] += sum(cost[g] for g in unit)
        owners.update(dict.fromkeys(unit, rank))
    if len(owners) != len(inputs):
        raise NumericError(f"{module.profile_key}: an input was assigned to nobody")
    return owners


def spread(
    comm: Comm, linears: Sequence[Linear], packed: Mapping[str, PackedLinear] | None, owner: int, device: torch.device
) -> dict[str, PackedLinear]:
    """Packed linears by key; the owner passes them in, the others None. All members call it. What comes from elsewhere stays
    on ``device``, but for the groups, which are read on the host."""
    if comm.size == 1 and packed is not None:
        return dict(packed)
    layout = None
    if packed is not None:
        layout = [(n, tuple(t.shape), t.dtype) for x in linears for n, t in packed[x.key].tensors().items()]
    described: list[tuple[str, tuple[int, ...], torch.dtype]] = comm.gather(layout)[owner]
    sizes = [torch.Size(shape).numel() * dtype.itemsize for _, shape, dtype in described]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    flat = torch.zeros(starts[-1], dtype=torch.uint8, device=device)
    if packed is not None:
        everything = [t for x in linears for t in packed[x.key].tensors().values()]
        for t, start, size in zip(everything, starts, sizes, strict=False):
            flat[start : start + size].copy_(t.contiguous().view(-1).view(torch.uint8))
    comm.broadcast(flat, owner)
    if packed is not None:
        return dict(packed)
    found = {
        name: flat[start : start + size].view(dtype).view(shape)
        for (name, shape, dtype), start, size in zip(described, starts, sizes, strict=False)
    }
    return {x.key: _packed(x.key, found) for x in linears}


def _packed(key: str, found: Mapping[str, torch.Tensor]) -> PackedLinear:
    names = ("q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm")
    tensors = {name: found[f"{key}.{name}"] for name in names}
    tensors["q_groups"] = tensors["q_groups"].cpu()
    return PackedLinear(key, **tensors, bias=found.get(f"{key}.bias"))
