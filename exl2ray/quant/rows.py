"""Calibration rows: how they are cut into shares and batches, passes over them, and how far their outputs are apart.

Matrix products of a GPU depend in their last bits on how many rows go into one. So forward passes whose results travel
between workers cut the rows in one way, whoever holds which of them: into SHARES ranges, and these into batches. Sizes of
batches follow from shapes and the device's total memory. The one exception: after running out of memory a module is tried
again with smaller ones, which changes the order of sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.formats.layout import FLOAT16_MAX
from exl2ray.quant.block import Block, Check, device_of, has_experts
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.settings import Settings

SHARES = 8  # a power of two; the largest group of workers
WORST_ACCURACY = 1e-6


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


def forward_rows(
    block: Block, x: Tensor, settings: Settings, check: Check, device: torch.device, slices: Iterable[slice] | None = None
) -> Tensor:
    """Output of a block, on ``device``, for all rows; where x lives. slices: the batches of rows; None: as large as
    ``settings`` has."""
    out: Tensor | None = None
    for part in batches(x.shape[0], settings.batch_rows) if slices is None else slices:
        y = block.forward(x[part].to(device))
        check(y, f"output of {block.module.profile_key}")
        if out is None:
            out = torch.empty((x.shape[0], *y.shape[1:]), dtype=y.dtype, device=x.device)
        out[part] = y
    if out is None:
        raise NumericError(f"{block.module.profile_key}: no calibration rows")
    return out


def reference_pass(
    block: Block, x: Tensor, settings: Settings, check: Check, first: int = 0, slices: Iterable[slice] | None = None
) -> tuple[Tensor, dict[str, HessianAccumulator]]:
    """Unquantised forward of all rows: output states, and a Hessian per distinct input ("qkv", "down", "w2.3", ...).

    first: number of the first row, for messages. slices: the batches of rows; None: as large ones as ``settings`` has.
    """
    sizes = {linear.input_group: linear.in_features for linear in block.module.linears}
    device = device_of(block)
    hessians = {group: HessianAccumulator(k, device) for group, k in sizes.items()}
    y = torch.empty_like(x)
    for part in batches(x.shape[0], settings.batch_rows) if slices is None else slices:
        xb = x[part].to(device)

        def capture(group: str, inputs: Tensor, rows: int = xb.shape[0]) -> None:
            hessians[group].add(inputs, rows)

        if has_experts(block) and settings.all_experts:
            out = block.forward(xb)
            for group, inputs, routed in block.inputs_of_all_experts(xb):
                hessians[group].add(inputs, xb.shape[0], routed)
        else:
            out = block.forward(xb, capture)
        check(out, f"output of {block.module.profile_key}, rows {first + part.start} to {first + part.stop - 1}")
        y[part] = out.to(y.dtype)
    return y, hessians


def head_sum(block: Block, x: Tensor, settings: Settings) -> HessianAccumulator:
    """Hessian of the head, whose input is x (R, T, hidden): normed states."""
    (head,) = block.module.linears
    weight = block.weights[head.key]
    out = HessianAccumulator(head.in_features, weight.device)
    for part in batches(x.shape[0], settings.batch_rows):
        out.add(x[part].to(weight.device).to(weight.dtype), part.stop - part.start)
    return out


def relative_error(result: Tensor, target: Tensor) -> float:
    """Sum over the rows of a batch of ||result - target|| / ||target||; both (R, T, hidden)."""
    if result.is_cuda:
        from exl2ray.cuda import elementwise

        if elementwise.usable(result, target):
            difference, norm = elementwise.distances(result, target)
            return float((difference / norm).double().sum())
    return float(row_errors(result, target, target.float().flatten(1).norm(dim=1)))


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
