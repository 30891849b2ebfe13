"""What quantising lm_head costs: losses of a few options, for allocations that choose its bits. No reference measures it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from exl2ray.quant.block import Block
from exl2ray.quant.hessian import HessianAccumulator, factorise
from exl2ray.quant.losses import LossTable
from exl2ray.quant.pack import pad_columns
from exl2ray.quant.qparams import parse
from exl2ray.quant.rows import batches
from exl2ray.quant.settings import Settings
from exl2ray.quant.solve import solve_with_losses

# Few, because a head is as large as several layers; what lies between them can be told (`exl2ray.allocation.frontier`).
OPTIONS = tuple(parse(text) for text in ("1:3b_64g", "1:4b_64g", "1:6b_64g"))


def measure_head(block: Block, x: Tensor, settings: Settings) -> dict[str, Any]:
    """The extra profile of the head: losses by option, and notes. x: (R, T, hidden) normed states of the source model."""
    head = block.module.linears[0]
    weight = block.weights[head.key]
    notes: list[str] = []
    accumulator = HessianAccumulator(head.in_features, weight.device)
    for part in batches(x.shape[0], settings.batch_rows):
        accumulator.add(x[part].to(weight.device).to(weight.dtype), part.stop - part.start)
    factor = factorise(accumulator, settings, head.key, notes)
    weights, options, losses = {head.role: pad_columns(weight)}, {head.role: OPTIONS}, LossTable()
    solved = solve_with_losses(factor, weights, options, settings.budget_bytes, offload=settings.offload)
    losses.add(head.role, OPTIONS, solved[head.role], factor, 1 / x.shape[1])
    return {**losses.extra(), "notes": notes} if notes else losses.extra()
