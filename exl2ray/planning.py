"""From a measurement to what each linear is quantised with: the plan of one bitrate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache

from exl2ray.formats.layout import QParams, pad32
from exl2ray.formats.measurement import Measurement
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.overrides import Override, counting, overridden
from exl2ray.quant.allocate import Allocation, Slot, budget, solve
from exl2ray.quant.measure_moe import MOE_TABLE
from exl2ray.quant.qparams import attention_options, mlp_options


@dataclass(frozen=True)
class Plan:
    """What one bitrate quantises each linear with. ``hashes[i]`` identifies module i and all choices before it."""

    bits: float
    params: Mapping[str, QParams]  # linear key -> option
    hashes: tuple[str, ...]
    achieved_bpw: float
    predicted_bytes: int  # of all quantised tensors, head included


def allocate(
    spec: ModelSpec,
    measurement: Measurement,
    bits: float,
    objective: str = "squared",
    power: float = 2.0,
    overrides: Sequence[Override] = (),
) -> tuple[Allocation, dict[str, QParams]]:
    """Solves for one bitrate: the allocation, and the option of every decoder linear by key.

    ``overrides`` change what a row of an option table stands for: linears that they concern get what the user wants. The
    row's error stays as measured, which is too high where an override widened a linear.
    """
    slots: list[Slot] = []
    owners: list[list[dict[str, QParams]]] = []
    for module in spec.modules:
        if not module.quantized:
            continue
        for options in measurement[module.profile_key].slots():
            rows = [
                {x.key: overridden(overrides, x, o.params[x.role]) for x in module.linears if x.role in o.params}
                for o in options
            ]
            costs = [o.total_bits if not overrides else _row_bits(module, row) for o, row in zip(options, rows, strict=True)]
            slots.append(Slot(module.profile_key, tuple(costs), tuple(1 - o.accuracy for o in options)))
            owners.append(rows)
    allocation = solve(slots, budget(slot_weights(spec), bits), objective, power)
    params: dict[str, QParams] = {}
    for rows, choice in zip(owners, allocation.choice, strict=True):
        params.update(rows[choice])
    return allocation, params


def _row_bits(module: ModuleSpec, params: Mapping[str, QParams]) -> int:
    """Bits that linears of a module take with these options."""
    return sum(
        params[x.key].total_bits(x.in_features, pad32(x.out_features), x.has_bias) for x in module.linears if x.key in params
    )


def slot_weights(spec: ModelSpec) -> int:
    """Weights that a bitrate counts: all linears of the decoder layers, padded, without head and embedding."""
    return sum(x.in_features * pad32(x.out_features) for m in spec.modules if m.quantized for x in m.linears)


Tables = list[tuple[tuple[str, ...], tuple[tuple[QParams, ...], ...]]]  # (roles, rows with an option for each role)


def option_tables(roles: Set[str]) -> Tables:
    """The option tables of a module whose linears have these roles; two for a parallel block, none for the head."""
    tables: Tables = []
    if "q_proj" in roles:
        tables.append((("q_proj", "k_proj", "v_proj", "o_proj"), attention_options()))
    if "up_proj" in roles:
        gated = "gate_proj" in roles
        tables.append(((("gate_proj",) if gated else ()) + ("up_proj", "down_proj"), mlp_options(gated)))
    if "w1" in roles:
        tables.append((MOE_TABLE.roles, MOE_TABLE.rows))
    return tables


def option_bits(module: ModuleSpec, overrides: Sequence[Override] = ()) -> list[tuple[list[int], int]]:
    """(total bits of each option, weights) of every slot of a module, from the option tables and what the user wants."""
    if not module.quantized:
        return []
    out = []
    for names, rows in option_tables({x.role for x in module.linears}):
        alike = _alike([x for x in module.linears if x.role in names], overrides)

        def cost(row: tuple[QParams, ...], xs: list[LinearSpec], names: tuple[str, ...] = names) -> int:
            return len(xs) * _bits(xs[0], overridden(overrides, xs[0], row[names.index(xs[0].role)]))

        bits = [sum(cost(row, xs) for xs in alike) for row in rows]
        out.append((bits, sum(len(xs) * xs[0].in_features * pad32(xs[0].out_features) for xs in alike)))
    return out


def _alike(linears: Sequence[LinearSpec], overrides: Sequence[Override]) -> list[list[LinearSpec]]:
    """Linears of one role, size and override together: experts are many, and each kind is looked at once."""
    out: dict[tuple[object, ...], list[LinearSpec]] = {}
    for x in linears:
        out.setdefault((x.role, x.in_features, x.out_features, x.has_bias, counting(overrides, x)), []).append(x)
    return list(out.values())


def _bits(linear: LinearSpec, params: QParams) -> int:
    return total_bits(params, linear.in_features, pad32(linear.out_features), linear.has_bias)


@cache
def total_bits(params: QParams, in_features: int, out_features: int, has_bias: bool) -> int:
    """`QParams.total_bits`, remembered: a model has few sizes and many linears."""
    return params.total_bits(in_features, out_features, has_bias)


def module_cost(module: ModuleSpec) -> float:
    """Weights of a module's linears: what deadlines and the balance of workers go by."""
    return float(sum(x.in_features * x.out_features for x in module.linears))
