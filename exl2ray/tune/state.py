"""How far a tuning is, in a work directory: what has been trained, the optimiser, the best state so far.

One file, replaced atomically: whoever is killed goes on from the last one that was whole, and comes to the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from exl2ray.store.faults import MissingFileError
from exl2ray.store.fs import Store
from exl2ray.store.tensors import get_tensors, put_tensors
from exl2ray.tune.adam import MOMENTS
from exl2ray.tune.module import Snapshot, TunedModule

FILE = "tune.safetensors"


@dataclass
class Progress:
    """identity: of everything that the result depends on. step: how many are done. start: divergences of the held-out rows at
    step 0. scores: (step, any kind of text worse than at the start, held-out score); best: index into them, whose state
    ``snapshots`` are, by module."""

    identity: str
    step: int = 0
    start: list[float] = field(default_factory=list)
    scores: list[tuple[int, bool, float]] = field(default_factory=list)
    best: int = -1
    stopped: bool = False
    snapshots: dict[str, Snapshot] = field(default_factory=dict)


def save(store: Store, progress: Progress, modules: Sequence[TunedModule]) -> None:
    tensors: dict[str, Tensor] = {}
    for module in modules:
        for name, parameter in module.parameters().items():
            tensors[f"now/{name}"] = parameter
        for optimiser in module.optimisers:
            for kind, moments in optimiser.moments.items():
                tensors.update({f"{kind}/{name}": moment for name, moment in moments.items()})
        for name, value in _flat(progress.snapshots.get(module.key)).items():
            tensors[f"best/{name}"] = value
    facts = {k: v for k, v in asdict(replace(progress, snapshots={})).items() if k != "snapshots"}
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
    scores = [(int(s), bool(w), float(v)) for s, w, v in facts["scores"]]
    progress = Progress(identity, facts["step"], facts["start"], scores, facts["best"], facts["stopped"])
    for module in modules:
        for name, parameter in module.parameters().items():
            parameter.copy_(tensors[f"now/{name}"])
        for optimiser in module.optimisers:
            moments = {kind: {n: tensors[f"{kind}/{n}"] for n in optimiser.parameters} for kind in MOMENTS}
            optimiser.restore(moments, progress.step)
        module.refresh()
        if progress.best >= 0:
            codes = {key: tensors[f"best/{key}.codes"].clone() for key in module.linears}
            deltas = {name: tensors[f"best/{name}.delta"].clone() for name in module.gains}
            progress.snapshots[module.key] = Snapshot(codes, deltas)
    return progress


def forget(store: Store) -> None:
    """Deletes what `save` has written."""
    store.delete(FILE)


def _flat(found: Snapshot | None) -> dict[str, Tensor]:
    if found is None:
        return {}
    codes = {f"{key}.codes": t for key, t in found.codes.items()}
    return {**codes, **{f"{name}.delta": t for name, t in found.deltas.items()}}
