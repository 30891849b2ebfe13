"""The sensitivity pass: one sweep over the model carries the perturbed copies of its states that were made on the way.

A module is read once per sweep, whatever the number of probes that go through it. Modules are shared out in runs, one sweep
each, so that several workers can take part and no sweep carries more states than a machine has room for. A probe does not
depend on what else is carried along: any division into sweeps has the same results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from exl2ray.dist.items import SensitivityItem
from exl2ray.dist.runner import Runner
from exl2ray.errors import NumericError
from exl2ray.model.blocks import check_states
from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.quant.sensitivity import Probe, advanced, divergences, head_probe, probes_of
from exl2ray.store.layout import MEASURE
from exl2ray.store.records import Record

CARRIED_BYTES = 8 << 30  # of probes' states in one sweep
ROWS, TOKENS = 8, 256  # of the tokens that probes run on: many short texts say more than one long one
SYNTHETIC = {"random", "shuffled", "noise"}  # kinds of calibration rows that are no text

PROBES = 1  # changes with what is measured here
Sensitivities = dict[str, dict[str, list[float]]]  # module -> role -> [KL per token, squared error per token]


def sweep(runner: Runner, item: SensitivityItem) -> Sensitivities:
    """Probes all linears of the modules of an item. Raises NumericError where a probe has no finite result."""
    spec = runner.spec
    ids = runner.rows("measure")[list(item.rows), : item.tokens]
    batch = max(1, len(ids) // item.shrink)
    carried = probe_bytes([spec.modules[i] for i in item.modules], spec, len(item.rows) * item.tokens)
    home = runner.home(carried)
    x = runner.load(spec.modules[0], torch.float32).forward(ids).to(home)
    probes: list[Probe] = []
    out: Sensitivities = {}
    for module in spec.modules[1:]:
        block = runner.load(module, torch.float32)
        if module.kind == "head":
            for probe, kl in zip(probes, divergences(block, x, [p.states for p in probes]), strict=True):
                out.setdefault(probe.key, {})[probe.role] = [kl, probe.error]
            if module.index in item.modules:
                out[module.profile_key] = {module.linears[0].role: list(head_probe(block, x))}
            break
        for probe in probes:
            probe.states = advanced(block, probe.states, runner.device, batch)
        if module.index in item.modules:
            x, new = probes_of(block, x, runner.device, batch)
            probes += new
        else:
            x = advanced(block, x, runner.device, batch)
        check_states(x, f"output of {module.profile_key}")
    for key, roles in out.items():
        for role, values in roles.items():
            if not all(math.isfinite(v) for v in values):
                raise NumericError(
                    f"{key}, {role}: the probe has KL {values[0]} and squared error {values[1]}",
                    "the model's activations may be too large for float16",
                )
    return out


def sensitivity_name(spec: ModelSpec, item: SensitivityItem) -> str:
    """What an item is called in messages."""
    first, last = (spec.modules[i].profile_key for i in (item.modules[0], item.modules[-1]))
    return f"sensitivity of {first}" + (f" .. {last}" if last != first else "")


def sensitivity_key(key: str) -> str:
    """Key of the record of a module's sensitivities."""
    return f"sensitivity-{key}"


def sensitivity_record(key: str, roles: Mapping[str, Sequence[float]], inputs_hash: str, seconds: float) -> Record:
    """The record of one module's probes."""
    return Record(MEASURE, sensitivity_key(key), inputs_hash, {"sensitivity": dict(roles)}, (), seconds)


def probe_rows(kinds: Sequence[str], lengths: int) -> tuple[tuple[int, ...], int]:
    """(row numbers, tokens of each) of the calibration rows that probes run on: text, spread evenly over the set."""
    usable = [i for i, kind in enumerate(kinds) if kind not in SYNTHETIC] or list(range(len(kinds)))
    count = min(ROWS, len(usable))
    return tuple(usable[i * len(usable) // count] for i in range(count)), min(TOKENS, lengths)


def probe_bytes(modules: Sequence[ModuleSpec], spec: ModelSpec, tokens: int) -> int:
    """Bytes of the states of all probes of some modules; the head has none."""
    probes = sum(len({x.role for x in m.linears}) for m in modules if m.quantized)
    return 4 * probes * tokens * spec.hyper.hidden_size


def sweep_costs(spec: ModelSpec, costs: Mapping[int, float]) -> dict[int, float]:
    """Module index -> cost of its probes: a forward from there to the end for each role. ``costs``: of one forward."""
    out: dict[int, float] = {}
    tail = 0.0
    for module in reversed(spec.modules):
        tail += costs.get(module.index, 0.0)
        roles = len({x.role for x in module.linears})
        if roles:
            out[module.index] = roles * tail
    return out


def divide(
    spec: ModelSpec, modules: Sequence[ModuleSpec], costs: Mapping[int, float], workers: int, tokens: int
) -> list[list[int]]:
    """Cuts modules (in order) into runs of about equal cost: one per worker, or more if their states need it."""
    cost = sweep_costs(spec, costs)
    wanted = max(min(workers, len(modules)), -(-probe_bytes(modules, spec, tokens) // CARRIED_BYTES))
    share = sum(cost[m.index] for m in modules) / wanted
    runs: list[list[int]] = []
    spent = 0.0
    for module in modules:
        if not runs or spent >= share * len(runs):
            runs.append([])
        runs[-1].append(module.index)
        spent += cost[module.index]
    return runs
