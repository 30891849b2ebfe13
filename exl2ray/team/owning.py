"""Which member of a group quantises which inputs of a module, and bringing there what that takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from exl2ray.errors import NumericError
from exl2ray.model.blocks import Block
from exl2ray.model.spec import LinearSpec, ModuleSpec
from exl2ray.quant.hessian import Factor, HessianAccumulator, factorise, keeps_order
from exl2ray.quant.measure_moe import expert_factor
from exl2ray.quant.settings import Settings
from exl2ray.team.comm import Comm
from exl2ray.team.factorising import TOGETHER_ROWS, factorise_together
from exl2ray.team.reducing import gather_sums
from exl2ray.team.runner import Runner
from exl2ray.team.tree import Counts, Node, TreeSum


@dataclass(frozen=True)
class Sums:
    """A member's part of what is summed over calibration rows, by input: Hessians, and products for corrected targets."""

    trees: Mapping[str, TreeSum]
    crosses: Mapping[str, TreeSum]

    def counts(self) -> tuple[dict[str, dict[Node, Counts]], dict[str, dict[Node, Counts]]]:
        return {g: t.counts() for g, t in self.trees.items()}, {g: t.counts() for g, t in self.crosses.items()}


@dataclass(frozen=True)
class Owned:
    """What a member has for its own inputs: Hessians or, of wide ones, factors; products for corrected targets; notes."""

    hessians: dict[str, HessianAccumulator] = field(default_factory=dict)
    factors: dict[str, Factor] = field(default_factory=dict)
    moments: dict[str, HessianAccumulator] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)

    def factor(self, block: Block, group: str, settings: Settings, device: torch.device) -> Factor:
        """Of an input, on ``device``; its Hessian is used up, unless other experts may borrow it."""
        notes = self.notes.setdefault(group, [])
        if group in self.factors:
            return self.factors.pop(group)
        if block.module.kind == "moe":
            for name, own in self.hessians.items():  # an expert may borrow from all w1/w3, which are small
                if name == group or name.startswith("w13."):
                    own.h = own.h.to(device)
            factor = expert_factor(block, self.hessians, group, settings, notes)
            if not group.startswith("w13."):
                del self.hessians[group]
            return factor
        own = self.hessians.pop(group)
        own.h = own.h.to(device)
        return factorise(own, settings, _name(block.module, group), notes, keeps_order(block.module, group))


def share_out(
    run: Runner, comm: Comm, module: ModuleSpec, groups: dict[str, list[LinearSpec]], sums: Sums, settings: Settings
) -> tuple[Owned, dict[str, int]]:
    """Brings all sums to the owners of the inputs ``groups``, and uses them up: what this member owns, and who owns what.

    Wide Hessians are factorised on the way, by all members. All members call it.
    """
    counts = comm.gather(sums.counts())
    tokens = {g: sum(c[1] for trees, _ in counts for c in trees[g].values()) for g in groups}
    owners = assign_owners(module, groups, tokens, comm.size)
    owned = Owned()
    for group, linears in groups.items():
        owner = owners[group]
        held = [trees[group] for trees, _ in counts]
        if tokens[group] and _together(run, comm, module, linears):
            _factorise(run, comm, module, group, sums.trees[group], held, owner, settings, owned)
        else:
            gather_sums(comm, sums.trees[group], held, owner, linears[0].in_features, run.device)
            if owner == comm.rank:
                owned.hessians[group] = sums.trees[group].total()
        if group in sums.crosses:
            held = [crosses[group] for _, crosses in counts]
            gather_sums(comm, sums.crosses[group], held, owner, linears[0].in_features, run.device)
            if owner == comm.rank:
                owned.moments[group] = sums.crosses[group].total()
    return owned, owners


def _together(run: Runner, comm: Comm, module: ModuleSpec, linears: Sequence[LinearSpec]) -> bool:
    """Whether the Hessian of an input is factorised by all members. Not where memory is short."""
    wide = linears[0].in_features > TOGETHER_ROWS and module.kind != "moe"
    return wide and comm.size > 1 and not run.sums_on_host(module)


def _factorise(
    run: Runner,
    comm: Comm,
    module: ModuleSpec,
    group: str,
    tree: TreeSum,
    held: Sequence[Mapping[Node, Counts]],
    owner: int,
    settings: Settings,
    owned: Owned,
) -> None:
    where, natural, notes = _name(module, group), keeps_order(module, group), list[str]()
    factor = factorise_together(comm, tree, held, owner, run.device, settings.damping, where, notes, natural)
    if factor is not None:
        owned.factors[group], owned.notes[group] = factor, notes


def _name(module: ModuleSpec, group: str) -> str:
    """An input, for messages."""
    return module.linears[0].key if module.kind == "head" else f"{module.profile_key} ({group})"


def assign_owners(
    module: ModuleSpec, groups: dict[str, list[LinearSpec]], tokens: dict[str, int], size: int
) -> dict[str, int]:
    """Rank that quantises each input's linears: the most expensive first, each to the least loaded member.

    Cost: a factorisation (K^3 / 3) and the error feedback (K^2 N). An expert that saw fewer tokens than its Hessian has
    dimensions borrows from all others, so then one member has all of them.
    """
    cost = {}
    for group, linears in groups.items():
        k, n = linears[0].in_features, sum(x.padded_out for x in linears)
        cost[group] = k * k * (k / 3 + n)
    units = [[g] for g in groups]
    if module.kind == "moe":
        w13 = [g for g in groups if g.startswith("w13.")]
        if any(tokens[g] < groups[g][0].in_features for g in w13):
            units = [w13] + [[g] for g in groups if g not in w13]
    load = [0.0] * size
    owners: dict[str, int] = {}
    for unit in sorted(units, key=lambda u: -sum(cost[g] for g in u)):
        rank = load.index(min(load))
        load[rank] += sum(cost[g] for g in unit)
        owners.update(dict.fromkeys(unit, rank))
    if len(owners) != len(groups):
        raise NumericError(f"{module.profile_key}: an input was assigned to nobody")
    return owners


