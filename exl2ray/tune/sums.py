"""Gradients of a step, whoever computes which of its rows.

The rows of a step are cut into `SHARES`, whatever the number of workers, and the gradients of the shares are added pairwise
along a binary tree, as `exl2ray.quant.rows` adds Hessians: so the bits are the same for one worker and for several. Every
tensor has an owner among them, who gets the sums of the others, keeps the state of the optimiser and takes the step; the
others are given the weights that come of it. Letting a collective add gradients is less to send and gives other bits for
every number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from exl2ray.quant.group import Comm, Exchange

SHARES = 4  # of a step's rows; a power of two, the largest group of workers
Node = tuple[int, int]  # (level, position): covers shares position * 2^level .. (position + 1) * 2^level - 1
Gradients = list[Tensor]


class TreeOfSums:
    """Adds the gradients of shares along the tree, in whatever order they come. What is added is consumed."""

    def __init__(self) -> None:
        self.nodes: dict[Node, Gradients] = {}

    def add(self, share: int, gradients: Sequence[Tensor]) -> None:
        """float32."""
        self.add_node((0, share), list(gradients))

    def add_node(self, node: Node, mine: Gradients) -> None:
        level, position = node
        sibling = self.nodes.pop((level, position ^ 1), None)
        if sibling is None:
            self.nodes[node] = mine
            return
        left, right = (sibling, mine) if position % 2 else (mine, sibling)
        self.add_node((level + 1, position // 2), [a.add_(b) for a, b in zip(left, right, strict=True)])

    def total(self) -> Gradients:
        """The whole sum; shares without rows are no part of it."""
        while len(self.nodes) > 1:  # what is missing has no rows: lift the lowest sum to its parent
            level, position = node = min(self.nodes)
            self.add_node((level + 1, position // 2), self.nodes.pop(node))
        return next(iter(self.nodes.values()))


def shares_of(rank: int, size: int, count: int) -> range:
    """The shares of ``count`` that a member of a group computes; perhaps none."""
    return range(rank * count // size, (rank + 1) * count // size)


def owners_of(sizes: Sequence[int], members: int) -> list[int]:
    """The member who owns each tensor: the largest ones first, each to who has least."""
    load, owners = [0] * members, [0] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owners[i] = min(range(members), key=lambda rank: (load[rank], rank))
        load[owners[i]] += sizes[i]
    return owners


def bring_to_owners(
    comm: Comm, tree: TreeOfSums, leaves: Sequence[Tensor], owners: Sequence[int], count: int
) -> Callable[[], list[Tensor | None]]:
    """All members call it, for the same leaves, and what they get, which waits for the others: the sums over all ``count``
    shares of the leaves that this member owns."""
    if comm.size == 1:
        return lambda: list(tree.total())
    runs = [_nodes_of(shares_of(rank, comm.size, count)) for rank in range(comm.size)]
    mine = [i for i, owner in enumerate(owners) if owner == comm.rank]
    whole, sends, receives = TreeOfSums(), [], []
    arrived: list[tuple[Node, Gradients]] = []
    for rank, nodes in enumerate(runs):
        for node in nodes:
            if rank == comm.rank:
                sends += [(t.contiguous(), to) for t, to in zip(tree.nodes[node], owners, strict=True) if to != rank]
                arrived.append((node, [tree.nodes[node][i] for i in mine]))
            else:
                found = [torch.empty(leaves[i].shape, device=leaves[i].device) for i in mine]
                receives += [(t, rank) for t in found]
                arrived.append((node, found))
    underway = comm.start(sends, receives)

    def sums() -> list[Tensor | None]:
        underway.wait()
        for node, found in arrived:
            whole.add_node(node, found)
        total = dict(zip(mine, whole.total(), strict=True))
        return [total.get(i) for i in range(len(leaves))]

    return sums


def give_to_others(comm: Comm, leaves: Sequence[Tensor], owners: Sequence[int]) -> Exchange:
    """All members call it: when it has been waited for, every leaf is that of its owner, in place."""
    values = [leaf.detach() for leaf in leaves]
    others = [rank for rank in range(comm.size) if rank != comm.rank]
    sends = [(t, to) for t, owner in zip(values, owners, strict=True) if owner == comm.rank for to in others]
    return comm.start(sends, [(t, owner) for t, owner in zip(values, owners, strict=True) if owner != comm.rank])


def _nodes_of(shares: range) -> list[Node]:
    """What sums a member with these shares has when it has added what it can."""
    tree = TreeOfSums()
    for share in shares:
        tree.add(share, [])
    return sorted(tree.nodes)
