"""A module on calibration rows with its source weights: what measuring and quantising begin with (`exl2ray.quant.module`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from exl2ray.quality import Settings
from exl2ray.quant.block import Block, Check, by_input, device_of
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.rows import (
    TreeSum,
    batches,
    error_rows,
    error_step,
    forward_rows,
    head_sum,
    reference_pass,
    relative_error,
    room_for_states,
    share_rows,
    shared_batches,
)


@dataclass(frozen=True)
class Entered:
    """A module that all calibration rows went through with its source weights.

    x, y: (R, T, hidden) states before and after it; the head has no y. hessians: of all inputs, over all rows.
    """

    block: Block
    x: Tensor
    y: Tensor | None
    hessians: dict[str, HessianAccumulator]
    settings: Settings


def enter_module(block: Block, x: Tensor, settings: Settings, check: Check) -> Entered:
    """Runs a module with its source weights on all rows x (R, T, hidden).

    The bits are those of rows that are spread over workers; where partial sums would have to leave the GPU, rows are summed
    one after another instead. ``check(states, where)`` raises NumericError for NaN and clamps infinities.
    """
    if block.module.kind == "head":
        group = block.module.linears[0].input_group
        return Entered(block, x, None, {group: head_sum(block, x, settings)}, settings)
    if settings.sums_on_host:
        slices = shared_batches(len(x), settings.batch_rows)
        return Entered(block, x, *reference_pass(block, x, settings, check, slices=slices), settings)
    trees, y = empty_trees(block), room_for_states(x.shape, x.dtype, x.device, device_of(block))
    for s, rows in enumerate(share_rows(len(x))):
        if len(rows):
            part = slice(rows.start, rows.stop)
            y[part] = add_share(trees, s, block, x[part], settings, check, rows.start)
    return Entered(block, x, y, {group: tree.total() for group, tree in trees.items()}, settings)


def empty_trees(block: Block, on_host: bool = False) -> dict[str, TreeSum]:
    """A sum for each input of a module."""
    return {group: TreeSum(on_host) for group in by_input(block.module.linears)}


def add_share(
    trees: Mapping[str, TreeSum], share: int, block: Block, x: Tensor, settings: Settings, check: Check, first: int,
    every: int = 1,
) -> Tensor:  # fmt: skip
    """States after a module with its source weights, for one share of the rows, whose Hessians are added to ``trees``.

    first: number of the share's first row. every: states of rows alone whose number is a multiple of it.
    """
    y, hessians = reference_pass(block, x, settings, check, first, every=every)
    for group, tree in trees.items():
        tree.add(share, hessians.pop(group))
    return y


def error_of(entered: Entered, check: Check) -> float:
    """The mean of the relative error of an entered module that is quantised now, over the rows that count for it. No other
    output is needed: what comes behind runs on states of the source model."""
    if entered.y is None:
        raise AssertionError("the head has no error")
    block, chosen = entered.block, error_rows(0, error_step(len(entered.x)))
    x, y, device = entered.x[chosen].contiguous(), entered.y[chosen].contiguous(), device_of(block)
    out = forward_rows(block, x, entered.settings, check, device)
    parts = batches(len(x), entered.settings.batch_rows)
    return float(sum(relative_error(out[part].to(device), y[part].to(device)) for part in parts)) / len(x)
