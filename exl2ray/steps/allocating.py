"""From a measurement to what each linear of a bitrate is quantised with, and the identity of the result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from exl2ray.allocation.overrides import parse_overrides
from exl2ray.allocation.planning import Plan, choose, decoder_bpw, head_bpw, insensitive, packed_bytes
from exl2ray.formats.layout import QParams
from exl2ray.formats.measurement import Measurement
from exl2ray.model.spec import ModuleSpec
from exl2ray.result_warnings import few_scores_warning, insensitive_warning, unspent_warning
from exl2ray.store.file_names import quant_kind
from exl2ray.store.records import hash_inputs

if TYPE_CHECKING:
    from exl2ray.steps.job import Job


def allocate(job: Job, measurement: Measurement, bits: float) -> Plan:
    """Option of every linear at one bitrate."""
    overrides = parse_overrides(job.recipe.overrides, job.spec)
    chosen = choose(job.spec, measurement, bits, job.recipe, overrides)
    allocation, params = chosen.allocation, chosen.params
    hashes = plan_hashes(job, params)
    head, achieved = job.spec.modules[-1].linears[0], decoder_bpw(job.spec, params)
    job.work.event(
        "allocated", bits=bits, bpw=achieved, gap=allocation.gap, choice=list(allocation.choice),
        allocation=job.recipe.allocates, head=params[head.key].desc, predicted_kl=chosen.predicted_kl,
    )  # fmt: skip
    of_head = head_bpw(job.spec, params)
    message = f"{bits:g} bpw: allocation uses {achieved:.4f} bits per weight in the decoder, {of_head:.4f} in the head"
    message += f", within {max(0.0, allocation.gap) * 100:.4f} % of the optimum"
    if chosen.predicted_kl is not None:
        message += f"; predicted KL {chosen.predicted_kl:.4g}"
    job.reporter.event("note", message=message)
    if job.recipe.allocates == "linear":
        job.warnings.add(insensitive_warning(*insensitive(chosen.groups)), bits)
    else:
        job.warnings.add(few_scores_warning(measurement.scores))  # of every bitrate; told at the start where it was known
    job.warnings.add(unspent_warning(bits, achieved, allocation.unspent, bool(overrides)), bits)
    return Plan(bits, params, hashes, achieved, packed_bytes(job.spec, params), chosen.predicted_kl)


def plan_hashes(job: Job, params: Mapping[str, QParams]) -> tuple[str, ...]:
    """Per module the hash of all that its quantised form depends on: a chain, since states come from before."""
    settings = job.job["quantize"]
    value = hash_inputs(
        **job.source_hash(), damping=job.recipe.damping, rows=job.calibration_sha256, propagate=settings["propagate"],
        **job.all_experts(), **job.beyond_reference(),
    )  # fmt: skip
    out = []
    for module in job.spec.modules:
        chosen = {x.key: params[x.key].desc for x in module.linears}
        value = hash_inputs(before=value, module=module.profile_key, options=chosen)
        out.append(value)
    return tuple(out)


def missing(job: Job, plan: Plan) -> list[ModuleSpec]:
    """Modules with linears that have no record with the options of a plan, in order."""
    kind = quant_kind(plan.bits)
    modules = [m for m in job.spec.modules if m.linears]
    return [m for m in modules if job.work.records.find(kind, m.profile_key, plan.hashes[m.index]) is None]
