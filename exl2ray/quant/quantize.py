"""Quantising one module with its chosen options, and the head (converter-algorithm section 12).

A forward with the source weights on the current states collects Hessians and the local target; each linear is quantised
and packed; the weights used from then on are the ones reconstructed from the *packed* tensors; a second forward gives the
states that the next module is calibrated on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from exl2ray.cuda.small_batches import Streams
from exl2ray.errors import NumericError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.layout import QParams
from exl2ray.quant.block import Block, Check, Linear, by_input, device_of, has_experts
from exl2ray.quant.gptq import Quantized
from exl2ray.quant.hessian import Factor, HessianAccumulator, factorise, keeps_order, round_to_nearest
from exl2ray.quant.measure import reference_pass, relative_error
from exl2ray.quant.measure_moe import coverage, describe_coverage, expert_factor, lanes_of
from exl2ray.quant.pack import dequantize, pack, pad_columns
from exl2ray.quant.rows import batches, shared_batches
from exl2ray.quant.settings import Settings
from exl2ray.quant.solve import quantize_linears


@dataclass(frozen=True)
class QuantizedModule:
    """packed: in the module's order. error: mean relative Frobenius error against the local target.

    experts: the coverage of a mixture of experts, see `measure_moe.coverage`; empty for a dense module.
    """

    packed: tuple[PackedLinear, ...]
    error: float
    notes: tuple[str, ...] = field(default=())
    experts: tuple[Mapping[str, float], ...] = field(default=())


def quantize_block(
    block: Block,
    x: Tensor,  # (R, T, hidden) states that the modules before really produce
    params: Mapping[str, QParams],  # linear key -> option
    settings: Settings,
    check: Check,
) -> tuple[QuantizedModule, Tensor, Tensor]:
    """Quantises every linear of a block: (packed tensors, states after the quantised block, after the source block).

    On return the block holds the reconstructed weights.
    """
    target, hessians = reference_pass(block, x, settings, check)
    module, out = quantize_after(block, x, target, hessians, params, settings, check)
    return module, out, target


def quantize_after(
    block: Block,
    x: Tensor,  # (R, T, hidden) states entering the module
    target: Tensor,  # (R, T, hidden) and Hessians: results of `reference_pass`
    hessians: dict[str, HessianAccumulator],
    params: Mapping[str, QParams],
    settings: Settings,
    check: Check,
    early: Callable[[str, dict[str, PackedLinear]], None] | None = None,
) -> tuple[QuantizedModule, Tensor]:
    """Second half of `quantize_block`, after `reference_pass`: the packed module and the states after it.

    Takes Hessians out of ``hessians`` as it uses them, to make room. early: gets the packed linears of each input as they are
    done; all stay on their device then.
    """
    experts = coverage(block, hessians) if has_experts(block) else []
    notes = [describe_coverage(experts)] if experts else []
    packed: dict[str, PackedLinear] = {}
    groups = by_input(block.module.linears)

    def solve(group: str) -> dict[str, Quantized]:
        if has_experts(block):
            factor = expert_factor(block, hessians, group, settings, notes)
            if not group.startswith("w13."):  # those of w1 and w3 may be borrowed from
                del hessians[group]
        else:
            where = f"{block.module.profile_key} ({group})"
            factor = factorise(hessians.pop(group), settings, where, notes, keeps_order(block.module, group))
        return solve_group(block, groups[group], factor, params, settings)

    for group, found in quantize_groups(block, list(groups), solve, keep=early is not None):
        packed.update(found)
        if early is not None:
            early(group, found)
    # A plain tensor per row batch: rows are independent, and the error needs both outputs of a row.
    out = torch.empty_like(x)
    error = 0.0
    device = device_of(block)
    for part in shared_batches(x.shape[0], settings.batch_rows):  # shapes that the reference pass had: some need setting up
        result = block.forward(x[part].to(device))
        check(result, f"quantised output of {block.module.profile_key}, rows {part.start} to {part.stop - 1}")
        reference = target[part].to(device)
        error += relative_error(result, reference)
        out[part] = result.to(out.dtype)
    ordered = tuple(packed[linear.key] for linear in block.module.linears)
    return QuantizedModule(ordered, error / x.shape[0], tuple(notes), tuple(experts)), out


def quantize_groups(
    block: Block, groups: Sequence[str], solve: Callable[[str], dict[str, Quantized]], keep: bool = False
) -> Iterator[tuple[str, dict[str, PackedLinear]]]:
    """Solves inputs one after another, small experts some at a time side by side, and packs: (input, packed linears).

    keep: leaves what was packed on its device.
    """
    lanes = lanes_of(block)
    size = 1 if lanes == 1 else 2 * lanes
    for start in range(0, len(groups), size):
        chunk = groups[start : start + size]
        solved: dict[str, dict[str, Quantized]] = {}
        with Streams(device_of(block), lanes) as side_by_side:
            for group in chunk:
                with side_by_side.turn():
                    solved[group] = solve(group)
        for group in chunk:
            yield group, pack_group(block, solved.pop(group), keep)


def solve_group(
    block: Block,
    linears: Sequence[Linear],
    factor: Factor,
    params: Mapping[str, QParams],
    settings: Settings,
    targets: Mapping[str, Tensor] | None = None,
) -> dict[str, Quantized]:
    """Quantises linears that share an input. targets: linear key -> (K, N) to quantise in place of the block's weights."""
    weights = {x.key: pad_columns((targets or block.weights)[x.key]) for x in linears}
    layouts = {x.key: params[x.key].layout(x.in_features) for x in linears}
    return quantize_linears(factor, weights, layouts, settings.budget_bytes, settings.numerics)


def pack_group(block: Block, solved: Mapping[str, Quantized], keep: bool = False) -> dict[str, PackedLinear]:
    """Packs what `solve_group` found; puts the weights reconstructed from the packing into the block.

    keep: leaves the packed tensors on their device.
    """
    out: dict[str, PackedLinear] = {}
    for key, q in solved.items():
        packed = pack(key, q, block.biases.get(key), keep)
        loaded = dequantize(packed, q.weight.device)
        worst = float((loaded.float() - q.weight.float()).abs().max())
        if worst != 0.0:
            raise NumericError(
                f"{key}: the packed tensors decode to other weights than were chosen (largest difference {worst:.3g})",
                "this is a defect of exl2ray or of the GPU: please report it with the log",
            )
        block.set_weight(key, loaded)
        out[key] = packed
    return out


def quantize_head(
    block: Block,
    x: Tensor,  # (R, T, hidden) normed states
    params: QParams,
    settings: Settings,
    feedback: bool = True,
    keep: bool = False,
) -> tuple[PackedLinear, tuple[str, ...]]:
    """Quantises lm_head; on return the block holds the reconstructed weight. ``feedback=False``: round to nearest, as the
    reference does with large heads; ours keep error feedback whatever their size.

    keep: leaves the packed tensors on their device.
    """
    head = block.module.linears[0]
    notes: list[str] = []
    accumulator = HessianAccumulator(head.in_features, block.weights[head.key].device)
    for part in batches(x.shape[0], settings.batch_rows):
        accumulator.add(x[part].to(accumulator.h.device).to(block.weights[head.key].dtype), part.stop - part.start)
    if feedback:
        factor = factorise(accumulator, settings, head.key, notes)
    else:
        factor = round_to_nearest(accumulator.finish())
        notes.append(f"{head.key}: {factor.note}")
    packed = pack_group(block, solve_group(block, [head], factor, {head.key: params}, settings), keep)
    return packed[head.key], tuple(notes)
