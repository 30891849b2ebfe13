"""Calibration rows: how they are cut into shares and batches, passes over them, how far their outputs are apart, and sums of
Hessians over them, with the same bits whoever holds which rows.

Matrix products of a GPU depend in their last bits on how many rows go into one. So forward passes whose results travel
between workers cut the rows in one way, whoever holds which of them: into SHARES ranges, and these into batches. Sizes of
batches follow from shapes and the device's total memory. The one exception: after running out of memory a module is tried
again with smaller ones, which changes the order of sums.

Floating-point addition is not associative, so the order of sums is fixed, too: those of the shares are added pairwise along a
binary tree. A member of a group adds up the subtrees inside its run of shares and sends one matrix for each; the owner adds
what remains. An alternative, adding shares one after another, needs a matrix per share on the wire; letting the collective
add them is cheapest and gives other bits for every number of members. Siblings meet level by level, so an owner among eight
receives three matrices rather than seven. The price: a group has at most eight members, and up to four partial sums of an
input exist at a time on one GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from math import prod

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.formats.layout import FLOAT16_MAX
from exl2ray.quality import Settings
from exl2ray.quant.block import Block, Check, device_of, has_experts
from exl2ray.quant.group import Comm
from exl2ray.quant.hessian import HessianAccumulator

SHARES = 8  # a power of two; the largest group of workers
WORST_ACCURACY = 1e-6  # what NaN, and errors of 1 and more, come to
ERROR_EVERY, LEAST_ERROR_ROWS = 4, 4  # rows that a reported error is of
LOCKED_WASTE = 1.3  # torch takes page-locked memory by powers of two


def share_rows(rows: int) -> list[range]:
    """The calibration rows of each share; empty ranges where there are fewer rows than shares."""
    return [range(s * rows // SHARES, (s + 1) * rows // SHARES) for s in range(SHARES)]


def batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` calibration rows."""
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))


def shared_batches(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` calibration rows, none of which lies in two shares."""
    for share in share_rows(rows):
        for part in batches(len(share), size):
            yield slice(share.start + part.start, share.start + part.stop)


def error_step(rows: int) -> int:
    """Each how many-th calibration row counts for the reported error of a module, where what the source weights make of its
    input is needed for nothing else: every fourth of them, or what still leaves four rows. Spread over all kinds of text, and
    the same rows whoever holds them. A quarter of the last products is a thirtieth of what a module of 7B shape costs."""
    return max(1, min(ERROR_EVERY, rows // LEAST_ERROR_ROWS))


def error_rows(first: int, every: int) -> slice:
    """Those of rows that begin with number ``first`` whose number is a multiple of ``every``."""
    return slice(-first % every, None, every)


def number_of(rows: slice, count: int) -> int:
    """How many of ``count`` rows these are."""
    return len(range(*rows.indices(count)))


class Arrivals:
    """Puts the results of batches where they are kept, and checks them: on a CPU one by one, on a GPU at the `end`.

    A check waits for the GPU, which would then idle until the next batch is launched. ``check(states, where)`` raises
    NumericError for NaN and clamps infinities.
    """

    def __init__(self, check: Check) -> None:
        self._check = check
        self._seen: list[tuple[Tensor, Tensor, str]] = []  # least and largest value, where it is kept, name

    def put(self, out: Tensor, part: slice, result: Tensor, where: str) -> None:
        """out[part] = result, in out's dtype."""
        if not result.is_cuda:
            self._check(result, where)
        out[part] = result.to(out.dtype)
        if result.is_cuda and result.numel():
            self._seen.append((torch.stack(result.aminmax()), out[part], where))

    def end(self) -> None:
        """Checks what has arrived on a GPU since the last call, with one wait for all of it."""
        if not self._seen:
            return
        finite = torch.isfinite(torch.stack([extrema for extrema, _, _ in self._seen])).all(dim=1).tolist()
        for sound, (_, kept, where) in zip(finite, self._seen, strict=True):
            if not sound:
                self._check(kept, where)
        self._seen.clear()


def room_for_states(shape: Sequence[int], dtype: torch.dtype, home: torch.device, device: torch.device) -> Tensor:
    """An empty tensor for states that a module on ``device`` makes and that are kept at ``home``.

    What a GPU has no room for lies in page-locked memory, if the system allows it: copies are several times as fast, and
    torch hands the memory out again, while ordinary memory comes anew, page by page, for every module.
    """
    nbytes = prod(shape) * dtype.itemsize
    if device.type == "cuda" and home.type == "cpu" and 1 << (nbytes - 1).bit_length() <= LOCKED_WASTE * nbytes:
        with suppress(RuntimeError):
            return torch.empty(*shape, dtype=dtype, pin_memory=True)
    return torch.empty(*shape, dtype=dtype, device=home)


def forward_rows(
    block: Block, x: Tensor, settings: Settings, check: Check, device: torch.device, slices: Iterable[slice] | None = None
) -> Tensor:
    """Output of a block, on ``device``, for all rows; where x lives. slices: the batches of rows; None: as large as
    ``settings`` has."""
    out: Tensor | None = None
    arrivals = Arrivals(check)
    for part in batches(x.shape[0], settings.batch_rows) if slices is None else slices:
        y = block.forward(x[part].to(device))
        if out is None:
            out = room_for_states((x.shape[0], *y.shape[1:]), y.dtype, x.device, device)
        arrivals.put(out, part, y, f"output of {block.module.profile_key}")
    if out is None:
        raise NumericError(f"{block.module.profile_key}: no calibration rows")
    arrivals.end()
    return out


def reference_pass(
    block: Block, x: Tensor, settings: Settings, check: Check, first: int = 0, slices: Iterable[slice] | None = None,
    every: int = 1,
) -> tuple[Tensor, dict[str, HessianAccumulator]]:  # fmt: skip
    """Unquantised forward of all rows: output states, and a Hessian per distinct input ("qkv", "down", "w2.3", ...).

    first: number of the first row. slices: the batches of rows; None: as large ones as ``settings`` has. every: the output of
    rows alone whose number is a multiple of it.
    """
    sizes = {linear.input_group: linear.in_features for linear in block.module.linears}
    device = device_of(block)
    hessians = {group: HessianAccumulator(k, device) for group, k in sizes.items()}
    count, done = number_of(error_rows(first, every), len(x)), 0
    y, arrivals = room_for_states((count, *x.shape[1:]), x.dtype, x.device, device), Arrivals(check)
    for part in batches(x.shape[0], settings.batch_rows) if slices is None else slices:
        xb, wanted = x[part].to(device), error_rows(first + part.start, every)

        def capture(group: str, inputs: Tensor, rows: int = xb.shape[0]) -> None:
            hessians[group].add(inputs, rows)

        if has_experts(block) and settings.all_experts:
            out = block.forward(xb[wanted])
            for group, inputs, routed in block.inputs_of_all_experts(xb):
                hessians[group].add(inputs, xb.shape[0], routed)
        else:
            out = block.forward_some(xb, wanted if every > 1 else None, capture)
        place = f"rows {first + part.start} to {first + part.stop - 1}"
        arrivals.put(y, slice(done, done + len(out)), out, f"output of {block.module.profile_key}, {place}")
        done += len(out)
    arrivals.end()
    return y, hessians


def head_sum(block: Block, x: Tensor, settings: Settings) -> HessianAccumulator:
    """Hessian of the head, whose input is x (R, T, hidden): normed states."""
    (head,) = block.module.linears
    weight = block.weights[head.key]
    out = HessianAccumulator(head.in_features, weight.device)
    for part in batches(x.shape[0], settings.batch_rows):
        out.add(x[part].to(weight.device).to(weight.dtype), part.stop - part.start)
    return out


def relative_error(result: Tensor, target: Tensor) -> Tensor:
    """Sum over the rows of a batch of ||result - target|| / ||target||, a float64 scalar; both (R, T, hidden). 0 of a batch
    of which no row is compared."""
    if not len(result):
        return torch.zeros((), dtype=torch.float64, device=result.device)
    if result.is_cuda:
        from exl2ray.cuda import elementwise

        if elementwise.usable(result, target):
            difference, norm = elementwise.distances(result, target)
            total: Tensor = (difference / norm).double().sum()
            return total
    return row_errors(result, target, target.float().flatten(1).norm(dim=1))


def row_errors(result: Tensor, target: Tensor, norm: Tensor) -> Tensor:
    """Sum over the rows of a batch of ||result - target|| / norm, float64 scalar on the device.

    result, target: (R, T, hidden); norm: (R,) float32 = ||target|| per row.
    """
    if result.dtype == torch.float16:
        result = result.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    total: Tensor = ((result.float() - target.float()).flatten(1).norm(dim=1) / norm).double().sum()
    return total


def accuracy_of(error: float) -> float:
    """1 - error, at least 1e-6; NaN counts as useless."""
    accuracy = 1.0 - error
    return max(WORST_ACCURACY, accuracy) if accuracy == accuracy else WORST_ACCURACY


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
        if self._on_host:
            sibling.h = sibling.h.to(h.h.device)
        left, right = (sibling, h) if position % 2 else (h, sibling)
        left.include(right)
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
