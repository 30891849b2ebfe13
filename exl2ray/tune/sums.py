"""Sums of gradients over shares of a step's rows, in an order that does not depend on who computes which share.

The shares of a step are added pairwise along a binary tree, as `exl2ray.quant.sums` adds Hessians.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

Gradients = list[Tensor | None]


class TreeOfSums:
    """Takes the gradients of shares 0, 1, 2, ... in this order. At most one sum for every level of the tree is held."""

    def __init__(self) -> None:
        self._levels: list[tuple[int, Gradients]] = []

    def add(self, gradients: Sequence[Tensor | None]) -> None:
        """Of the next share, any float dtype."""
        level, mine = 0, [None if g is None else g.float() for g in gradients]
        while self._levels and self._levels[-1][0] == level:
            mine, level = _sum(self._levels.pop()[1], mine), level + 1
        self._levels.append((level, mine))

    def total(self) -> Gradients:
        while len(self._levels) > 1:
            _, right = self._levels.pop()
            level, left = self._levels.pop()
            self._levels.append((level + 1, _sum(left, right)))
        return self._levels.pop()[1]


def _sum(left: Gradients, right: Gradients) -> Gradients:
    return [b if a is None else a if b is None else a.add_(b) for a, b in zip(left, right, strict=True)]
