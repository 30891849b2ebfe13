"""Sums of Hessians with the same bits whoever holds which rows.

Floating-point addition is not associative, so the order is fixed: rows are cut into shares (`exl2ray.quant.rows`), and the
sums of the shares are added pairwise along a binary tree. A member adds up the subtrees inside its run of shares and sends
one matrix for each; the owner adds what remains. An alternative, adding shares one after another, needs a matrix per share
on the wire; letting the collective add them is cheapest and gives other bits for every number of members. Siblings meet
level by level, so an owner among eight receives three matrices rather than seven. The price: a group has at most eight
members, and up to four partial sums of an input exist at a time on one GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.quant.group import Comm
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.rows import SHARES

Node = tuple[int, int]  # (level, position): covers shares position * 2^level .. (position + 1) * 2^level - 1

Counts = tuple[int, int, int, int]  # calibration rows, tokens, routed tokens, columns


def owner_shares(rank: int, size: int) -> range:
    """The shares that a member of a group keeps."""
    return range(rank * SHARES // size, (rank + 1) * SHARES // size)


class TreeSum:
    """Adds up Hessians of shares as they come, in any order, along the tree.

    ``on_host``: sums that wait for their sibling do so in pinned host memory, for GPUs that cannot hold several.
    """

    def __init__(self, on_host: bool = False) -> None:
        self._nodes: dict[Node, HessianAccumulator] = {}
        self._on_host = on_host

    @staticmethod
    def complete(h: HessianAccumulator) -> TreeSum:
        """Of what is a sum over all rows already."""
        tree = TreeSum()
        tree.add_node((SHARES.bit_length() - 1, 0), h)
        return tree

    def add(self, share: int, h: HessianAccumulator) -> None:
        self.add_node((0, share), h)

    def add_node(self, node: Node, h: HessianAccumulator) -> None:
        """``h`` is consumed."""
        level, position = node
        sibling = self._nodes.pop((level, position ^ 1), None)
        if sibling is None:
            if self._on_host and h.h.is_cuda:
                h.h = to_pinned(h.h)
            self._nodes[node] = h
            return
        sibling.h = sibling.h.to(h.h.device)
        left, right = (sibling, h) if position % 2 else (h, sibling)
        left.h += right.h
        left.rows += right.rows
        left.tokens += right.tokens
        left.routed += right.routed
        self.add_node((level + 1, position // 2), left)

    def counts(self) -> dict[Node, Counts]:
        """Of the sums at hand."""
        return {node: (h.rows, h.tokens, h.routed, h.h.shape[1]) for node, h in self._nodes.items()}

    def at(self, node: Node) -> HessianAccumulator:
        return self._nodes[node]

    def take(self, node: Node) -> HessianAccumulator:
        return self._nodes.pop(node)

    def total(self) -> HessianAccumulator:
        """The whole sum; shares without rows are no part of it."""
        while len(self._nodes) > 1:
            # What is missing has no rows: lift the lowest sum to its parent.
            node = min(self._nodes)
            self.add_node((node[0] + 1, node[1] // 2), self._nodes.pop(node))
        if not self._nodes:
            raise NumericError("a Hessian without calibration rows")
        return next(iter(self._nodes.values()))


def to_pinned(t: Tensor) -> Tensor:
    """A copy of a GPU tensor in pinned host memory: several times quicker to fetch back than pageable memory."""
    return torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t)


def gather_sums(
    comm: Comm, tree: TreeSum, held: Sequence[Mapping[Node, Counts]], owner: int, in_features: int, device: torch.device
) -> None:
    """All members call it; afterwards the owner's tree holds every sum. held: the counts of each member's tree, by rank."""
    for node, source, to, (rows, tokens, routed, columns) in reduction(held, owner):
        if source == comm.rank:
            comm.exchange([(tree.take(node).h.to(device), to)], [])
        elif to == comm.rank:
            received = HessianAccumulator(in_features, device, columns)
            comm.exchange([], [(received.h, source)])
            received.rows, received.tokens, received.routed = rows, tokens, routed
            tree.add_node(node, received)


def reduction(held: Sequence[Mapping[Node, Counts]], owner: int) -> list[tuple[Node, int, int, Counts]]:
    """(sum, from, to, its counts), in order. Siblings meet level by level, several pairs of members at a time, so that the
    owner receives as many matrices as the tree has levels rather than one of every member."""
    where = {node: (rank, counts) for rank, nodes in enumerate(held) for node, counts in nodes.items()}
    moves: list[tuple[Node, int, int, Counts]] = []
    for level in range(SHARES.bit_length() - 1):
        for position in range(0, SHARES >> level, 2):
            left, right = (level, position), (level, position + 1)
            if left not in where or right not in where:
                continue
            (a, here), (b, there) = where.pop(left), where.pop(right)
            to = owner if owner in (a, b) else a
            if a != b:
                moves.append((right, b, to, there) if a == to else (left, a, to, here))
            where[level + 1, position // 2] = (to, (here[0] + there[0], here[1] + there[1], here[2] + there[2], here[3]))
    return moves + [(node, rank, owner, c) for node, (rank, c) in sorted(where.items()) if rank != owner]
