"""Factorising a wide Hessian as a group, while its sum is still spread over the members.

One member alone takes 0.24 s of the 0.97 of a module for the 28672 inputs of a 70B MLP, and all others would have nothing to
do. Members send each other block rows of their partial sums instead of whole matrices, add them up in the order of the tree,
and factorise together (`exl2ray.quant.cholesky`): the bits are those of a worker alone, since products have the shape that
their block prescribes, whoever makes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exl2ray.quant import cholesky
from exl2ray.quant.group import Comm
from exl2ray.quant.hessian import Factor, HessianAccumulator, plan_factor, round_to_nearest
from exl2ray.quant.rows import Counts, Node, TreeSum

TOGETHER_ROWS = 16384  # up to so many inputs, a member alone is as fast


def factorise_together(
    comm: Comm,
    tree: TreeSum,
    held: Sequence[Mapping[Node, Counts]],
    owner: int,
    device: torch.device,
    damping: float,
    where: str,
    notes: list[str],
    natural: bool,
) -> Factor | None:
    """`exl2ray.quant.hessian.factorise` of the sum of all members' ``tree``, which is used up. All members call it.

    held: the counts of each member's tree, by rank; at least one token in all. The owner gets the factor and
    the notes, the others None. Raises NumericError on all members if the sum is not finite.
    """
    diagonal, rows = _diagonal(comm, tree, held)
    diagonal = diagonal.to(device)
    plan = plan_factor(diagonal, rows, damping, where, natural)
    k = len(diagonal)
    sums = _block_rows(comm, tree, held, plan.perm.flip(0), device)
    r = torch.zeros(k, k, dtype=torch.float32, device=device) if comm.rank == owner else None
    for attempt, added in enumerate(plan.dampings(), start=1):
        mine = {i: cholesky.prepared(total, i, rows, added) for i, total in sums.items()}
        if cholesky.factorise_rows(mine, k, comm, device, r):
            if r is None:
                return None
            factor = Factor(plan.perm, r, added, attempt, plan.mean)
            if factor.note:
                notes.append(f"{where}: {factor.note}")
            return factor
        if r is not None:
            r.zero_()
    if not all(comm.gather(all(bool(torch.isfinite(t).all()) for t in sums.values()))):
        raise plan.failure(where)
    if comm.rank != owner:
        return None
    notes.append(f"{plan.failure(where).message}: rounded to nearest without error feedback")
    return round_to_nearest(diagonal, natural, rows)


def _diagonal(comm: Comm, tree: TreeSum, held: Sequence[Mapping[Node, Counts]]) -> tuple[Tensor, int]:
    """Diagonal (K,) float32 of the whole sum, on the CPU, and its calibration rows."""
    total = TreeSum()
    mine = {node: tree.at(node).h.diagonal().contiguous().cpu() for node in held[comm.rank]}
    for rank, member in enumerate(comm.gather(mine)):
        for node in sorted(member):
            total.add_node(node, _with(member[node][:, None].clone(), held[rank][node]))
    found = total.total()
    return found.h[:, 0], found.rows


def _block_rows(
    comm: Comm, tree: TreeSum, held: Sequence[Mapping[Node, Counts]], order: Tensor, device: torch.device
) -> dict[int, Tensor]:
    """This member's block rows of the whole sum in ``order`` (`cholesky.block_row`), by index."""
    own = {node: tree.take(node).h for node in sorted(held[comm.rank])}
    holders = cholesky.holders(len(order), comm.size)
    out: dict[int, Tensor] = {}
    for start in range(0, len(holders), comm.size):  # a few at a time, since copies of them wait on both sides
        batch = range(start, min(start + comm.size, len(holders)))
        sends: list[tuple[Tensor, int]] = []
        receives: list[tuple[Tensor, int]] = []
        arriving: dict[int, list[tuple[Node, Counts, Tensor]]] = {i: [] for i in batch if holders[i] == comm.rank}
        for i in batch:
            for source, nodes in enumerate(held):
                for node in sorted(nodes):
                    if source == comm.rank:
                        part = cholesky.block_row(own[node], order, i).to(device)
                        if holders[i] == comm.rank:
                            arriving[i].append((node, nodes[node], part))
                        else:
                            sends.append((part, holders[i]))
                    elif holders[i] == comm.rank:
                        part = torch.empty(cholesky.block_shape(len(order), i), dtype=torch.float32, device=device)
                        receives.append((part, source))
                        arriving[i].append((node, nodes[node], part))
        comm.exchange(sends, receives)
        for i, parts in arriving.items():
            total = TreeSum()
            for node, counts, part in parts:
                total.add_node(node, _with(part, counts))
            out[i] = total.total().h
    return out


def _with(part: Tensor, counts: Counts) -> HessianAccumulator:
    """A part of a sum."""
    h = HessianAccumulator(part.shape[0], part.device, part.shape[1])
    h.h = part
    h.rows, h.tokens, h.routed = counts[:3]
    return h
