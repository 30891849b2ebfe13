"""One module: what each of its options costs (`measure_module`), and quantising it with the chosen ones (`quantize_module`).

Both begin with the module's source weights on calibration rows, which are cut into shares (`exl2ray.quant.rows`), and so both
give the same bits whoever holds which of them. `enter_module` (`exl2ray.quant.entering`) runs all rows of a worker alone; it
serves measuring, and quantising on the states of the source model, where one pass is enough for all bitrates. In a chain
every module is entered on what the quantised ones before it produce, by a group of workers; a group of one is a group. Then

1. the members sum Hessians over their own shares,
2. each input gets an owner, and its sum goes there,
3. owners factorise, solve and pack the linears on their inputs; what runs from then on is what the packing decodes to,
4. the packed linears go to all members, who run their rows through the quantised module.

With corrected targets (`exl2ray.quant.correct`) 1 to 4 are gone through twice: for the first linears of a block, then for the
second one, whose input comes from the quantised first ones. The head is a module like any other, but for its target: none.

The other shape that was considered, an object for a module under work with a method for each of the four, keeps between calls
what `sum_hessians` keeps between two stages, and makes a rule of the order that is a loop here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from exl2ray.cuda.small_batches import Streams, ahead
from exl2ray.errors import NumericError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.layout import QParams
from exl2ray.formats.measurement import ModuleProfile
from exl2ray.quality import Settings
from exl2ray.quant.block import Block, Check, Linear, by_input, device_of, has_experts
from exl2ray.quant.correct import (
    can_correct,
    corrected_weights,
    first_linears,
    first_sums,
    keeps_middles,
    second_linears,
    second_sums,
)
from exl2ray.quant.entering import Entered, add_share, empty_trees, error_of
from exl2ray.quant.gptq import Quantized
from exl2ray.quant.group import Comm, Solo
from exl2ray.quant.hessian import Factor, input_factor, prepare_borrowing
from exl2ray.quant.measure import measure_halves, measure_head
from exl2ray.quant.measure_moe import describe_coverage, measure_experts, shares_of
from exl2ray.quant.pack import Decoded, dequantize, pack, pad_columns
from exl2ray.quant.rows import (
    Arrivals,
    TreeSum,
    batches,
    error_rows,
    error_step,
    forward_rows,
    head_sum,
    number_of,
    relative_error,
    room_for_states,
    share_rows,
)
from exl2ray.quant.sharing import Owned, PartialSums, share_out, spread
from exl2ray.quant.solve import lanes_of, quantize_linears

ROUNDS = 8  # inputs that a stream takes before all of them are waited for; their packed tensors are written then
USELESS_ACCURACY = 0.1  # the reference stops below this, and so do we: the module's output is noise
Shares = dict[int, Tensor]  # share of the rows -> states (r, T, hidden); shares without rows are left out


@dataclass(frozen=True)
class QuantizedModule:
    """error: mean relative Frobenius error of the output, None for the head; of all rows with corrected targets, which need
    what it is compared with, else of every fourth (`rows.error_step`). experts: coverage of a mixture of experts
    (`measure_moe.shares_of`). x, other: this member's states after the module, in the quantised and in the source model; none
    of the head, and none in x of a module that was entered before."""

    error: float | None
    notes: list[str]
    experts: list[dict[str, float]]
    x: dict[int, Tensor]
    other: dict[int, Tensor]


class PackedSink(Protocol):
    """Where packed linears go, input by input, on the device that made them. flush: the next ones take a while."""

    def add(self, packed: Mapping[str, PackedLinear]) -> None: ...
    def flush(self) -> object: ...


def measure_module(entered: Entered, report: Callable[[str], None]) -> ModuleProfile:
    """Cost and accuracy of each option of a module that was entered; its Hessians are used up, to make room.

    ``report`` gets notes (damping raised, fallbacks). Raises NumericError if no option keeps at least a tenth of the output.
    """
    block, x, y = entered.block, entered.x, entered.y
    module, notes = block.module, list[str]()
    tables: list[Any] = []
    if y is None:
        extra = measure_head(block, x, entered.hessians, entered.settings, notes)
    elif has_experts(block):
        tables, extra = measure_experts(block, x, y, entered.hessians, entered.settings, notes)
    else:
        tables, extra = measure_halves(block, x, y, entered.hessians, entered.settings, notes)
    for note in notes:
        report(note)  # without the module's name, which whoever shows it adds
    for options in tables:
        best = max(o.accuracy for o in options)
        if best < USELESS_ACCURACY:
            raise NumericError(
                f"{module.profile_key}: the best of {len(options)} options has accuracy {best:.4f}",
                "quantising destroys this module's output: check the weights and the calibration data",
            )
    key, mode = module.profile_key.rsplit(".", 1)
    slots = dict(zip(("attn", "mlp") if module.kind == "parallel" else ("options",), map(tuple, tables), strict=False))
    return ModuleProfile(key, mode, extra={**extra, "notes": notes} if notes else extra, **slots)


def quantize_module(
    block: Block,
    x: Shares,  # states that enter the module: of the quantised modules before, or of the source model
    other: Shares,  # with corrected targets, the same rows in the source model; else some of them, which only go along
    rows: int,  # calibration rows, of all members
    params: Mapping[str, QParams],  # linear key -> option
    settings: Settings,
    check: Check,
    sink: PackedSink,
    comm: Comm | None = None,
    entered: Entered | None = None,
) -> QuantizedModule:
    """Quantises a module with a group; all members call it. On return the block holds the reconstructed weights.

    States are taken out of x (but for the head) and other as soon as those after the module are there: where the caller lets
    go of them, two sets of states are held and not four (7B: 3.9 GB in place of 7.7).
    sink: gets what this member has packed. comm: the group, None: a group of one. entered: what is known of the module, where
    it is quantised on the states of the source model.
    """
    comm, device = comm or Solo(), device_of(block)
    notes: list[str] = []
    experts: list[dict[str, float]] = []
    for sums in sum_hessians(block, x, other, rows, settings, check, entered):
        owned = share_out(comm, block.module, sums, settings, device)
        packed = solve_and_pack(block, sums, owned, params, settings, sink, comm.rank)
        broadcast(block, sums, owned, packed, comm)
        noted = {group: said for member in comm.gather(owned.notes) for group, said in member.items()}
        notes += [note for group in sums.inputs for note in noted[group]]
        if routed := [n for group, n in owned.routed.items() if group.startswith("w2.")]:
            experts = shares_of(routed)
    if experts:
        notes.insert(0, describe_coverage(experts))
    if block.module.kind == "head":
        return QuantizedModule(None, notes, experts, {}, {})
    if entered is None:
        out, error = _quantized_pass(block, x, sums, rows, settings, check, comm)
    else:
        out, error = {}, error_of(entered, check)
    return QuantizedModule(error, notes, experts, out, sums.after)


def sum_hessians(
    block: Block, x: Shares, other: Shares, rows: int, settings: Settings, check: Check, entered: Entered | None
) -> Iterator[PartialSums]:
    """This member's part of the sums for inputs that are quantised at a time: all of them, or with corrected targets those of
    the first linears and, once these are quantised, that of the second one. Arguments as of `quantize_module`."""
    inputs, ranges = by_input(block.module.linears), share_rows(rows)
    if entered is not None:
        trees = {group: TreeSum.complete(h) for group, h in entered.hessians.items()}
        yield PartialSums(inputs, trees)
    elif block.module.kind == "head":
        trees = empty_trees(block)
        for s, own in sorted(x.items()):
            for tree in trees.values():
                tree.add(s, head_sum(block, own, settings))
        yield PartialSums(inputs, trees)
    elif settings.numerics.target_correction > 0 and can_correct(block):
        first, after, middles = first_linears(block), dict[int, Tensor](), dict[int, list[Tensor]]()
        tokens = next(iter(x.values())).shape[1] if x else 0
        keep = keeps_middles(block, sum(map(len, x.values())), tokens, settings)
        source = {linear.key: block.weights[linear.key] for linears in first.values() for linear in linears}
        for stage in (first, second_linears(block)):
            trees, crosses = ({group: TreeSum(settings.sums_on_host) for group in stage} for _ in range(2))
            for s, own in sorted(x.items()):
                if stage is first:
                    sums = first_sums(block, own, other[s], settings)
                else:
                    mine = middles.setdefault(s, []) if keep else None
                    sums, after[s] = second_sums(block, own, other.pop(s), source, settings, check, mine)
                for group in stage:
                    found = sums.pop(group)
                    trees[group].add(s, found.hessian)
                    crosses[group].add(s, found.cross)
            yield PartialSums(stage, trees, crosses, dict(after), after, middles)
    else:
        trees, targets, after = empty_trees(block, settings.sums_on_host), dict[int, Tensor](), dict[int, Tensor]()
        every = error_step(rows)
        for s, own in sorted(x.items()):
            targets[s] = add_share(trees, s, block, own, settings, check, ranges[s].start, every)
            beside = other.pop(s)
            after[s] = forward_rows(block, beside, settings, check, device_of(block)) if len(beside) else beside
        yield PartialSums(inputs, trees, {}, targets, after, every=every)


def cut(x: Tensor) -> dict[int, Tensor]:
    """All rows (R, T, hidden) by share: views."""
    return {s: x[r.start : r.stop] for s, r in enumerate(share_rows(len(x))) if len(r)}


def solve_and_pack(
    block: Block,
    sums: PartialSums,
    owned: Owned,
    params: Mapping[str, QParams],
    settings: Settings,
    sink: PackedSink,
    rank: int,
) -> dict[str, dict[str, PackedLinear]]:
    """Quantises the linears on the inputs that a member owns: packed linears by input, which the sink has got, too.

    Inputs are solved and packed one after another, small experts some at a time side by side. On a GPU with room the factor
    for the next input is made meanwhile: that takes most of its time in small blocks, one after another.
    """
    lanes = lanes_of(block)
    if has_experts(block):
        prepare_borrowing(block, owned.hessians)
    if lanes > 1:  # Hessians are used on several streams
        for accumulator in owned.hessians.values():
            accumulator.h = accumulator.h.to(device_of(block))
    own = [group for group in sums.inputs if owned.owners[group] == rank]
    packed: dict[str, dict[str, PackedLinear]] = {}
    size = 1 if lanes == 1 else ROUNDS * lanes
    for start in range(0, len(own), size):
        decoded, coming = Decoded(), own[start + 1 : start + 2] if settings.ahead and lanes == 1 else []
        before = [block.weights[x.key] for g in own[start : start + size] for x in sums.inputs[g]] if lanes > 1 else []
        with Streams(device_of(block), lanes) as side_by_side, ahead(device_of(block), bool(coming)) as beside:
            for group in own[start : start + size]:
                with side_by_side.turn():
                    factor = _factor(block, group, owned, settings)
                    solved = _solve_input(block, sums.inputs[group], group, factor, owned, params, settings)
                    packed[group] = pack_input(block, solved, decoded)
            for group in coming:
                with beside.turn():
                    owned.factors[group] = _factor(block, group, owned, settings)
        del before, factor  # other streams may have been reading the former, or have written into the memory of the latter
        decoded.check()
        for group in own[start : start + size]:
            sink.add(packed[group])
    sink.flush()
    return packed


def _solve_input(
    block: Block, linears: Sequence[Linear], group: str, factor: Factor, owned: Owned, params: Mapping[str, QParams],
    settings: Settings,
) -> dict[str, Quantized]:  # fmt: skip
    targets: Mapping[str, Tensor] = block.weights
    if group in owned.crosses:
        strength = settings.numerics.target_correction
        targets = corrected_weights(block, linears, factor, owned.crosses.pop(group), strength)
    return solve_input(linears, targets, factor, params, settings, side_by_side=lanes_of(block) == 1)


def _factor(block: Block, group: str, owned: Owned, settings: Settings) -> Factor:
    """For the linears on an input; one that was made before is handed out."""
    notes = owned.notes.setdefault(group, [])
    return owned.factors.pop(group, None) or input_factor(block, owned.hessians, group, settings, notes)


def solve_input(
    linears: Sequence[Linear],
    targets: Mapping[str, Tensor],  # linear key -> (K, N) to quantise
    factor: Factor,
    params: Mapping[str, QParams],
    settings: Settings,
    side_by_side: bool = False,
) -> dict[str, Quantized]:
    """Quantises linears that share an input. side_by_side: as of `quantize_linears`."""
    weights = {x.key: pad_columns(targets[x.key]) for x in linears}
    layouts = {x.key: params[x.key].layout(x.in_features) for x in linears}
    return quantize_linears(factor, weights, layouts, settings.budget_bytes, settings.numerics, side_by_side)


def pack_input(block: Block, solved: Mapping[str, Quantized], decoded: Decoded) -> dict[str, PackedLinear]:
    """Packs what `solve_input` found, on its device; puts the weights reconstructed from the packing into the block.

    decoded: has to be checked before anything of it is used.
    """
    out: dict[str, PackedLinear] = {}
    for key, q in solved.items():
        packed = pack(key, q, block.biases.get(key), keep=True)
        loaded = dequantize(packed, q.weight.device)
        decoded.add(key, loaded, q.weight)
        block.set_weight(key, loaded)
        out[key] = packed
    return out


def broadcast(
    block: Block, sums: PartialSums, owned: Owned, packed: Mapping[str, Mapping[str, PackedLinear]], comm: Comm
) -> None:
    """Brings what each member has packed to all others, and there into their blocks."""
    if comm.size == 1:
        return
    for group, linears in sums.inputs.items():
        for key, p in spread(comm, linears, packed.get(group), owned.owners[group], device_of(block)).items():
            if group not in packed:
                block.set_weight(key, dequantize(p, device_of(block)))


def _quantized_pass(
    block: Block, x: Shares, sums: PartialSums, rows: int, settings: Settings, check: Check, comm: Comm
) -> tuple[dict[int, Tensor], float]:
    """Output of the quantised block by share, and the mean of its relative error over all members' rows that have a target.
    Uses up x, and targets and middles of the sums. Where the input of the second linear was kept it is not computed again:
    the same batches, the same bits."""
    device, ranges, every = device_of(block), share_rows(rows), sums.every
    out, arrivals = dict[int, Tensor](), Arrivals(check)
    errors: dict[int, Tensor] = {}
    for s in sorted(x):
        own, target = x.pop(s), sums.targets.pop(s)
        out[s] = room_for_states(own.shape, own.dtype, own.device, device)
        first, done = ranges[s].start, 0
        errors[s] = torch.zeros((), dtype=torch.float64, device=device)
        kept = sums.middles.pop(s, [])
        for part in batches(len(own), settings.batch_rows):
            batch = own[part].to(device)
            if kept:
                half = block.halves[0]
                result = half.post(batch, half.linear(half.second.key, kept.pop(0)))
            else:
                result = block.forward(batch)
            place = f"rows {first + part.start} to {first + part.stop - 1}"
            arrivals.put(out[s], part, result, f"quantised output of {block.module.profile_key}, {place}")
            compared = result[error_rows(first + part.start, every)].contiguous()
            errors[s] += relative_error(compared, target[done : done + len(compared)].to(device))
            done += len(compared)
    arrivals.end()  # of all shares: each would wait for the GPU
    mine = [(s, float(error)) for s, error in errors.items()]
    total = sum(e for _, e in sorted(found for member in comm.gather(mine) for found in member))
    return out, total / number_of(error_rows(0, every), rows)
