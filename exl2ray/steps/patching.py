"""What ``exl2ray patch`` does to a plan, and what is remembered of it.

Which texts of --set a finished model was patched with is a record of its bitrate, one for each directory that models were
written to. So patches add up, `convert` leaves a patched model as it is, and --undo goes back to what was converted.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.allocation.overrides import Override, overridden, parse_overrides
from exl2ray.allocation.planning import Plan, decoder_bpw, packed_bytes
from exl2ray.errors import UsageError
from exl2ray.output.writing import target_of
from exl2ray.steps.allocating import missing
from exl2ray.store.file_names import PATCHES, quant_kind
from exl2ray.store.records import Record, Records, hash_inputs
from exl2ray.store.workdir import WorkDir

if TYPE_CHECKING:
    from exl2ray.steps.job import Job

MAX_CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class Wanted:
    """What a patch asks for: texts of --set. undo: on top of what was converted, without earlier patches."""

    overrides: tuple[str, ...]
    undo: bool = False

    def of(self, job: Job, plan: Plan, target: Path) -> Plan:
        """``plan`` as it is to be written to ``target``: on top of earlier patches of the model there, and where there is
        none, of the conversion's own model. Raises UsageError for an unfinished model.
        """
        earlier = remembered(job.work, plan.bits, target)
        if earlier is None:
            bare = job.recipe.compile_full is None and not job.work.store.is_local
            earlier = () if bare else remembered(job.work, plan.bits, target_of(job.recipe, job.work, plan.bits)) or ()
        kept = () if self.undo else tuple(t for t in earlier if t not in self.overrides)
        if self.undo and earlier:
            _say(job, plan, f"without what earlier patches set: {_flags(earlier)}")
        elif kept:
            _say(job, plan, f"earlier patches stay: {_flags(kept)}; --undo drops them")
        return patched(job, plan, (*kept, *self.overrides))


def kept(job: Job, plan: Plan, target: Path) -> Plan:
    """``plan`` of a conversion as it is to be written to ``target``: with what the model there was patched with."""
    texts, work = remembered(job.work, plan.bits, target), shlex.quote(job.recipe.out_dir)
    if not texts:
        if not (target / "config.json").is_file():
            for directory, other in patches_of(job.work.records, plan.bits):
                if not os.path.isdir(directory):
                    continue
                _say(job, plan, f"{directory} was patched ({_flags(other)}); {target} is written without that")
        return plan
    if missing(job, plan):
        again = f"exl2ray patch -o {work} {_flags(texts)}"
        message = f"{plan.bits:g} bpw: {target} was patched ({_flags(texts)}); with what is new now it is made without that"
        job.reporter.event("warning", message=f"{message}; then patch it again: {again}")
        return plan
    _say(job, plan, f"{target} was patched and stays so: {_flags(texts)}; back with: exl2ray patch -o {work} --undo")
    return patched(job, plan, texts)


def patched(job: Job, plan: Plan, texts: Sequence[str]) -> Plan:
    """``plan`` with ``texts`` of --set on top, and nothing else changed: no other linear pays for them.

    Modules with another option get hashes of their own, so that only they are quantised again, on what the model
    produces as it is; the head too, for the perplexity that comes with it. Raises UsageError for an unfinished model.
    """
    unfinished = missing(job, plan)
    if unfinished:
        raise UsageError(
            f"{plan.bits:g} bpw: {len(unfinished)} modules are not quantised yet, {unfinished[0].profile_key} first",
            f"finish the conversion before patching it: exl2ray convert -o {job.recipe.out_dir}",
        )
    overrides: tuple[Override, ...] = parse_overrides(texts, job.spec)
    params = {x.key: overridden(overrides, x, plan.params[x.key]) for x in job.spec.linears}
    if params == plan.params:
        if texts:
            _say(job, plan, "every linear is as --set asks already")
        return replace(plan, patches=tuple(texts))
    hashes, before = [], ""
    for module in job.spec.modules:
        chosen = {x.key: params[x.key].desc for x in module.linears}
        value = plan.hashes[module.index]
        changed = [x.key for x in module.linears if params[x.key] != plan.params[x.key]]
        if changed or (module.kind == "head" and before):
            before = value = hash_inputs(patched=value, before=before, options=chosen)
            for key in changed:
                _say(job, plan, f"{key} from {plan.params[key].desc} to {params[key].desc}")
        hashes.append(value)
    achieved, size = decoder_bpw(job.spec, params), packed_bytes(job.spec, params)
    return Plan(plan.bits, params, tuple(hashes), achieved, size, patches=tuple(texts))


# ---- what is remembered -----------------------------------------------------------------------------------------------


def remembered(work: WorkDir, bits: float, target: Path) -> tuple[str, ...] | None:
    """Texts of --set that the model in ``target`` was patched with, () if undone; None where no patch was written."""
    record = work.records.find(quant_kind(bits), PATCHES, _place(work, target))
    return None if record is None else _texts(record)


def remember(work: WorkDir, plan: Plan, target: Path) -> None:
    """Once a model is written: what it was patched with."""
    if plan.patches != (remembered(work, plan.bits, target) or ()):
        payload = {"directory": str(target), "overrides": list(plan.patches)}
        work.records.commit(Record(quant_kind(plan.bits), PATCHES, _place(work, target), payload))


def _texts(record: Record) -> tuple[str, ...]:
    found = record.payload.get("overrides")
    return tuple(t for t in found if isinstance(t, str)) if isinstance(found, list) else ()


def patches_of(records: Records, bits: float) -> list[tuple[str, tuple[str, ...]]]:
    """Directories with models of this bitrate that were patched, and with what."""
    found = records.scan(quant_kind(bits), f"{PATCHES}.").values()
    return sorted((str(r.payload.get("directory")), texts) for r in found if (texts := _texts(r)))


def warn_of_lost(job: Job, plan: Plan, target: Path) -> None:
    """Where the model in ``target`` has a --set that the one in its place will not have, and no patch of this work directory
    put it there: another conversion did, or an earlier version of exl2ray, which did not remember.
    """
    ours = (*job.recipe.overrides, *plan.patches, *(remembered(job.work, plan.bits, target) or ()))
    lost = tuple(text for text in _written(target) if text not in ours)
    if lost:
        message = f"{plan.bits:g} bpw: the model in {target}, made with {_flags(lost)}, is replaced by one without"
        job.reporter.event("warning", message=message)


def _written(target: Path) -> tuple[str, ...]:
    """Texts of --set that config.json of a finished model has."""
    try:
        with open(target / "config.json", "rb") as f:
            found = json.loads(f.read(MAX_CONFIG_BYTES))["quantization_config"]["overrides"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ()
    return tuple(t for t in found if isinstance(t, str)) if isinstance(found, list) else ()


def _place(work: WorkDir, target: Path) -> str:
    """Hash of the directory, which may move together with the work directory that it is in."""
    real, root = os.path.realpath(target), work.store.root
    if "://" not in root and Path(real).is_relative_to(os.path.realpath(root)):
        real = os.path.relpath(real, os.path.realpath(root))
    return hash_inputs(place=real)


def _flags(texts: Sequence[str]) -> str:
    return " ".join(f"--set {shlex.quote(text)}" for text in texts)


def _say(job: Job, plan: Plan, text: str) -> None:
    job.reporter.event("note", message=f"{plan.bits:g} bpw: {text}")
