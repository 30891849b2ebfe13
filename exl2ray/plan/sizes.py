"""Bytes of the output, from headers alone: every tensor with name, dtype and shape as in `exl2ray.output.writing`.

With the options of all linears the result is exact, file by file. Before a measurement only the option tables are known:
then the size lies between two bounds that hold as long as a larger option of a module is a better one, since the allocation
leaves no bits unused that would buy anything.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

from exl2ray.allocation.frontier import all_options
from exl2ray.allocation.knapsack import budget
from exl2ray.allocation.overrides import Override, counting, overridden
from exl2ray.allocation.planning import (
    allocated_options,
    below_tables,
    decoder_bpw,
    head_bpw,
    option_bits,
    packed_bytes,
    slot_weights,
    usual_head,
)
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import QParams
from exl2ray.formats.shards import TensorEntry, header_of, plan_shards
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.model.weights import announced, linear_entries, output_tensors, plain_shape
from exl2ray.quant.qparams import distinct_options, low_options
from exl2ray.recipe import USUAL_HEAD_BITS, Recipe

FILE_OVERHEAD = 8 + 2 + 7  # of a further shard: header length, braces, padding to a multiple of 8


@dataclass(frozen=True)
class Freedom:
    """What an allocation may choose from: of a recipe, by `freedom_of`.

    head_bits: None if they are free. linears: options for single linears, the head among them, not rows of the tables for
    modules.
    """

    head_bits: int | None = USUAL_HEAD_BITS
    overrides: tuple[Override, ...] = ()
    linears: bool = False

    def usual_head(self, head: LinearSpec) -> QParams:
        return usual_head(head, self.head_bits, self.overrides)


def freedom_of(recipe: Recipe, overrides: Sequence[Override]) -> Freedom:
    linears = recipe.allocates == "linear"
    return Freedom(recipe.head_bits if linears else recipe.usual_head_bits, tuple(overrides), linears)


@dataclass(frozen=True)
class OutputSize:
    """Bytes of output*.safetensors at one bitrate; equal bounds if ``exact``.

    packed: bytes of the quantised linears, head included (what the work directory holds too). achieved_bpw, files: bits per
    weight of the decoder and the sizes of the files, where the options are known. head_bpw: of the head, where it is known.
    held_bpw: (least, most) of a head that -hb holds.
    """

    bits: float
    low_bytes: int
    high_bytes: int
    packed_low_bytes: int
    packed_high_bytes: int
    achieved_bpw: float | None = None
    files: tuple[int, ...] = ()
    head_bpw: float | None = None
    held_bpw: tuple[float, float] | None = None

    @property
    def exact(self) -> bool:
        return bool(self.files)


def exact_size(
    spec: ModelSpec, source: SourceModel, bits: float, params: Mapping[str, QParams], limit_bytes: int
) -> OutputSize:
    """Size with the option of every linear, head included. params: key -> option. limit_bytes: of a shard, 0 for one file."""
    entries = output_entries(spec, source, {x.key: _extent(x, (params[x.key],)) for x in spec.linears})
    plan = plan_shards([e.nbytes for e in entries], limit_bytes)
    files = tuple(_file_bytes([entries[i] for i in indices]) for indices in plan)
    packed, achieved = packed_bytes(spec, params), decoder_bpw(spec, params)
    return OutputSize(bits, sum(files), sum(files), packed, packed, achieved, files, head_bpw(spec, params))


def size_range(spec: ModelSpec, source: SourceModel, bits: float, freedom: Freedom, limit_bytes: int) -> OutputSize:
    """Bounds of the size at a reachable bitrate, from the options that there are."""
    low_bits, high_bits = allocated_range(spec, bits, freedom)
    head = spec.modules[-1].linears[0]
    fixed = 0 if freedom.linears else freedom.usual_head(head).bits_of(head) // 8
    packed = (low_bits // 8 + fixed, high_bits // 8 + fixed)
    options = _options(spec, freedom, below_tables(spec, bits, freedom.overrides))
    least, most = (_extents(spec, options, choice) for choice in (min, max))
    small, large = (output_entries(spec, source, extents) for extents in (least, most))
    rest = sum(e.nbytes for e in output_entries(spec, source, {}))
    sizes = [p + rest for p in packed]
    single = limit_bytes <= 0 or sum(e.nbytes for e in large) <= limit_bytes
    low_header = len(header_of(small)) if single else _least_headers(small)
    shards = 1 if single else 2 * -(-sizes[1] // limit_bytes) + len(large) * (max(e.nbytes for e in large) > limit_bytes)
    high_header = len(header_of(large)) + (shards - 1) * FILE_OVERHEAD
    found = OutputSize(bits, sizes[0] + low_header, sizes[1] + high_header, *packed)
    if freedom.linears and freedom.head_bits is None:
        return found
    of_head = [q.bits_of(head) / head.padded_weights for q in options[head.key]]
    held = (min(of_head), max(of_head))
    return replace(found, held_bpw=held, head_bpw=held[0] if held[0] == held[1] else None)


def allocated_range(spec: ModelSpec, bits: float, freedom: Freedom) -> tuple[int, int]:
    """(least, most) bits of the linears that an allocation at ``bits`` shares out: decoder, and the head if linears are."""
    wanted, small = budget(slot_weights(spec), bits), below_tables(spec, bits, freedom.overrides)
    if not freedom.linears:
        slots = [sorted(b) for module in spec.modules for b, _ in option_bits(module, freedom.overrides, small)]
        floor, ceiling = sum(s[0] for s in slots), sum(s[-1] for s in slots)
        if wanted >= ceiling:
            return ceiling, ceiling
        # What is left does not buy the next larger option of any module, so it is less than the largest of all steps.
        step = max(b - a for s in slots for a, b in pairwise(s))
        return max(floor, wanted - step), wanted
    alike: dict[object, list[dict[QParams, int]]] = {}  # layers have the same linears, mostly
    costs = []
    for module in spec.modules:
        sizes = [(x.role, x.in_features, x.out_features, x.has_bias, counting(freedom.overrides, x)) for x in module.linears]
        key = (module.kind, tuple(sizes))
        if key not in alike:
            alike[key] = _linear_costs(module, freedom, small)
        costs += alike[key]
    head = spec.modules[-1].linears[0]
    wanted += freedom.usual_head(head).bits_of(head)
    floor, ceiling = sum(min(c.values()) for c in costs), sum(max(c.values()) for c in costs)
    # Which options a linear will choose from depends on its losses; at the top it is one of those with 8 bits.
    top = sum(map(_at_the_top, costs))
    step = max(max(c.values()) - min(c.values()) for c in costs)
    high = min(wanted, ceiling)
    return max(floor, min(high, top) - step), high


def _at_the_top(costs: Mapping[QParams, int]) -> int:
    """The least bits of the options of most bits per weight."""
    width = max(min(q.bits) for q in costs)
    return min(bits for q, bits in costs.items() if min(q.bits) == width)


def _linear_costs(module: ModuleSpec, freedom: Freedom, low: bool) -> list[dict[QParams, int]]:
    """Option -> bits of each linear that is allocated by itself; the experts of a role go together."""
    if not (module.quantized or module.kind == "head"):
        return []
    out = []
    for role in dict.fromkeys(x.role for x in module.linears):
        alike: dict[object, list[LinearSpec]] = {}
        for x in module.linears:
            if x.role == role:
                key = (x.in_features, x.out_features, x.has_bias, counting(freedom.overrides, x))
                alike.setdefault(key, []).append(x)
        costs = {}
        first = next(iter(alike.values()))[0]
        for q in allocated_options(first, freedom.head_bits, freedom.overrides, low):
            chosen = [(overridden(freedom.overrides, xs[0], q), xs) for xs in alike.values()]
            costs[chosen[0][0]] = sum(len(xs) * option.bits_of(xs[0]) for option, xs in chosen)
        out.append(costs)
    return out


def output_entries(
    spec: ModelSpec, source: SourceModel, extents: Mapping[str, tuple[int, int]]
) -> list[TensorEntry]:
    """Every tensor of the output in order. ``extents``: linear key -> (rows of q_weight, groups); others are left out."""
    out = []
    for entry in output_tensors(spec):
        if entry.linear is not None and entry.linear.key in extents:
            out += linear_entries(entry.linear, *extents[entry.linear.key])
        elif entry.plain is not None:
            out.append(announced(entry.name, "F16", plain_shape(entry.plain, source)))
        elif entry.copied is not None:
            name = entry.copied.source_name
            out.append(announced(entry.name, source.dtype(name), source.shape(name)))
    return out


def _options(spec: ModelSpec, freedom: Freedom, low: bool) -> dict[str, tuple[QParams, ...]]:
    """Linear key -> the options that it may get."""
    columns = {x.role: all_options(low) for x in spec.linears}
    if not freedom.linears:
        more = low_options() if low else ()
        columns.update({role: (*options, *more) for role in columns if (options := distinct_options(role))})
    head = spec.modules[-1].linears[0]
    if freedom.linears:
        columns[head.role] = tuple(allocated_options(head, freedom.head_bits, freedom.overrides, low))
    else:
        columns[head.role] = (freedom.usual_head(head),)
    wanted = freedom.overrides
    if not wanted:
        return {x.key: columns[x.role] for x in spec.linears}
    return {x.key: tuple(dict.fromkeys(overridden(wanted, x, q) for q in columns[x.role])) for x in spec.linears}


def _extents(
    spec: ModelSpec, options: Mapping[str, tuple[QParams, ...]], choose: Callable[[Iterable[int]], int]
) -> dict[str, tuple[int, int]]:
    """Linear key -> `_extent`; that of linears of one size with the same options is found once."""
    known: dict[tuple[int, int], tuple[int, int]] = {}
    out = {}
    for x in spec.linears:
        key = (x.in_features, id(options[x.key]))
        if key not in known:
            known[key] = _extent(x, options[x.key], choose)
        out[x.key] = known[key]
    return out


def _extent(
    linear: LinearSpec, options: tuple[QParams, ...], choose: Callable[[Iterable[int]], int] = max
) -> tuple[int, int]:
    """(rows of q_weight, groups): the least or the most that any of the options has, each for itself."""
    extents = [_option_extent(q, linear.in_features) for q in options]
    return choose(rows for rows, _ in extents), choose(groups for _, groups in extents)


@cache
def _option_extent(params: QParams, in_features: int) -> tuple[int, int]:
    layout = params.layout(in_features)
    return layout.packed_rows, len(layout.bits)


def _file_bytes(entries: Sequence[TensorEntry]) -> int:
    return len(header_of(entries)) + sum(e.nbytes for e in entries)


def _least_headers(entries: Sequence[TensorEntry]) -> int:
    """A lower bound of the headers of all shards, wherever these begin."""
    items = {e.name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [0, e.nbytes]} for e in entries}
    return 8 + len(json.dumps(items, separators=(",", ":")))
