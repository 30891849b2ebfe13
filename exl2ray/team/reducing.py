"""Bringing the partial sums of a group's members to one of them, along the tree of shares (`exl2ray.team.tree`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.rows import SHARES
from exl2ray.team.comm import Comm
from exl2ray.team.tree import Counts, Node, TreeSum


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
