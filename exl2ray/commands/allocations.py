"""``exl2ray solve``: what each module or linear would get at a bitrate, from a measurement and the model's headers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from exl2ray.allocation.knapsack import check_reachable
from exl2ray.allocation.planning import Choice as Chosen
from exl2ray.allocation.planning import (
    below_tables,
    choose,
    decoder_bpw,
    has_sensitivities,
    head_bpw,
    insensitive,
    reachable_slots,
    scored_options,
)
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import QParams
from exl2ray.formats.measurement import Measurement, OptionProfile, check_against, read_measurement
from exl2ray.formats.origin import origin_findings
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.plan.measured import expected_measurement, naming
from exl2ray.recipe import SETTINGS, Recipe
from exl2ray.remote.source import local
from exl2ray.result_warnings import few_scores_warning, insensitive_warning, unspent_warning
from exl2ray.terminal.console import show_text
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
    head_bpw: float = 0.0


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
        SETTINGS["bits"].check((b,))
    source = SourceModel(local(in_dir))
    spec, found = load_spec(source), read_measurement(measurement)
    with naming(measurement):
        check_against(found, *expected_measurement(spec))
        if allocation is None:
            allocation = "linear" if has_sensitivities(spec, found) else "module"
    settings: dict[str, Any] = {
        "allocation": allocation, "objective": objective, "objective_power": objective_power, "head_bits": head_bits,
    }  # fmt: skip
    with naming(measurement):
        solutions = [_solution(spec, found, Recipe("", "", (b,), **settings)) for b in bits]
    warnings, _ = origin_findings(found, source)
    return [replace(s, warnings=(*warnings, *s.warnings)) for s in solutions]


def _solution(spec: ModelSpec, measurement: Measurement, recipe: Recipe) -> Solution:
    (bits,), linear = recipe.bits, recipe.allocates == "linear"
    slots = _slots(spec, measurement, below_tables(spec, bits))
    if linear:
        check_reachable(bits, reachable_slots(spec))
    else:
        reached = _slots(spec, measurement, low=True)
        check_reachable(bits, [([o.total_bits for o in options], _weights(m, options[0].params)) for m, options in reached])
    chosen = choose(spec, measurement, bits, recipe)
    found, achieved = chosen.allocation, decoder_bpw(spec, chosen.params)
    doubts = insensitive_warning(*insensitive(chosen.groups)) if linear else few_scores_warning(measurement.scores)
    return Solution(
        bits=bits,
        achieved_bpw=achieved,
        total_bits=found.total_bits,
        objective="predicted KL" if linear else recipe.objective,
        objective_value=found.objective,
        gap=max(0.0, found.gap),
        choices=() if linear else tuple(_choice(*slot, index) for slot, index in zip(slots, found.choice, strict=True)),
        linears=tuple(_linear_choices(chosen)) if linear else (),
        allocation=recipe.allocates,
        predicted_kl=chosen.predicted_kl,
        head_bpw=head_bpw(spec, chosen.params),
        warnings=(*doubts, *unspent_warning(bits, achieved, found.unspent, False)),
    )


def _slots(spec: ModelSpec, measurement: Measurement, low: bool) -> list[tuple[ModuleSpec, Sequence[OptionProfile]]]:
    return [(m, options) for m in spec.modules if m.quantized for options in scored_options(m, measurement, low)]


def _linear_choices(chosen: Chosen) -> Iterator[LinearChoice]:
    for group in chosen.groups:
        q = chosen.params[group.linears[0].key]
        size = sum(q.bits_of(x) for x in group.linears)
        weights = sum(x.padded_weights for x in group.linears)
        yield LinearChoice(group.key, q.desc, size / weights, group.sensitivity * group.curve.loss(q))


def _choice(module: ModuleSpec, options: Sequence[OptionProfile], index: int) -> Choice:
    chosen = options[index]
    half = "" if module.kind != "parallel" else ".attn" if "q_proj" in chosen.params else ".mlp"
    return Choice(
        key=module.profile_key + half,
        option=index,
        options=len(options),
        bits_per_weight=chosen.total_bits / _weights(module, chosen.params),
        error=1 - chosen.accuracy,
        params={role: p.desc for role, p in chosen.params.items()},
        widths={role: sum(b * s for b, s in zip(p.bits, p.props, strict=True)) for role, p in chosen.params.items()},
    )


def _weights(module: ModuleSpec, params: Mapping[str, QParams]) -> int:
    return sum(x.padded_weights for x in module.linears if x.role in params)


def show(solutions: Sequence[Solution]) -> None:
    """Prints a table for each bitrate, and how close to the optimum it is."""
    for s in solutions:
        title, kl = f"{s.bits:g} bits per weight", "" if s.predicted_kl is None else f"predicted KL {s.predicted_kl:.4g}"
        if s.linears:
            cells = [[c.key, c.option, f"{c.bits_per_weight:.3f}", f"{c.kl:.3g}"] for c in s.linears]
            show_table(title, ["linear", "option", "bpw", "KL"], cells)
            reached = f"{kl}, {_gap(s)}"
        else:
            cells = [
                [c.key, f"{c.option + 1}/{c.options}", f"{c.bits_per_weight:.3f}", f"{c.error:.6f}", _widths(c.widths)]
                for c in s.choices
            ]
            show_table(title, ["module", "option", "bpw", "error", "mean width per linear"], cells)
            reached = f"objective {s.objective} = {s.objective_value:.6g}, {_gap(s)}" + (f"; {kl}" if kl else "")
        show_text(f"achieved {s.achieved_bpw:.4f} bits per weight in the decoder, {s.head_bpw:.4f} in the head; {reached}")
        for text in s.warnings:
            show_text(f"warning: {text}")


def _widths(widths: Mapping[str, float]) -> str:
    return " ".join(f"{role.removesuffix('_proj')} {width:.3g}" for role, width in widths.items())


def _gap(s: Solution) -> str:
    if s.objective == "product":
        return f"at most {s.gap:.2e} per module above the proven optimum"
    return f"at most {100 * s.gap:.4f} % above the proven optimum"
