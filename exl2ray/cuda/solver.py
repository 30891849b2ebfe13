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

On a GPU the sequence is a few thousand launches that depend only on shapes; for small batches of a shape that comes up often
`exl2ray.cuda.small_batches` replays it as a CUDA graph.

All options at once, one set of launches per row structure: the option tables have three or four. The alternative, one
kernel that owns a linear from the first row to the last, cannot see the group-wide maximum and argmin without a barrier
across the grid. The same Python loop drives the CPU kernels, so the two cannot drift apart.

Coordinate descent (`Batch.descend`): GPTQ rounds a row before it knows the errors of those after it. The sweeps keep Y =
R^T E in the buffer that held E, so that S = R Y are rows of H E without forming H, and the best value of a weight is q + S
/ H_ii: neither W nor E is read. Two sweeps take 5 % (4 bits) to 13 % (2 and 3 bits) off the squared error of a layer, on
top of refined codes as much again; a third and fourth 2 %. Solving whole groups anew, scales included, was no better than
single rows. A sweep costs as many operations as GPTQ itself, so it is done when quantising, not when measuring.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from exl2ray.cuda.backend import OFFSETS, GroupBackend, Workspace
from exl2ray.cuda.cpu import CpuGroups
from exl2ray.quality import PLAIN, Numerics

PANEL = 512  # rows per outer panel: bounds the traffic of E to K / PANEL reads
CHUNK = 32  # rows whose losses are reported together; group sizes are multiples of it


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
    losses: Tensor  # (K / 32,) float32, act-order: sums of e^2; in all tr(E^T (H + damping I) E). Zeros without feedback
    energies: Tensor  # (K / 32,) float32, act-order: sums of E^2


@dataclass(frozen=True)
class Shape:
    """All that the sequence of launches depends on."""

    in_features: int
    rows: tuple[int, ...]  # row count of each group
    widths: tuple[int, ...]  # columns of each linear
    repeats: tuple[int, ...]  # segments of each linear
    feedback: bool
    keep_codes: bool
    device: torch.device
    numerics: Numerics = PLAIN

    @property
    def columns(self) -> int:
        return sum(w * t for w, t in zip(self.widths, self.repeats, strict=True))

    @property
    def bounds(self) -> tuple[tuple[int, int], ...]:
        """Column range of each segment."""
        out, column = [], 0
        for width, times in zip(self.widths, self.repeats, strict=True):
            for _ in range(times):
                out.append((column, column + width))
                column += width
        return tuple(out)

    @property
    def nbytes(self) -> int:
        """Device memory of a batch of this shape."""
        k, c = self.in_features, self.columns
        per_weight = 2 + (4 if self.feedback else 0) + (1 if self.keep_codes else 0)
        trials = 4 * len(OFFSETS) * c if self.numerics.scale_search == "feedback" else 0
        return k * c * per_weight + 4 * k * (k + sum(self.widths)) + trials


def solve_segments(
    r: Tensor | None,  # (K, K) float32 upper, H + damping I = R R^T in act-order; None: round to nearest
    perm: Tensor,  # (K,) int64, act-order
    weights: Sequence[Tensor],  # each (K, N_i), float32 or half, natural row order
    segments: Sequence[Segment],  # all with groups of the same row counts
    rows: tuple[int, ...],  # row count of each group
    keep_codes: bool = False,  # also return integers and scale codes (to pack the result)
    numerics: Numerics = PLAIN,
    run: Run | None = None,  # None: `run_batch`
) -> list[Solution]:
    """Quantises every segment. Deterministic on one kind of device; segments come back in the given order.

    With `exl2ray.cuda.small_batches.run_recorded` the returned tensors may be overwritten by the next call with the same
    shapes: use or copy them first.
    """
    order = sorted(range(len(segments)), key=lambda i: segments[i].weight)
    used = sorted({s.weight for s in segments})
    shape = Shape(
        perm.numel(), rows, tuple(weights[i].shape[1] for i in used),
        tuple(sum(s.weight == i for s in segments) for i in used), r is not None, keep_codes, perm.device, numerics,
    )  # fmt: skip
    bits = torch.tensor([segments[i].bits for i in order], dtype=torch.int32)
    batch = (run or run_batch)(shape, r, perm, [weights[i] for i in used], bits)
    out: list[Solution | None] = [None] * len(segments)
    ws = batch.ws
    for position, i in enumerate(order):
        c0, c1 = shape.bounds[position]
        out[i] = Solution(
            ws.dq[:, c0:c1],
            None if ws.codes is None else ws.codes[:, c0:c1],
            ws.scale_codes[:, c0:c1] if keep_codes else None,
            ws.scale_max[:, position],
            batch.losses[:, position],
            batch.energies[:, position],
        )
    return [s for s in out if s is not None]


Run = Callable[[Shape, Tensor | None, Tensor, Sequence[Tensor], Tensor], "Batch"]  # arguments of `run_batch`


def group_backend(ws: Workspace) -> GroupBackend:
    """Numba CUDA for CUDA tensors, Numba njit otherwise."""
    if ws.x.is_cuda:
        from exl2ray.cuda.gpu import CudaGroups

        return CudaGroups(ws)
    return CpuGroups(ws)


class Batch:
    """Buffers of one shape, and the sequence of operations on them. ``own_factor``: R is copied into a buffer of its own."""

    def __init__(
        self, shape: Shape, backend: Callable[[Workspace], GroupBackend] = group_backend, own_factor: bool = False
    ) -> None:
        self.shape = shape
        k, columns = shape.in_features, shape.columns
        tallest = max(stop - start for _, _, start, stop in panels(shape.rows))

        def empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=shape.device)

        self.r = empty(k, k) if own_factor and shape.feedback else None
        self.own_factor = own_factor
        self.w = empty(k, sum(shape.widths))  # act-order rows of all linears, side by side
        self.errors = empty(k, columns) if shape.feedback else None  # E = W - Q
        self.ws = Workspace(
            x=empty(tallest, columns), error=empty(tallest, columns), u=empty(tallest, tallest),
            perm=empty(k, dtype=torch.int64),
            dq=empty(k, columns, dtype=torch.float16),
            codes=empty(k, columns, dtype=torch.uint8) if shape.keep_codes else None,
            scale_codes=empty(len(shape.rows), columns, dtype=torch.uint8),
            scale_max=empty(len(shape.rows), len(shape.bounds), dtype=torch.float16),
            bounds=shape.bounds, bits=empty(len(shape.bounds), len(shape.rows), dtype=torch.int32),
            feedback=shape.feedback, scale_search=shape.numerics.scale_search,
        )  # fmt: skip
        # per 32 rows and segment; e = R^T E, so the sum of all e^2 is tr(E^T R R^T E)
        self.losses = torch.zeros(k // CHUNK, len(shape.bounds), device=shape.device)
        self.energies = torch.zeros_like(self.losses)
        self.groups = backend(self.ws)

    def load(self, r: Tensor | None, perm: Tensor, weights: Sequence[Tensor], bits: Tensor) -> None:
        """Puts a problem of this shape into the buffers."""
        if self.own_factor and self.r is not None and r is not None:
            self.r.copy_(r)
        else:
            self.r = r
        self.ws.perm.copy_(perm)
        self.ws.bits.copy_(bits, non_blocking=True)  # a few bytes, taken before it returns: does not wait for the GPU
        column = 0
        for w in weights:
            self.w[:, column : column + w.shape[1]].copy_(w[perm])
            column += w.shape[1]

    def run(self) -> None:
        """Quantises what was loaded; the results are in ``ws``."""
        ws, r, errors = self.ws, self.r, self.errors
        inverses = {} if r is None else _inverse_panels(r, self.shape.rows)
        for first, last, start, stop in panels(self.shape.rows):
            height = stop - start
            self._fill(ws.x, start, stop)
            if r is not None and errors is not None:
                inverse = inverses[start]
                ws.u[:height, :height].copy_(inverse)
                if start:
                    v = r[:start, start:stop] @ inverse
                    with trailing_precision():
                        ws.x[:height].addmm_(v.T, errors[:start])
            a = 0
            for g in range(first, last):
                b = a + self.shape.rows[g]
                self.groups.step(g, a, b - a, start + a)
                if r is not None and b < height:
                    with trailing_precision():
                        ws.x[b:height].addmm_(ws.u[a:b, b:height].T, ws.error[a:b], alpha=-1)
                a = b
            rounding = ws.x[:height] if errors is None else errors[start:stop]
            self._fill(rounding, start, stop)
            rounding -= ws.dq[ws.perm[start:stop]]
            self._sum_squares(self.energies, rounding, start)
            if errors is not None:
                self._sum_squares(self.losses, ws.error[:height], start)

        if r is not None and errors is not None and self.shape.numerics.sweeps:
            self._whiten(r, errors)
            for _ in range(self.shape.numerics.sweeps):
                self.descend(r, errors)

    def _whiten(self, r: Tensor, errors: Tensor) -> None:
        """E -> Y = R^T E in place. A panel of Y depends on the rows of E up to its own, so the last one comes first."""
        for _, _, start, stop in reversed(list(panels(self.shape.rows))):
            y = self.ws.x[: stop - start]
            with trailing_precision():
                torch.mm(r[:stop, start:stop].T, errors[:stop], out=y)
            errors[start:stop].copy_(y)

    def descend(self, r: Tensor, y: Tensor) -> None:
        """One sweep of coordinate descent on tr(E^T (H + damping I) E): every weight is rounded anew, the others fixed.

        y (K, C) = R^T E is kept up to date. With S = R Y, the rows of (H + damping I) E, the best value of weight i is
        q_i + S_i / H_ii, q_i the present one. Scales stay. GPTQ rounds a row before it knows the errors of those after it;
        the sweep does, and takes some 10 % off the loss.
        """
        ws = self.ws
        for first, last, start, stop in panels(self.shape.rows):
            height = stop - start
            rows = r[start:stop, start:]
            torch.mm(rows, rows.T, out=ws.u[:height, :height])
            with trailing_precision():
                torch.mm(rows, y[start:], out=ws.x[:height])
            a = 0
            for g in range(first, last):
                b = a + self.shape.rows[g]
                self.groups.descend(g, a, b - a, start + a)
                if b < height:
                    with trailing_precision():
                        ws.x[b:height].addmm_(ws.u[a:b, b:height].T, ws.error[a:b])
                a = b
            with trailing_precision():
                y[start:].addmm_(rows.T, ws.error[:height])
            self._sum_squares(self.losses, y[start:stop], start)
            self._fill(ws.x, start, stop)
            ws.x[:height] -= ws.dq[ws.perm[start:stop]]
            self._sum_squares(self.energies, ws.x[:height], start)

    def _sum_squares(self, out: Tensor, rows: Tensor, start: int) -> None:
        """Sums of squares of ``rows`` (P, C), per 32 rows and segment, into the rows of ``out`` from row ``start`` on."""
        column = segment = 0
        for n, times in zip(self.shape.widths, self.shape.repeats, strict=True):
            part = rows[:, column : column + times * n].unflatten(1, (times, n)).unflatten(0, (-1, CHUNK))
            norms = torch.linalg.vector_norm(part, dim=(1, 3))
            out[start // CHUNK : (start + len(rows)) // CHUNK, segment : segment + times] = norms.square_()
            column += times * n
            segment += times

    def _fill(self, out: Tensor, start: int, stop: int) -> None:
        """Writes rows start .. stop of W into the first rows of ``out`` (P, C), once per segment of each linear."""
        column = source = 0
        for n, times in zip(self.shape.widths, self.shape.repeats, strict=True):
            w = self.w[start:stop, source : source + n]
            target = out[: stop - start, column : column + times * n].unflatten(1, (times, n))
            target.copy_(w[:, None, :].expand(-1, times, -1))
            column += times * n
            source += n


def run_batch(
    shape: Shape,
    r: Tensor | None,
    perm: Tensor,
    weights: Sequence[Tensor],
    bits: Tensor,
    backend: Callable[[Workspace], GroupBackend] = group_backend,
) -> Batch:
    """Loads a problem into a new batch of its shape and runs it; the results are in the batch's workspace."""
    batch = Batch(shape, backend)
    batch.load(r, perm, weights, bits)
    batch.run()
    return batch


def panels(rows: Sequence[int], size: int = PANEL) -> Iterator[tuple[int, int, int, int]]:
    """(first group, last group + 1, first row, last row + 1) of consecutive panels of about ``size`` rows."""
    first, start, row = 0, 0, 0
    for g, n in enumerate(rows):
        if row > start and row + n - start > size:
            yield first, g, start, row
            first, start = g, row
        row += n
    yield first, len(rows), start, row


def _inverse_panels(r: Tensor, rows: Sequence[int]) -> dict[int, Tensor]:
    """First row of each panel -> inverse of its diagonal block of R, float32. Panels of one height at a time: small systems,
    a tenth of a millisecond each on a GPU when solved one after another."""
    by_height: dict[int, list[int]] = {}
    for _, _, start, stop in panels(rows):
        by_height.setdefault(stop - start, []).append(start)
    out: dict[int, Tensor] = {}
    for height, starts in by_height.items():
        blocks = torch.stack([r[s : s + height, s : s + height] for s in starts])
        eye = torch.eye(height, dtype=r.dtype, device=r.device).expand_as(blocks)
        inverses = torch.linalg.solve_triangular(blocks, eye, upper=True)
        out.update(zip(starts, inverses, strict=True))
    return out


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
