"""How far a tuning is, in a work directory: what has been trained, the optimiser, the best state so far.

One file, replaced atomically: whoever is killed goes on from the last one that was whole, and comes to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from exl2ray.store.faults import MissingFileError
from exl2ray.store.fs import Store
from exl2ray.store.tensors import get_tensors, put_tensors
from exl2ray.tune.module import Snapshot, TunedModule

FILE = "tune.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")  # of torch.optim.Adam


@dataclass
class Progress:
    """identity: of everything that the result depends on. step: how many are done. scores: (step, held-out score) so far;
    best: index into them, whose state ``snapshots`` are, by module; loss: (steps, sum) since the last score."""

    identity: str
    step: int = 0
    scores: list[tuple[int, float]] = field(default_factory=list)
    best: int = -1
    stopped: bool = False
    snapshots: dict[str, Snapshot] = field(default_factory=dict)


def save(store: Store, progress: Progress, modules: Sequence[TunedModule]) -> None:
    tensors: dict[str, Tensor] = {}
    for module in modules:
        for name, parameter in module.parameters().items():
            tensors[f"now/{name}"] = parameter
            for moment, value in _moments(module, parameter).items():
                tensors[f"{moment}/{name}"] = value
        for name, value in _flat(progress.snapshots.get(module.key)).items():
            tensors[f"best/{name}"] = value
    facts = {k: v for k, v in asdict(_without_snapshots(progress)).items() if k != "snapshots"}
    tensors["facts"] = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    put_tensors(store, FILE, tensors)


def restore(store: Store, identity: str, modules: Sequence[TunedModule]) -> Progress | None:
    """Puts a saved state into the modules; None, and nothing done, if there is none of ``identity``."""
    try:
        tensors = get_tensors(store, FILE)
    except MissingFileError:
        return None
    facts = json.loads(bytes(tensors["facts"].tolist()))
    if facts["identity"] != identity:
        return None
    scores = [(int(s), float(v)) for s, v in facts["scores"]]
    progress = Progress(identity, facts["step"], scores, facts["best"], facts["stopped"])
    for module in modules:
        for name, parameter in module.parameters().items():
            parameter.copy_(tensors[f"now/{name}"])
            if module.optimiser is not None and f"{MOMENTS[0]}/{name}" in tensors:
                step = torch.tensor(float(progress.step), device=parameter.device)
                moments = {m: tensors[f"{m}/{name}"].to(parameter.device, copy=True) for m in MOMENTS}
                module.optimiser.state[parameter] = {"step": step, **moments}
        module.refresh()
        if progress.best >= 0:
            codes = {key: tensors[f"best/{key}.codes"].clone() for key in module.linears}
            deltas = {name: tensors[f"best/{name}.delta"].clone() for name in module.gains}
            progress.snapshots[module.key] = Snapshot(codes, deltas)
    return progress


def _without_snapshots(progress: Progress) -> Progress:
    return Progress(progress.identity, progress.step, progress.scores, progress.best, progress.stopped)


def _moments(module: TunedModule, parameter: Tensor) -> Mapping[str, Any]:
    if module.optimiser is None or parameter not in module.optimiser.state:
        return {}
    return {moment: module.optimiser.state[parameter][moment] for moment in MOMENTS}


def _flat(found: Snapshot | None) -> dict[str, Tensor]:
    if found is None:
        return {}
    codes = {f"{key}.codes": t for key, t in found.codes.items()}
    return {**codes, **{f"{name}.delta": t for name, t in found.deltas.items()}}
