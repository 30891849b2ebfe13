"""Measuring all modules of a job, and the sensitivities of their linears; what is in the work directory is kept."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from exl2ray.allocation.planning import has_sensitivities, module_cost
from exl2ray.beneath import make_directories
from exl2ray.driver.independent import PASSING, Independent, Item
from exl2ray.errors import UnfitError
from exl2ray.formats.measurement import Measurement, ModuleProfile, write_measurement
from exl2ray.formats.origin import rope_flags, source_identity
from exl2ray.job_opening import measurement_target, scores_entry
from exl2ray.model.spec import ModuleSpec
from exl2ray.result_warnings import measured_experts
from exl2ray.steps.job import Stage
from exl2ray.store.faults import translated
from exl2ray.store.file_names import MEASURE, MEASUREMENT
from exl2ray.store.records import hash_inputs, reading
from exl2ray.store.workdir import WorkDir
from exl2ray.team.messages import Begun, ItemResult, MeasurePass, SensitivityPass, hand_key
from exl2ray.team.sensitivity import PROBES, deal, sensitivities, sensitivity_key, share_rows_out

if TYPE_CHECKING:
    from exl2ray.steps.job import Job

PROFILE = 3  # what a measured module's record holds; earlier ones, without losses, are not used


def measure(job: Job) -> Measurement:
    """Profiles of all modules, measured or (with -m) read from a file."""
    if job.measurement_given is not None:
        return job.measurement_given
    modules = _profiled(job)
    common = hash_inputs(
        **job.source_hash(), damping=job.job["measure"]["damping"], rows=job.measure_rows_sha256, profile=PROFILE,
        **job.all_experts(), **job.scored(),
    )  # fmt: skip
    hashes = {m.index: hash_inputs(common=common, module=m.profile_key) for m in modules}
    records = {m.index: job.work.records.find(MEASURE, m.profile_key, hashes[m.index]) for m in modules}
    profiles: dict[int, ModuleProfile] = {}
    for m in modules:
        record = records[m.index]
        if record is not None:
            with reading(job.work.store, record) as payload:
                profiles[m.index] = _profile(m, payload)
    todo = [m for m in modules if m.index not in profiles]
    if todo:
        _measure_modules(job, todo, hashes, profiles)
    measurement = with_sensitivities(job, _assembled(job, profiles))
    write_measurement_to(job.work, measurement)
    job.warnings.add(measured_experts(measurement), tell=False)  # each module has
    return measurement


def _profiled(job: Job) -> list[ModuleSpec]:
    """Modules that the measurement goes through; the head only where its bits may be chosen."""
    measured = [m for m in job.spec.modules if m.quantized]
    return measured + ([job.spec.modules[-1]] if job.recipe.allocates == "linear" else [])


def _measure_modules(
    job: Job, todo: list[ModuleSpec], hashes: Mapping[int, str], profiles: dict[int, ModuleProfile]
) -> None:
    """Measures the modules ``todo``; ``profiles`` gets what was found."""
    workers = job.workers  # their start is no part of the stage
    another = job.recipe.allocates == "linear" or _quantises(job)
    with Stage(job, "measure", len(hashes), len(profiles)) as progress:

        def told(result: ItemResult) -> None:
            profiles[result.index] = _profile(job.spec.modules[result.index], result.payload)
            progress(result)

        def call(indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> MeasurePass:
            own = {i: hashes[i] for i in indices}
            return MeasurePass(modules=indices, hashes=own, stretches=stretches, keep_from=keep_from, another=another)

        def look_up(begun: Begun) -> ItemResult | None:
            found = job.work.records.find(MEASURE, begun.key, hashes[begun.index]) if begun.index in hashes else None
            return job.found(found, begun)

        items = [Item(m.index, m.profile_key, module_cost(m)) for m in todo]
        work = Independent(items, call, workers, told, look_up, PASSING["measure"], together=True)
        job.supervisor.run(work)


def with_sensitivities(job: Job, measurement: Measurement) -> Measurement:
    """The measurement with the sensitivities of all linears, measured where they are missing and needed."""
    if job.recipe.allocates != "linear" or has_sensitivities(job.spec, measurement):
        return measurement
    rows = job.rows["measure"]
    shares, tokens = share_rows_out(rows.kinds, rows.ids.shape[1])
    probes = [PROBES, [list(rows) for rows in shares.values()], tokens]
    inputs_hash = hash_inputs(**job.source_hash(), rows=job.measure_rows_sha256, probes=probes)
    sums = _stored_sums(job, shares, inputs_hash)
    todo = {n: rows for n, rows in shares.items() if n not in sums}
    if todo:
        _run_backward(job, todo, tokens, inputs_hash, sums)
    found = sensitivities(job.spec, sums, tokens * sum(len(rows) for rows in shares.values()))
    profiles = []
    for p in measurement.profiles:
        more = {"sensitivity": found[p.entry_key]} if p.entry_key in found else {}
        profiles.append(replace(p, extra={**p.extra, **more}))
    return replace(measurement, profiles=tuple(profiles))


def _stored_sums(job: Job, shares: Mapping[int, tuple[int, ...]], inputs_hash: str) -> dict[int, Any]:
    """What shares of the backward pass that are finished have found."""
    records = {n: job.work.records.find(MEASURE, sensitivity_key(n), inputs_hash) for n in shares}
    found = {}
    for n, record in records.items():
        if record is not None:
            with reading(job.work.store, record) as payload:
                found[n] = _sums(payload["sums"])
    return found


def _sums(stored: Any) -> Any:
    """What a share found, module by module and role by role; raises what is not two finite numbers."""
    for key, roles in stored.items():
        for role, (first, second) in roles.items():
            if not (math.isfinite(first) and math.isfinite(second)):
                raise UnfitError(f"{key}, {role}: {first}, {second}")
    return stored


def _run_backward(
    job: Job, todo: Mapping[int, tuple[int, ...]], tokens: int, inputs_hash: str, sums: dict[int, Any]
) -> None:
    """Runs the shares ``todo`` of the backward pass; ``sums`` gets their results."""
    workers = job.workers
    # On a GPU every worker reads the model once; on a CPU reading costs little beside a share, which takes long.
    hands = dict(enumerate(deal(todo, workers.size if job.device.type == "cuda" else len(todo))))
    cost = sum(module_cost(m) for m in job.spec.modules)
    with Stage(job, "sensitivity", len(hands), 0) as progress:

        def told(result: ItemResult) -> None:
            sums.update(result.payload["sums"])
            progress(result)

        def call(indices: tuple[int, ...], stretches: tuple[tuple[int, ...], ...], keep_from: int) -> SensitivityPass:
            own = {i: hands[i] for i in indices}
            return SensitivityPass(hands=own, tokens=tokens, inputs_hash=inputs_hash, another=_quantises(job))

        def look_up(begun: Begun) -> ItemResult | None:
            hand = hands.get(begun.index, {})
            found = _stored_sums(job, hand, inputs_hash)
            if not hand or len(found) < len(hand):
                return None
            record = job.work.records.find(MEASURE, sensitivity_key(next(iter(hand))), inputs_hash)
            result = job.found(record, begun, hand_key(hand))
            return None if result is None else replace(result, payload={"sums": found})

        items = [Item(i, hand_key(hand), cost * len(hand)) for i, hand in hands.items()]
        job.supervisor.run(Independent(items, call, workers, told, look_up))


def _quantises(job: Job) -> bool:
    return job.recipe.output_measurement is None


def _assembled(job: Job, profiles: Mapping[int, ModuleProfile]) -> Measurement:
    out = []
    for module in job.spec.modules:
        key, mode = module.profile_key.rsplit(".", 1)
        if module.quantized:
            out.append(profiles[module.index])
        elif mode in ("norm", "linear", "pos_emb"):
            out.append(profiles.get(module.index, ModuleProfile(key, mode)))
    rotation = job.spec.rotation_entry.get("rotation")
    scores = scores_entry(job.score_rows, job.rows["measure"])
    rope = rope_flags(job.recipe.rope_scale, job.recipe.rope_alpha)
    return Measurement(tuple(out), len(job.spec.modules) - 1, rotation, source_identity(job.source, rope), scores)


def _profile(module: ModuleSpec, payload: Mapping[str, Any]) -> ModuleProfile:
    value = payload["profile"]
    profile = ModuleProfile.from_json(module.profile_key, value["value"], value["extra"])
    found, wanted = {role for options in profile.slots() for role in options[0].params}, {x.role for x in module.linears}
    if module.quantized and found != wanted:  # the head has its options in ``extra``
        raise UnfitError(f"it has the linears {', '.join(sorted(found))}, the module {', '.join(sorted(wanted))}")
    return profile


def write_measurement_to(work: WorkDir, measurement: Measurement) -> None:
    """measurement.json in the work directory, if it is not there with this content."""
    data = measurement.to_bytes()
    if not work.store.exists(MEASUREMENT) or work.store.get(MEASUREMENT) != data:
        work.store.put(MEASUREMENT, data)


def export_measurement(job: Job, measurement: Measurement) -> str:
    """Writes measurement.json where -om asks for it: a file, or a directory to put it into."""
    job.source_state.check()
    path = measurement_target(job.recipe.output_measurement or "")
    with translated("create", str(path.parent)):
        make_directories(path.parent)
    write_measurement(path, measurement)
    job.reporter.event("note", message=f"measurement written to {path}")
    return str(path)
