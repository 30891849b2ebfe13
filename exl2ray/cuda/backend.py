"""The group step behind one interface (`exl2ray.cuda.gpu`, `exl2ray.cuda.cpu`): buffers, constants, blocks of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from exl2ray.quality import ScaleSearch

if TYPE_CHECKING:  # kernels are compiled without torch (`exl2ray.cuda.compiling`)
    from torch import Tensor

GRID_POINTS = 97
# Refinement of scale codes (`exl2ray.quant.gptq.refine_codes`): least width whose codes are refined (with two bits the loss
# of a layer misleads), most rows of a group (what a kernel holds), weight of the error along the weights, changes of a code
# that are tried, in order.
REFINED_BITS, REFINED_ROWS, SHRINKAGE = 3, 128, 1.0
OFFSETS = (0, -1, 1, -2, 2, -3, 3)


@dataclass
class Workspace:
    """Buffers of one batch of segments. C columns, K rows, G groups, S segments, P rows of the largest panel."""

    x: Tensor  # (P, C) float32, current weights of the panel
    error: Tensor  # (P, C) float32, scaled errors e of the panel
    u: Tensor  # (P, P) float32, the panel's block of U
    perm: Tensor  # (K,) int64
    dq: Tensor  # (K, C) float16, natural row order
    codes: Tensor | None  # (K, C) uint8, act-order
    scale_codes: Tensor  # (G, C) uint8
    scale_max: Tensor  # (G, S) float16
    bounds: tuple[tuple[int, int], ...]  # column range of each segment
    rows: tuple[int, ...]  # row count of each group
    bits: Tensor  # (S, G) int32
    feedback: bool
    scale_search: ScaleSearch = "error"  # "feedback" needs feedback


class GroupBackend(Protocol):
    def step(self, g: int, a: int, n: int, row: int) -> None:
        """Quantises group g of every segment: rows a .. a+n of the panel, rows row .. row+n in act-order.

        Reads ``x`` and ``u``; writes dq, codes, scale_codes[g], scale_max[g] and, with feedback, rows a.. of ``error``.
        """
        ...

    def descend(self, groups: range, start: int) -> None:
        """Rounds the weights of a panel's groups anew, one row after another, with the scales that they have.

        ``x`` holds S = H E, ``u`` the panel's block of H: weight i becomes the nearest to dq_i + S_i / H_ii. Updates dq,
        codes and ``x``; writes ``error``: dq before - after. start: act-order number of the panel's first row.
        """
        ...


def blocks_of(bounds: Sequence[tuple[int, int]], size: int) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of at most ``size`` columns that do not straddle segments.

    Returns (B, 3) int32 rows of (segment, first column, last column + 1) and (S + 1,) int32, first block of each segment.
    """
    blocks = [(s, c, min(c + size, c1)) for s, (c0, c1) in enumerate(bounds) for c in range(c0, c1, size)]
    table = np.array(blocks, dtype=np.int32)
    first = np.searchsorted(table[:, 0], np.arange(len(bounds) + 1)).astype(np.int32)
    return table, first


def shrink_grid(padded: int = GRID_POINTS) -> np.ndarray:
    """(padded,) float32 shrink factors, the numbers of `exl2ray.quant.gptq.grid`; the padding repeats the last."""
    t = np.minimum(np.arange(padded), GRID_POINTS - 1).astype(np.float32) / np.float32(GRID_POINTS - 1)
    points: np.ndarray = (np.float32(0.70) * (1 - t) + np.float32(1.2) * t).astype(np.float32)
    return points
