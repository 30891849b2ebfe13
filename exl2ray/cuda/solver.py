"""Batched GPTQ: every option of every linear that shares a Hessian, as one wide block of columns.

Columns of a GPTQ problem meet only in the scale search of a group, so a *segment* (one linear under one option, N columns)
is independent of its neighbours, and all segments whose groups have the same row counts run in the same launches.

The loop is left-looking. With H = R R^T (R upper, act-order), U = R^-1 and E = W - Q (the quantisation error so far), the
error-compensated weights of the rows P = [a, c) are

    x_P = W_P + V_P^T E[:a],    V_P = R[:a, P] U_P,    U_P = R[P, P]^-1,

and inside P ordinary GPTQ with U_P goes on, group by group. Derivation: the recursion gives E = U^T e for the scaled errors
e, hence e = R^T E; put into x_P = W_P - U[:a, P]^T e[:a] and use the block form of the triangular inverse. Equal to the
row-by-row loop (`exl2ray.quant.gptq.quantize_reference`) up to rounding, without ever forming U, and with one wide matrix
product per panel of `PANEL` rows in place of a rank-1 update per row.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from exl2ray.cuda.backend import GroupBackend, Workspace, group_backend

PANEL = 512  # rows per outer panel: bounds the traffic of E to K / PANEL reads


@dataclass(frozen=True)
class Segment:
    """One linear under one option: ``weight`` indexes the list of weights, ``bits[g]`` is the width of group g."""

    weight: int
    bits: tuple[int, ...]


@dataclass(frozen=True)
class Solution:
    """Result of one segment. N columns, K rows, G groups."""

    weight: Tensor  # (K, N) float16, natural row order
    codes: Tensor | None  # (K, N) uint8, act-order
    scale_codes: Tensor | None  # (G, N) uint8, 1..16
    scale_max: Tensor  # (G,) float16


def solve_segments(
    r: Tensor | None,  # (K, K) float32 upper, H + damping I = R R^T in act-order; None: round to nearest
    perm: Tensor,  # (K,) int64, act-order
    weights: Sequence[Tensor],  # each (K, N_i), float32 or half, natural row order
    segments: Sequence[Segment],  # all with groups of the same row counts
    rows: tuple[int, ...],  # row count of each group
    keep_codes: bool = False,  # also return integers and scale codes (to pack the result)
    backend: Callable[[Workspace], GroupBackend] = group_backend,
) -> list[Solution]:
    """Quantises every segment. Deterministic on one kind of device; segments come back in the given order."""
    order = sorted(range(len(segments)), key=lambda i: segments[i].weight)
    ordered = [segments[i] for i in order]
    source = _Source(perm, weights, ordered)
    k, columns, device = perm.numel(), source.columns, perm.device
    tallest = max(stop - start for _, _, start, stop in panels(rows))

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    ws = Workspace(
        x=empty(tallest, columns), error=empty(tallest, columns), u=empty(tallest, tallest), perm=perm,
        dq=empty(k, columns, dtype=torch.float16),
        codes=empty(k, columns, dtype=torch.uint8) if keep_codes else None,
        scale_codes=empty(len(rows), columns, dtype=torch.uint8),
        scale_max=empty(len(rows), len(ordered), dtype=torch.float16),
        bounds=tuple(source.bounds), bits=np.array([s.bits for s in ordered], dtype=np.int32), feedback=r is not None,
    )  # fmt: skip
    groups = backend(ws)
    errors = empty(k, columns) if r is not None else None

    for first, last, start, stop in panels(rows):
        height = stop - start
        source.fill(ws.x, start, stop)
        if r is not None and errors is not None:
            inverse = _inverse_upper(r[start:stop, start:stop])
            ws.u[:height, :height] = inverse
            if start:
                v = r[:start, start:stop] @ inverse
                with trailing_precision():
                    ws.x[:height].addmm_(v.T, errors[:start])
        a = 0
        for g in range(first, last):
            b = a + rows[g]
            groups.step(g, a, rows[g], start + a)
            if r is not None and b < height:
                with trailing_precision():
                    ws.x[b:height].addmm_(ws.u[a:b, b:height].T, ws.error[a:b], alpha=-1)
            a = b
        if errors is not None and stop < k:
            source.fill(errors[start:stop], start, stop)
            errors[start:stop] -= ws.dq[perm[start:stop]]

    out: list[Solution | None] = [None] * len(segments)
    for position, i in enumerate(order):
        c0, c1 = source.bounds[position]
        out[i] = Solution(
            ws.dq[:, c0:c1],
            None if ws.codes is None else ws.codes[:, c0:c1],
            ws.scale_codes[:, c0:c1] if keep_codes else None,
            ws.scale_max[:, position],
        )
    return [s for s in out if s is not None]


class _Source:
    """Weights in act-order, laid side by side, and the column ranges of the segments."""

    def __init__(self, perm: Tensor, weights: Sequence[Tensor], segments: Sequence[Segment]) -> None:
        used = sorted({s.weight for s in segments})
        self.ordered = {i: weights[i][perm].float() for i in used}
        self.repeats = [(i, sum(s.weight == i for s in segments)) for i in used]
        self.bounds: list[tuple[int, int]] = []
        column = 0
        for s in segments:
            n = self.ordered[s.weight].shape[1]
            self.bounds.append((column, column + n))
            column += n
        self.columns = column

    def fill(self, out: Tensor, start: int, stop: int) -> None:
        """Writes rows start .. stop of W into the first rows of ``out`` (P, C), once per segment of each linear."""
        column = 0
        for i, times in self.repeats:
            w = self.ordered[i][start:stop]
            n = w.shape[1]
            target = out[: stop - start, column : column + times * n].unflatten(1, (times, n))
            target.copy_(w[:, None, :].expand(-1, times, -1))
            column += times * n


def panels(rows: Sequence[int], size: int = PANEL) -> Iterator[tuple[int, int, int, int]]:
    """(first group, last group + 1, first row, last row + 1) of consecutive panels of about ``size`` rows."""
    first, start, row = 0, 0, 0
    for g, n in enumerate(rows):
        if row > start and row + n - start > size:
            yield first, g, start, row
            first, start = g, row
        row += n
    yield first, len(rows), start, row


def _inverse_upper(r: Tensor) -> Tensor:
    eye = torch.eye(r.shape[0], dtype=r.dtype, device=r.device)
    inverse: Tensor = torch.linalg.solve_triangular(r, eye, upper=True)
    return inverse


@contextlib.contextmanager
def trailing_precision() -> Iterator[None]:
    """TF32 for the trailing updates on a GPU: they change the layer error by about 1e-4 relative (docs/log.md).

    Only these products: everything that touches the factorisation stays in float32.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
