"""Work directories made by hand: what a conversion of a model of any depth would have left, without converting anything."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import torch

from exl2ray.formats.layout import LinearShape, QParams
from exl2ray.formats.measurement import Measurement, ModuleProfile, OptionProfile
from exl2ray.quant.qparams import attention_options, head_option, mlp_options
from exl2ray.recipe import Recipe
from exl2ray.report.facts import read_facts
from exl2ray.report.page import render
from exl2ray.store.file_names import EVENTS, MEASURE, MEASUREMENT, quant_kind
from exl2ray.store.fs import Store
from exl2ray.store.job_file import JOB_FILE, StoredJob, encode_job
from exl2ray.store.open import open_store
from exl2ray.store.records import FileRef, Record, Records, hash_inputs, item_file
from exl2ray.store.tensors import put_tensors

VERSIONS = {"exl2ray": "0.1.0", "python": "3.11.7", "torch": "2.13.0", "ray": "2.60.0"}
START = datetime(2025, 3, 1, 12, 0, tzinfo=timezone.utc)


@dataclass(frozen=True)
class Model:
    """An imitation: ``hidden`` wide, MLP three times that; ``experts`` in place of the MLP if not 0."""

    layers: int
    hidden: int = 128
    experts: int = 0
    name: str = "imitation"

    def modules(self) -> list[str]:
        second = "block_sparse_moe" if self.experts else "mlp"
        return [f"model.layers.{i}.{part}" for i in range(self.layers) for part in ("self_attn", second)]

    def linears(self, module: str) -> dict[str, LinearShape]:
        """Linear key -> shape."""
        if module == "lm_head.linear":
            return {"lm_head": LinearShape(self.hidden, 512)}
        h, f = self.hidden, 3 * self.hidden
        if module.endswith("self_attn"):
            return {f"{module}.{r}_proj": LinearShape(h, h // 4 if r in "kv" else h) for r in "qkvo"}
        shapes = {"w1": LinearShape(h, f), "w3": LinearShape(h, f), "w2": LinearShape(f, h)}
        if self.experts:
            return {f"{module}.experts.{e}.{r}": s for e in range(self.experts) for r, s in shapes.items()}
        return {f"{module}.{r}": s for r, s in zip(("gate_proj", "up_proj", "down_proj"), shapes.values(), strict=True)}

    def coverage(self, module: str) -> list[dict[str, float]]:
        rng = random.Random(module)
        tokens = [int(2 ** rng.uniform(3, 11)) for _ in range(self.experts)]
        if tokens:
            tokens[rng.randrange(self.experts)] = 0
        return [{"tokens": t, "share": t / max(1, sum(tokens))} for t in tokens]


def profile(model: Model, module: str) -> ModuleProfile:
    """Errors that fall with the bits, by an amount of each layer's own."""
    key, _, mode = module.rpartition(".")
    table = attention_options() if mode == "self_attn" else mlp_options()
    linears = model.linears(module)
    roles = list(dict.fromkeys(k.rpartition(".")[2] for k in linears))
    rng = random.Random(module)
    level = rng.uniform(0.1, 0.4) * (1.5 if key.endswith(".0") else 1)
    weights = sum(s.in_features * s.out_features for s in linears.values())
    options = []
    for row in table:
        params = dict(zip(roles, row, strict=True))
        bits = sum(params[k.rpartition(".")[2]].layout(s.in_features).total_bits(s.padded_out) for k, s in linears.items())
        error = level * 2 ** (-0.9 * (bits / weights - 2)) * rng.uniform(0.95, 1.05)
        options.append(OptionProfile(1 - error, bits, params))
    extra: dict[str, Any] = {}
    if model.experts and mode != "self_attn":
        extra = {"experts": model.coverage(module), "notes": ["coverage in words", "w13.3: 7 tokens, completed from all"]}
    return ModuleProfile(key, mode, tuple(options), extra=extra)


def choice(model: Model, bits: float) -> list[int]:
    """A plausible option for every module: more in the first layers."""
    out = []
    for i, module in enumerate(model.modules()):
        count = 19 if module.endswith("self_attn") else 17
        out.append(min(count - 1, max(0, round((bits - 2.2) * 3 + 2 * math.cos(i / 3) + (3 if i < 2 else 0)))))
    return out


def write_job(store: Store, model: Model, bits: tuple[float, ...], **identity: Any) -> None:
    recipe = Recipe(in_dir=f"/models/{model.name}", out_dir=store.root, bits=bits)
    model_identity = {"fingerprint": "ab" * 32, "architecture": "LlamaForCausalLM", "in_dir": recipe.in_dir}
    job = recipe.job({**model_identity, **identity}, None)
    store.put(JOB_FILE, encode_job(StoredJob(job, VERSIONS, "2025-03-01T12:00:00.000Z")))


def write_measurement(store: Store, model: Model, complete: bool = True) -> list[ModuleProfile]:
    profiles = [profile(model, m) for m in model.modules()]
    if complete:
        store.put(MEASUREMENT, Measurement(tuple(profiles), 2 * model.layers).to_bytes())
        return profiles
    for p in profiles[: model.layers]:
        value = {"profile": {"value": p.to_json(), "extra": dict(p.extra)}, "notes": []}
        Records(store).commit(Record(MEASURE, p.entry_key, hash_inputs(key=p.entry_key), value))
    return profiles[: model.layers]


def write_chain(
    store: Store, model: Model, profiles: list[ModuleProfile], bits: float, modules: int | None = None, tensors: bool = False
) -> None:
    """Records of the first ``modules`` modules of a bitrate, all and the head if None."""
    todo: list[tuple[str, dict[str, QParams], float | None]] = []
    for p, i in zip(profiles, choice(model, bits), strict=True):
        option = (p.options or ())[i]
        params = {k: option.params[k.rpartition(".")[2]] for k in model.linears(p.entry_key)}
        todo.append((p.entry_key, params, 1.1 * (1 - option.accuracy)))
    todo.append(("lm_head.linear", {"lm_head": head_option(6)}, None))
    records = Records(store)
    for key, params, error in todo[:modules]:
        digest = hash_inputs(key=key, bits=bits)
        payload: dict[str, Any] = {"notes": [], "options": {k: q.desc for k, q in params.items()}}
        if error is None:
            payload |= {"perplexity": 5.2 + 4 / bits**2, "reference_perplexity": 5.2}
        else:
            payload["error"] = error
        if key.endswith("moe"):
            payload |= {"experts": model.coverage(key + "q"), "notes": ["coverage in words", "w2.5: no token, rounded"]}
        if key.endswith(".3.self_attn"):
            payload["notes"] = ["damping raised to 0.24"]
        files = (_tensors(store, model, key, params, bits, digest),) if tensors else ()
        records.commit(Record(quant_kind(bits), key, digest, payload, files, 1.5, "node-1:77", 1.7e9))


def _tensors(store: Store, model: Model, key: str, params: dict[str, QParams], bits: float, digest: str) -> FileRef:
    out = {}
    for name, s in model.linears(key).items():
        layout = params[name].layout(s.in_features)
        out[f"{name}.q_weight"] = torch.zeros(layout.packed_rows, s.padded_out, dtype=torch.int32)
        out[f"{name}.q_invperm"] = torch.zeros(s.in_features, dtype=torch.int32)
    return put_tensors(store, item_file(quant_kind(bits), "tensors", key, digest), out)


class Clock:
    """Writes events at times that it is told."""

    def __init__(self, store: Store) -> None:
        self.store, self.now, self.lines = store, 0.0, []

    def event(self, name: str, **fields: Any) -> None:
        stamp = (START + timedelta(seconds=self.now)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.lines.append(json.dumps({"time": stamp, "host": "head", "pid": 1, "name": name, "fields": fields}))

    def save(self) -> None:
        self.store.put(EVENTS, ("\n".join(self.lines) + "\n").encode())


def write_events(store: Store, model: Model, bits: tuple[float, ...], workers: int) -> None:
    """Two runs: the first measures and is killed half way, the second goes on a day later and quantises."""
    clock, names = Clock(store), [f"node-{i // 8}:{4000 + i}" for i in range(workers)]
    modules, rng = model.modules(), random.Random(0)
    clock.event("opened", mode="created", changed=[], versions=VERSIONS, notes=[])
    clock.now = 12.0
    half = len(modules) // 2
    _pass(clock, rng, "measure", "measure", modules[:half], len(modules), 0, names, None)
    clock.event("lost", key=modules[half], method="measure", reason="the worker died: SIGKILL", times=1)
    clock.now += 86400
    clock.event("opened", mode="resumed", changed=[], versions=VERSIONS, notes=["took over from a driver that ended"])
    clock.now += 9
    _pass(clock, rng, "measure", "measure", modules[half:], len(modules), half, names, None)
    for b in bits:
        clock.event("allocated", bits=b, bpw=b - 0.0013, gap=3e-6, choice=choice(model, b), predicted_kl=0.45 * 2.0**-b)
    for b in bits:
        _pass(clock, rng, f"quantize {b!r}", "chain", [*modules, "lm_head.linear"], len(modules) + 1, 0, names, b)
        clock.event("written", bits=b, directory=f"/out/{model.name}-{b:g}bpw", files=["output.safetensors"])
    clock.save()


def _pass(
    clock: Clock, rng: random.Random, stage: str, method: str, keys: list[str], items: int, done: int, names: list[str],
    bits: float | None,
) -> None:  # fmt: skip
    clock.event("stage", stage=stage, items=items, done=done)
    for begin in range(0, len(keys), len(names)):
        some = list(zip(keys[begin : begin + len(names)], names, strict=False))
        for key, worker in some:
            clock.event("started", method=method, key=key, bits=bits, worker=worker)
            clock.now += 0.2
        for key, worker in some:
            clock.now += rng.uniform(0.5, 3)
            done += 1
            clock.event("item", stage=stage, key=key, done=done, items=items, seconds=2.0, worker=worker)


def whole_work(
    root: Path, model: Model, bits: tuple[float, ...], workers: int = 1, tensors: bool = False, **identity: Any
) -> Path:
    """A finished job."""
    store = open_store(str(root))
    write_job(store, model, bits, **identity)
    profiles = write_measurement(store, model)
    for b in bits:
        write_chain(store, model, profiles, b, tensors=tensors)
    write_events(store, model, bits, workers)
    return root


def html_of(root: Path) -> str:
    """The report of a work directory."""
    return render(read_facts(str(root)))[0]


def evaluation(bits: tuple[float, ...], gigabytes: float = 1.0) -> dict[str, Any]:
    """What ``exl2ray eval --json`` prints for one directory per bitrate."""

    def figure(value: float) -> dict[str, float]:
        return {"value": value, "standard_error": abs(value) / 100}

    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.2 * value}

    return {
        "results": [
            {
                "model": f"/out/imitation-{b:g}bpw", "reference": "/models/source", "rows": 8, "length": 512,
                "predictions": 4088, "perplexity": figure(5.2 + 4 / b**2), "reference_perplexity": figure(5.2),
                "nll_increase": {"value": 0.1, "standard_error": 0.002},
                "kl": figure(2.0 ** (-b) / 2),
                "top1_agreement": figure(1 - 0.3 / b), "top5_agreement": figure(0.99), "linears_bpw": b, "head_bpw": 6.03,
                "file_bpw": b + 0.4, "file_bytes": int(gigabytes * 1e9 * b), "warnings": [],
                "kl_tail": {n: interval(2.0 ** (-b) * f) for n, f in (("p95", 2), ("p99", 5), ("p99.9", 12), ("max", 20))},
                "kinds": {
                    kind: {
                        "predictions": 1022, "perplexity": figure(6.0), "kl": figure(2.0 ** -b),
                        "top1_agreement": figure(0.9),
                    }
                    for kind in ("code", "stories", "letters and law")
                },
            }
            for b in bits
        ]
    }  # fmt: skip
