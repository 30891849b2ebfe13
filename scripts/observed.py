"""Seconds of single calls as `scaling.py --costs` saw them on one GPU, and costs of the simulation brought in line with them.

A file of them: {"source", "driver_s", "models": {model: {work: {kind of module: {method: [first, later]}}}}}. Works: measure,
reference, quantized. Methods: enter, measure, quantize, chain, perplexity; "module" stands for enter and what follows it.
``later``: median; ``first``: a worker's first call of this kind; null where it cannot be told apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from scaling_run import Call, Figure
from schedule_costs import Costs, ModelCosts, ModuleCosts

from exl2ray.model.spec import PROFILE_SUFFIX

KINDS = {suffix: kind for kind, suffix in PROFILE_SUFFIX.items()}
Times = tuple[float | None, float | None]  # first, later
Methods = dict[str, dict[str, Times]]  # kind of module -> method -> times


@dataclass(frozen=True)
class Observed:
    source: str
    driver_s: float | None
    models: dict[str, dict[str, Methods]]

    def to_json(self) -> str:
        value = {"source": self.source, "driver_s": self.driver_s, "models": self.models}
        return json.dumps(value, indent=1) + "\n"

    @staticmethod
    def load(path: Path) -> Observed:
        return Observed(**json.loads(path.read_text(encoding="utf-8")))

    def corrected(self, costs: Costs) -> Costs:
        """``costs`` with the seconds of calls that were seen. What a call is made of keeps its shares."""
        models = {n: corrected(m, self.models[n]) if n in self.models else m for n, m in costs.models.items()}
        seen = [n for n in models if n in self.models]
        if not seen:
            return costs
        driver = costs.driver_s if self.driver_s is None else self.driver_s
        source = f"{costs.source}; measured, on one GPU: {', '.join(seen)} ({self.source})"
        return replace(costs, models=models, driver_s=driver, source=source)


def corrected(model: ModelCosts, works: dict[str, Methods]) -> ModelCosts:
    modules = {kind: corrected_module(m, kind, works) for kind, m in model.modules.items()}
    perplexity = later(works.get("reference", {}).get("all", {}), "perplexity")
    return replace(model, modules=modules, perplexity_s=model.perplexity_s if perplexity is None else perplexity)


def corrected_module(m: ModuleCosts, kind: str, works: dict[str, Methods]) -> ModuleCosts:
    measure, reference, chain = (works.get(w, {}).get(kind, {}) for w in ("measure", "reference", "quantized"))
    enter, rest = ratios(measure, "measure", m.enter_s(True), m.rest_s(True))
    m = replace(
        m, sweep_s=m.sweep_s * enter, hessian_s=m.hessian_s * enter, measure_s=m.measure_s * rest,
        first_measure_s=extra(measure),
    )  # fmt: skip
    enter, rest = ratios(reference, "quantize", m.enter_s(False), m.rest_s(False))
    m = replace(
        m, forward_s=m.forward_s * enter, forward_hessian_s=m.forward_hessian_s * enter, reported_s=m.reported_s * enter,
        check_s=m.check_s * rest, solve_s={k: s * rest for k, s in m.solve_s.items()}, first_quantize_s=extra(reference),
        wide_s={k: s * rest for k, s in m.wide_s.items()}, wide_serial_s={k: s * rest for k, s in m.wide_serial_s.items()},
    )  # fmt: skip
    alone = later(chain, "chain")
    if alone is not None:
        m = replace(m, group=alone / (m.enter_s(False) + m.reported_s + m.rest_s(False)))
    return replace(m, first_chain_s=extra(chain) if chain else m.first_quantize_s)


def ratios(methods: dict[str, Times], work: str, enter_s: float, work_s: float) -> tuple[float, float]:
    """What was seen over what is assumed: of entering a module, and of the work on it. 1 where nothing was seen."""
    whole = later(methods, "module")
    if whole is not None:
        return (whole / (enter_s + work_s),) * 2
    seen = later(methods, "enter"), later(methods, work)
    return tuple(1.0 if s is None else s / c for s, c in zip(seen, (enter_s, work_s), strict=True))  # type: ignore[return-value]


def later(methods: dict[str, Times], name: str) -> float | None:
    return methods[name][1] if name in methods else None


def extra(methods: dict[str, Times]) -> float:
    """What first calls take in addition."""
    return sum(max(0.0, first - after) for first, after in methods.values() if first is not None and after is not None)


def observe(source: str, runs: Iterable[tuple[str, int, Figure]]) -> Observed:
    """Of (model, layers, figure); runs on several GPUs and ladders are passed over."""
    models: dict[str, dict[str, Methods]] = {}
    idle = calls = 0.0
    for model, layers, figure in runs:
        if figure.run.gpus != 1 or figure.run.work == "ladder":
            continue
        idle, calls = idle + figure.driver_s, calls + len(figure.calls)
        methods: Methods = {}
        groups: dict[tuple[str, str], list[Call]] = {}
        for call in figure.calls:
            kind = "all" if call.method == "perplexity" else KINDS.get(call.key.rsplit(".", 1)[-1])
            if kind is not None:
                groups.setdefault((kind, call.method), []).append(call)
        for (kind, method), group in groups.items():
            if method == "perplexity":
                methods.setdefault(kind, {})[method] = (None, round(group[0].seconds / layers, 5))
            elif method not in ("join", "sweep"):
                # a call on a module of the source model has the reference pass in it, and the work on it
                name = "module" if method in ("measure", "quantize") else method
                methods.setdefault(kind, {})[name] = times(group)
        models.setdefault(model, {})[figure.run.work] = methods
    return Observed(source, round(idle / calls, 5) if calls else None, models)


def times(calls: list[Call]) -> Times:
    """Of calls in the order in which they ended."""
    firsts: dict[str, float] = {}
    others = []
    for call in calls:
        if call.worker in firsts:
            others.append(call.seconds)
        else:
            firsts[call.worker] = call.seconds
    if not others:  # of a single layer: no telling what the first one takes in addition
        return None, round(mean(firsts.values()), 5)
    return round(mean(firsts.values()), 5), round(median(others), 5)
