"""``exl2ray solve``: what each module or linear would get at a bitrate, from a measurement and the model's headers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from exl2ray.allocation.knapsack import Slot, budget, check_reachable
from exl2ray.allocation.knapsack import solve as allocate
from exl2ray.allocation.planning import choose, has_sensitivities, insensitive, linear_groups, slot_weights
from exl2ray.errors import UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import LinearShape, QParams, pad32
from exl2ray.formats.measurement import Measurement, OptionProfile, check_against, read_measurement
from exl2ray.formats.origin import origin_findings
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.recipe import MAX_BITS, MIN_BITS, Recipe
from exl2ray.remote.source import local
from exl2ray.result_warnings import insensitive_warning, unspent_warning
from exl2ray.terminal.console import clean
from exl2ray.terminal.live import show_table


@dataclass(frozen=True)
class Choice:
    """One module (half of a parallel block): its option, counted from 0, of ``options``; ``error`` is 1 - accuracy."""

    key: str
    option: int
    options: int
    bits_per_weight: float
    error: float
    params: Mapping[str, str]  # role -> option text
    widths: Mapping[str, float]  # role -> mean bits of a weight, scales not counted


@dataclass(frozen=True)
class LinearChoice:
    """One linear (all experts of a role): its option, storage, and part in the predicted KL divergence, nats per token."""

    key: str
    option: str
    bits_per_weight: float
    kl: float


@dataclass(frozen=True)
class Solution:
    """gap: distance to the proven optimum, relative; for objective "product" the mean excess of log error.

    One of ``choices`` and ``linears`` is filled, as ``allocation`` says. predicted_kl: where sensitivities were measured,
    with the head at its usual 6 bits where the allocation does not choose them.
    """

    bits: float  # asked for
    achieved_bpw: float
    total_bits: int
    objective: str
    objective_value: float
    gap: float
    choices: tuple[Choice, ...] = ()
    linears: tuple[LinearChoice, ...] = ()
    allocation: str = "module"
    predicted_kl: float | None = None
    warnings: tuple[str, ...] = ()


def solve(
    in_dir: str,
    measurement: str,
    bits: Sequence[float],
    objective: str,
    objective_power: float,
    allocation: str | None = None,  # None: linear if the measurement was made for it
    head_bits: int | None = None,
) -> list[Solution]:
    """Allocations for each bitrate, in order.

    Raises SourceError for the model, FormatError for a measurement that is not one or of another model, BudgetError
    with the reachable range for a bitrate outside of it.
    """
    for b in bits:
        if not MIN_BITS <= b <= MAX_BITS:
            raise UsageError(f"-b {b:g}: bits per weight lie between {MIN_BITS:g} and {MAX_BITS:g}")
    source = SourceModel(local(in_dir))
    spec = load_spec(source)
    found = read_measurement(measurement)
    check_against(found, [m.profile_key for m in spec.modules if m.kind != "embedding"], _shapes(spec))
    if allocation == "linear" or (allocation is None and has_sensitivities(spec, found)):
        solutions = [_linear_solution(spec, found, b, head_bits) for b in bits]
    else:
        solutions = [_solution(spec, found, b, objective, objective_power) for b in bits]
    warnings, _ = origin_findings(found, source)
    return [replace(s, warnings=(*warnings, *s.warnings)) for s in solutions]


def show(solutions: Sequence[Solution]) -> None:
    for s in solutions:
        if s.linears:
            cells = [[c.key, c.option, f"{c.bits_per_weight:.3f}", f"{c.kl:.3g}"] for c in s.linears]
            show_table(f"{s.bits:g} bits per weight", ["linear", "option", "bpw", "KL"], cells)
            print(f"achieved {s.achieved_bpw:.4f} bits per weight; predicted KL {s.predicted_kl:.4g}, {_gap(s)}")
            _warn(s)
            continue
        rows = [
            [c.key, f"{c.option + 1}/{c.options}", f"{c.bits_per_weight:.3f}", f"{c.error:.6f}", _widths(c.widths)]
            for c in s.choices
        ]
        title = f"{s.bits:g} bits per weight"
        show_table(title, ["module", "option", "bpw", "error", "mean width per linear"], rows)
        print(
            f"achieved {s.achieved_bpw:.4f} bits per weight; objective {s.objective} = {s.objective_value:.6g}, "
            f"{_gap(s)}" + ("" if s.predicted_kl is None else f"; predicted KL {s.predicted_kl:.4g}")
        )
        _warn(s)


def _warn(s: Solution) -> None:
    for text in s.warnings:
        print(clean(f"warning: {text}"))


def _linear_solution(spec: ModelSpec, measurement: Measurement, bits: float, head_bits: int | None) -> Solution:
    chosen = choose(spec, measurement, bits, Recipe("", "", (bits,), head_bits, allocation="linear"))
    linears, decoder = [], 0
    for group in linear_groups(spec, measurement):
        q = chosen.params[group.linears[0].key]
        size = sum(q.total_bits(x.in_features, pad32(x.out_features), x.has_bias) for x in group.linears)
        weights = sum(x.in_features * pad32(x.out_features) for x in group.linears)
        linears.append(LinearChoice(group.key, q.desc, size / weights, group.sensitivity * group.curve.loss(q)))
        decoder += size if group.linears[0].role != "lm_head" else 0
    found, achieved = chosen.allocation, decoder / slot_weights(spec)
    doubts = insensitive_warning(*insensitive(spec, measurement)) + unspent_warning(bits, achieved, found.unspent, False)
    return Solution(
        bits=bits, achieved_bpw=achieved, total_bits=found.total_bits, objective="predicted KL",
        objective_value=found.objective, gap=max(0.0, found.gap), linears=tuple(linears), allocation="linear",
        predicted_kl=chosen.predicted_kl, warnings=tuple(doubts),
    )  # fmt: skip


def _solution(spec: ModelSpec, measurement: Measurement, bits: float, objective: str, power: float) -> Solution:
    slots = [
        (module, options)
        for module in spec.modules
        if module.quantized
        for options in measurement[module.profile_key].slots()
    ]
    weights = [_weights(module, options[0].params) for module, options in slots]
    tables = [([o.total_bits for o in options], w) for (_, options), w in zip(slots, weights, strict=True)]
    check_reachable(bits, tables)
    total_weights = sum(weights)
    candidates = [
        Slot(module.profile_key, tuple(o.total_bits for o in options), tuple(1 - o.accuracy for o in options))
        for module, options in slots
    ]
    allocation = allocate(candidates, budget(total_weights, bits), objective, power)
    choices = tuple(
        _choice(module, options, index, count)
        for (module, options), index, count in zip(slots, allocation.choice, weights, strict=True)
    )
    gap = max(0.0, allocation.gap)
    achieved = allocation.total_bits / total_weights
    kl = None
    if has_sensitivities(spec, measurement):
        recipe = Recipe("", "", (bits,), allocation="module", objective=objective, objective_power=power)  # type: ignore[arg-type]
        kl = choose(spec, measurement, bits, recipe).predicted_kl
    return Solution(
        bits, achieved, allocation.total_bits, objective, allocation.objective, gap, choices, predicted_kl=kl,
        warnings=tuple(unspent_warning(bits, achieved, allocation.unspent, False)),
    )  # fmt: skip


def _choice(module: ModuleSpec, options: Sequence[OptionProfile], index: int, weights: int) -> Choice:
    chosen = options[index]
    half = "" if module.kind != "parallel" else ".attn" if "q_proj" in chosen.params else ".mlp"
    return Choice(
        key=module.profile_key + half,
        option=index,
        options=len(options),
        bits_per_weight=chosen.total_bits / weights,
        error=1 - chosen.accuracy,
        params={role: p.desc for role, p in chosen.params.items()},
        widths={role: _mean_width(p) for role, p in chosen.params.items()},
    )


def _weights(module: ModuleSpec, params: Mapping[str, QParams]) -> int:
    return sum(x.in_features * pad32(x.out_features) for x in module.linears if x.role in params)


def _mean_width(p: QParams) -> float:
    return sum(bits * share for bits, share in zip(p.bits, p.props, strict=True))


def _shapes(spec: ModelSpec) -> dict[str, dict[str, list[LinearShape]]]:
    out: dict[str, dict[str, list[LinearShape]]] = {}
    for module in spec.modules:
        if module.quantized:
            roles = out.setdefault(module.profile_key, {})
            for x in module.linears:
                roles.setdefault(x.role, []).append(LinearShape(x.in_features, x.out_features, x.has_bias))
    return out


def _widths(widths: Mapping[str, float]) -> str:
    return " ".join(f"{role.removesuffix('_proj')} {width:.3g}" for role, width in widths.items())


def _gap(s: Solution) -> str:
    if s.objective == "product":
        return f"at most {s.gap:.2e} per module above the proven optimum"
    return f"at most {100 * s.gap:.4f} % above the proven optimum"
