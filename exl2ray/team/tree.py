"""Sums of Hessians with the same bits whoever holds which rows.

Floating-point addition is not associative, so the order is fixed: rows are cut into shares (`exl2ray.quant.rows`), and the
sums of the shares are added pairwise along a binary tree. A member adds up the subtrees inside its run of shares and sends
one matrix for each; the owner adds what remains. An alternative, adding shares one after another, needs a matrix per share
on the wire; letting the collective add them is cheapest and gives other bits for every number of members.
"""

from __future__ import annotations

import torch
from torch import Tensor

from exl2ray.errors import NumericError
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
