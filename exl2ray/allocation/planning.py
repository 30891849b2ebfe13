"""From a measurement to what each linear is quantised with: the plan of one bitrate.

Per module, options are the rows of the tables, and the error is what a module was measured with. Per linear it is the KL
divergence of the whole model: to second order a sum over linears of sensitivity times squared output error. The errors come
with measuring for nothing (`exl2ray.quant.measure`: the solver's scaled errors squared), and those of options that nobody
solved follow from them within 3 % (`exl2ray.allocation.frontier`); the sensitivities need a pass of their own
(`exl2ray.quant.sensitivity`). An expert layer has one option per role, as in the reference.

Tried and left out: sensitivities at several widths (they are the same), perturbing with what GPTQ chose (needs the Hessians
again, 1 % better), widths per group of rows across the model (nothing over mixtures along the act-order on trained models,
since rows differ little), sensitivities per module (no better than none).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exl2ray.allocation.frontier import ALL, NEAR, Candidate, LossCurve, all_options, flat_loss, frontier, held_options
from exl2ray.allocation.knapsack import Allocation, Slot, budget, nearest_reachable, reachable_range, solve
from exl2ray.allocation.overrides import Override, counting, overridden, parse_overrides
from exl2ray.errors import Exl2RayError, FormatError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import WIDTHS, QParams
from exl2ray.formats.measurement import Measurement, OptionProfile
from exl2ray.formats.measurement_rules import checked_pair
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.quant.qparams import head_option, low_options, option_tables
from exl2ray.recipe import USUAL_HEAD_BITS, Recipe

HEAD_SHARE = 0.7  # of what as many weights of a layer cost: no forward pass of all rows goes through the head
FEW_GROUPS = 24  # linears up to which every option that is not dominated is tried: there the hull costs a percent or two


@dataclass(frozen=True)
class Plan:
    """What one bitrate quantises each linear with. ``hashes[i]`` identifies module i and all choices before it. patches:
    texts of --set that were applied to what was allocated.
    """

    bits: float
    params: Mapping[str, QParams]  # linear key -> option
    hashes: tuple[str, ...]
    achieved_bpw: float
    predicted_bytes: int  # of all quantised tensors, head included
    predicted_kl: float | None = None  # nats per token, where sensitivities were measured
    patches: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """What an allocation comes to. params: option of every linear by key, head included. groups: as `linear_groups`, if the
    measurement has what it takes.
    """

    allocation: Allocation
    params: dict[str, QParams]
    predicted_kl: float | None
    groups: Sequence[LinearGroup]


def choose(
    spec: ModelSpec, measurement: Measurement, bits: float, recipe: Recipe, overrides: Sequence[Override] = ()
) -> Choice:
    """The option of every linear at one bitrate, as --allocation, --objective, -hb and --set want it.

    Raises FormatError for --allocation linear if the measurement has no sensitivities.
    """
    linear = recipe.allocates == "linear"
    groups = linear_groups(spec, measurement) if linear or has_sensitivities(spec, measurement) else []
    if linear:
        allocation, params = allocate_linears(spec, groups, bits, overrides, recipe.head_bits)
    else:
        allocation, params = allocate(spec, measurement, bits, recipe.objective, recipe.objective_power, overrides)
        head = spec.modules[-1].linears[0]
        params[head.key] = overridden(overrides, head, head_option(recipe.usual_head_bits))
    return Choice(allocation, params, predicted_kl(groups, params) if groups else None, groups)


def allocate_linears(
    spec: ModelSpec,
    groups: Sequence[LinearGroup],
    bits: float,
    overrides: Sequence[Override] = (),
    head_bits: int | None = None,
) -> tuple[Allocation, dict[str, QParams]]:
    """Solves for one bitrate over single linears (all experts of a role together): the least predicted KL divergence.

    Every linear of ``groups`` (`linear_groups`) may get any option of `exl2ray.allocation.frontier`, a head of ``head_bits``
    those of `held_options`. The budget is ``bits`` per weight of the decoder, and what the reference's head of so many bits
    (6, if it is free) takes: the files are as large as those of `allocate` with that head, whatever the decoder and the head
    have each.
    """
    low = below_tables(spec, bits, overrides)
    few, sizes, found = len(groups) <= FEW_GROUPS, _Sizes(overrides, low, head_bits), list[list[Candidate]]()
    for g in groups:
        near = ALL if few or g.linears[0].role == "lm_head" else NEAR  # the head's steps are the largest of all
        possible, sizes_of_possible = sizes.of(g.linears)
        found.append(frontier(g.curve, sizes_of_possible, possible, near))
    slots = [
        Slot(g.key, tuple(c.bits for c in options), tuple((g.sensitivity * c.loss) ** 0.5 for c in options))
        for g, options in zip(groups, found, strict=True)
    ]
    head = spec.modules[-1].linears[0]
    allocation = solve(slots, budget(slot_weights(spec), bits) + usual_head(head, head_bits, overrides).bits_of(head))
    params = {}
    for group, options, choice in zip(groups, found, allocation.choice, strict=True):
        params.update({x.key: overridden(overrides, x, options[choice].params) for x in group.linears})
    return allocation, params


@dataclass(frozen=True)
class LinearGroup:
    """Linears that get one option: a single one, or the experts of a role. sensitivity: KL over squared output error."""

    key: str
    linears: tuple[LinearSpec, ...]
    curve: LossCurve
    sensitivity: float


def linear_groups(spec: ModelSpec, measurement: Measurement) -> list[LinearGroup]:
    """All linears with what was measured of them, the head last. Raises FormatError where something is missing."""
    out = []
    for module in spec.modules:
        if not module.linears:
            continue
        extra = measurement[module.profile_key].extra
        for role in dict.fromkeys(x.role for x in module.linears):
            linears = tuple(x for x in module.linears if x.role == role)
            where = f"measurement: {module.profile_key!r}, {role}"
            curve = LossCurve(_entry(extra, "linears", role, where), linears[0].in_features, where)
            pair = _entry(extra, "sensitivity", role, where)
            kl, error = checked_pair(pair, where)
            key = linears[0].key if len(linears) == 1 else f"{module.profile_key}.{role}"
            out.append(LinearGroup(key, linears, curve, kl / error if error > 0 else 0.0))
    return out


def insensitive(groups: Sequence[LinearGroup]) -> tuple[list[str], int]:
    """(linears with a sensitivity of 0, number of all); experts of a role count as one."""
    return [g.key for g in groups if g.sensitivity == 0], len(groups)


def _entry(extra: Mapping[str, Any], name: str, role: str, where: str) -> Any:
    found = extra.get(name)
    if not isinstance(found, Mapping) or role not in found:
        hint = "--allocation linear needs a measurement that was made for it; measure again without -m"
        raise FormatError(f"{where}: no {name}", hint)
    return found[role]


def has_sensitivities(spec: ModelSpec, measurement: Measurement) -> bool:
    """Whether all linears of the measurement have sensitivities and losses, so that KL can be predicted."""
    extras = [measurement[m.profile_key].extra for m in spec.modules if m.linears]
    return all("sensitivity" in e and "linears" in e for e in extras)


def predicted_kl(groups: Sequence[LinearGroup], params: Mapping[str, QParams]) -> float:
    """KL divergence from the source in nats per token that linears with these options add up to."""
    total = 0.0
    for group in groups:
        chosen = {params[x.key] for x in group.linears}
        total += group.sensitivity * sum(group.curve.loss(q) for q in chosen) / len(chosen)
    return total


def head_bits(recipe: Recipe, spec: ModelSpec, plan: Plan) -> int:
    """Bits of the head as config.json and people want them: what was asked for, else the nearest width."""
    if not recipe.head_is_free:
        return recipe.usual_head_bits
    q = plan.params[spec.modules[-1].linears[0].key]
    mean = sum(b * p for b, p in zip(q.bits, q.props, strict=True))
    return min(WIDTHS, key=lambda b: abs(b - mean))


def usual_head(head: LinearSpec, head_bits: int | None, overrides: Sequence[Override]) -> QParams:
    """The option whose space is the head's share of the budget: the reference's for -hb, or what --set makes of it."""
    if head_bits is None:
        return head_option(USUAL_HEAD_BITS)
    return overridden(overrides, head, head_option(head_bits))


def allocated_options(
    linear: LinearSpec, head_bits: int | None, overrides: Sequence[Override], low: bool
) -> Sequence[QParams]:
    """What `allocate_linears` may choose from for one linear, before --set; ``head_bits``: of -hb, None if it is free."""
    if linear.role != "lm_head" or head_bits is None:
        return all_options(low)
    usual = usual_head(linear, head_bits, overrides)
    override = counting(overrides, linear)
    return (usual,) if override is not None and override.option is not None else held_options(usual, linear, low)


class _Sizes:
    """What groups of linears may choose from, and the bits that it takes; once for groups that are alike."""

    def __init__(self, overrides: Sequence[Override], low: bool, head_bits: int | None) -> None:
        self._overrides, self._low, self._head_bits = overrides, low, head_bits
        self._known: dict[object, tuple[Sequence[QParams], list[int]]] = {}

    def of(self, linears: Sequence[LinearSpec]) -> tuple[Sequence[QParams], list[int]]:
        alike = _alike(linears, self._overrides)
        kinds = tuple((kind, len(xs)) for kind, xs in alike.items())
        if kinds not in self._known:
            options = self._options(linears)
            bits = [
                sum(len(xs) * overridden(self._overrides, xs[0], q).bits_of(xs[0]) for xs in alike.values()) for q in options
            ]
            self._known[kinds] = options, bits
        return self._known[kinds]

    def _options(self, linears: Sequence[LinearSpec]) -> Sequence[QParams]:
        """Everything, or what the user wants if that is the same for all of the linears."""
        wanted = {counting(self._overrides, x) for x in linears}
        override, options = wanted.pop(), allocated_options(linears[0], self._head_bits, self._overrides, self._low)
        if wanted or override is None:
            return options
        if override.option is not None:
            return (override.option,)
        return [q for q in options if min(q.bits) >= (override.minimum or 0)]


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
    low = below_tables(spec, bits, overrides)
    slots: list[Slot] = []
    owners: list[list[dict[str, QParams]]] = []
    for module in spec.modules:
        if not module.quantized:
            continue
        for options in scored_options(module, measurement, low):
            rows = [
                {x.key: overridden(overrides, x, o.params[x.role]) for x in module.linears if x.role in o.params}
                for o in options
            ]
            linears = {x.key: x for x in module.linears}
            costs = [
                sum(q.bits_of(linears[key]) for key, q in row.items()) if overrides else o.total_bits
                for o, row in zip(options, rows, strict=True)
            ]
            slots.append(Slot(module.profile_key, tuple(costs), tuple(1 - o.accuracy for o in options)))
            owners.append(rows)
    allocation = solve(slots, budget(slot_weights(spec), bits), objective, power)
    params: dict[str, QParams] = {}
    for rows, choice in zip(owners, allocation.choice, strict=True):
        params.update(rows[choice])
    return allocation, params


def scored_options(module: ModuleSpec, measurement: Measurement, low: bool) -> list[list[OptionProfile]]:
    """The rows that each slot of a module was measured with, followed if ``low`` by those of `low_options`.

    The error of the latter is told from the smallest row that was measured, as if all inputs counted alike.
    """
    out = []
    for measured in measurement[module.profile_key].slots():
        linears = [x for x in module.linears if x.role in measured[0].params]
        least = min(measured, key=lambda o: o.total_bits)
        known = sum(flat_loss(least.params[x.role], x.in_features) for x in linears)
        more = []
        for q in low_options() if low else ():
            worse = sum(flat_loss(q, x.in_features) for x in linears) / known
            error = (1 - least.accuracy) * worse**0.5
            more.append(OptionProfile(1 - error, sum(q.bits_of(x) for x in linears), dict.fromkeys(least.params, q)))
        out.append([*measured, *more])
    return out


def below_tables(spec: ModelSpec, bits: float, overrides: Sequence[Override] = ()) -> bool:
    """Whether a bitrate lies below the smallest rows of the option tables, so that `low_options` take part."""
    slots = [slot for module in spec.modules for slot in option_bits(module, overrides)]
    return bits < reachable_range(slots)[0]


def slot_weights(spec: ModelSpec) -> int:
    """Weights that a bitrate counts: all linears of the decoder layers, padded, without head and embedding."""
    return sum(x.padded_weights for m in spec.modules if m.quantized for x in m.linears)


def decoder_bpw(spec: ModelSpec, params: Mapping[str, QParams]) -> float:
    """Bits per weight of the decoder layers with these options, overheads included."""
    linears = [x for m in spec.modules if m.quantized for x in m.linears]
    return sum(params[x.key].bits_of(x) for x in linears) / slot_weights(spec)


def head_bpw(spec: ModelSpec, params: Mapping[str, QParams]) -> float:
    """Bits per weight of the output head with its option, overheads included."""
    head = spec.modules[-1].linears[0]
    return params[head.key].bits_of(head) / head.padded_weights


def packed_bytes(spec: ModelSpec, params: Mapping[str, QParams]) -> int:
    """Of all quantised tensors with these options, head included."""
    return sum(params[x.key].bits_of(x) for x in spec.linears) // 8


def option_bits(
    module: ModuleSpec, overrides: Sequence[Override] = (), low: bool = False
) -> list[tuple[list[int], int]]:
    """(total bits of each option, weights) of every slot of a module, from the option tables and what the user wants.

    ``low``: with the options for bitrates below the tables, behind the others.
    """
    if not module.quantized:
        return []
    out = []
    for table in option_tables({x.role for x in module.linears}):
        names = table.roles
        alike = list(_alike([x for x in module.linears if x.role in names], overrides).values())

        def cost(row: tuple[QParams, ...], xs: list[LinearSpec], names: tuple[str, ...] = names) -> int:
            return len(xs) * overridden(overrides, xs[0], row[names.index(xs[0].role)]).bits_of(xs[0])

        rows = [*table.rows, *((q,) * len(names) for q in low_options() if low)]
        bits = [sum(cost(row, xs) for xs in alike) for row in rows]
        out.append((bits, sum(len(xs) * xs[0].padded_weights for xs in alike)))
    return out


def _alike(
    linears: Sequence[LinearSpec], overrides: Sequence[Override]
) -> dict[tuple[object, ...], list[LinearSpec]]:
    """Linears of one role, size and override together: experts are many, and each kind is looked at once."""
    out: dict[tuple[object, ...], list[LinearSpec]] = {}
    for x in linears:
        out.setdefault((x.role, x.in_features, x.out_features, x.has_bias, counting(overrides, x)), []).append(x)
    return out


def module_cost(module: ModuleSpec) -> float:
    """Weights of a module's linears: what deadlines and the balance of workers go by. Few rows run through the head."""
    share = HEAD_SHARE if module.kind == "head" else 1.0
    return share * float(module.weights)


def reachable_slots(spec: ModelSpec, overrides: Sequence[Override] = ()) -> list[tuple[list[int], int]]:
    """(total bits of each option, weights) of every slot that is allocated, with the options for the lowest bitrates."""
    return [slot for module in spec.modules for slot in option_bits(module, overrides, low=True)]


def within_reach(recipe: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe with bitrates that its model can have, if it asks for --nearest; and what that changed, in words.

    A model or --set that cannot be read leaves it as it is: the checks of a conversion say what is wrong.
    """
    if not recipe.nearest or recipe.output_measurement is not None:
        return recipe, []
    try:
        spec = load_spec(SourceModel(recipe.in_dir))
        slots = reachable_slots(spec, parse_overrides(recipe.overrides, spec))
    except Exl2RayError:
        return recipe, []
    taken = {b: nearest_reachable(b, slots) for b in recipe.bits}
    notes = [f"-b {b:g} is out of reach of this model: --nearest takes {n:g}" for b, n in taken.items() if n != b]
    return replace(recipe, bits=tuple(dict.fromkeys(taken.values()))), notes
