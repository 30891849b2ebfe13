"""Passes over modules of the source model, each of which is done and committed by itself: measuring, and quantising for every
bitrate that lacks it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from exl2ray.formats.measurement import ModuleProfile
from exl2ray.model.blocks import check_states
from exl2ray.quant.entering import Entered
from exl2ray.quant.module import cut, measure_module, quantize_module
from exl2ray.store.file_names import MEASURE, quant_kind
from exl2ray.store.records import Record
from exl2ray.team.member import Member
from exl2ray.team.messages import Begun, Choices, ItemResult, MeasurePass, Ready, ReferencePass
from exl2ray.team.packed_files import PackedFiles
from exl2ray.team.runner import Runner, option_names, perplexity_of, perplexity_sums


def measure(worker: Member, part: MeasurePass) -> Iterator[Begun | Ready | ItemResult]:
    """Profiles of the modules of a pass, committed one by one: accuracy and cost of every option."""
    states = yield from worker.source_states("measure", part)
    for index in worker.until_taken(part.modules):
        key = worker.runner.spec.modules[index].profile_key
        yield worker.begin(Begun("measure", index, key, passed=states.way(index)))
        entered = states.enter(index, part.keep_from)
        begin = time.monotonic()
        notes: list[str] = []
        profile = measure_module(entered, notes.append)
        record = measure_record(profile, part.hashes[index], notes, time.monotonic() - begin)
        del entered
        worker.runner.records.commit(record)
        yield worker.result(index, key, begin, describe(profile), record.payload, notes=tuple(notes))


def measure_record(profile: ModuleProfile, inputs_hash: str, notes: list[str], seconds: float) -> Record:
    """The record of a measured module; its key is that of the module in measurement.json."""
    payload = {"profile": {"value": profile.to_json(), "extra": dict(profile.extra)}, "notes": notes}
    return Record(MEASURE, profile.entry_key, inputs_hash, payload, (), seconds)


def describe(profile: ModuleProfile) -> str:
    """Range of accuracies, for the progress display."""
    accuracies = [o.accuracy for options in profile.slots() for o in options]
    return f"accuracy {min(accuracies):.4f} .. {max(accuracies):.4f}" if accuracies else "head"


def quantize_on_source_states(worker: Member, part: ReferencePass) -> Iterator[Begun | Ready | ItemResult]:
    """Packed tensors and records of the modules of a pass, committed one by one."""
    states = yield from worker.source_states("quantize", part)
    for index in worker.until_taken(part.modules):
        key = worker.runner.spec.modules[index].profile_key
        entered: Entered | None = None
        for choices in (c for c in part.choices if c.bits in part.wanted[index]):
            yield worker.begin(Begun("quantize", index, key, choices.bits, 0 if entered else states.way(index)))
            entered = entered or states.enter(index, part.keep_from)
            begin = time.monotonic()
            source = dict(entered.block.weights)  # the next bitrate starts from them again
            record = _quantize(worker.runner, entered, index, choices, begin)
            for name, weight in source.items():
                entered.block.set_weight(name, weight)
            worker.runner.records.commit(record)
            detail = f"error {record.payload['error']:.5f}" if "error" in record.payload else "head"
            notes = tuple(record.payload["notes"])
            yield worker.result(index, key, begin, detail, record.payload, bits=choices.bits, notes=notes)


def _quantize(run: Runner, entered: Entered, index: int, choices: Choices, begin: float) -> Record:
    """Quantises an entered module, the head included, and writes its tensors; the record to be committed."""
    block, module = entered.block, entered.block.module
    kind, inputs_hash = quant_kind(choices.bits), choices.hashes[index]
    payload: dict[str, Any] = {"options": option_names({x.key: choices.params[x.key] for x in module.linears})}
    if entered.y is None:
        ids = run.rows("quantize")[: run.setup.perplexity_rows]
        payload["reference_perplexity"] = perplexity_of([perplexity_sums(block, entered.x[: len(ids)], ids)])
    files, x = PackedFiles(run.writers, kind, module.profile_key, inputs_hash), cut(entered.x)
    result = quantize_module(
        block, x, {}, len(entered.x), choices.params, entered.settings, check_states, files, entered=entered
    )
    payload["notes"] = result.notes
    if result.error is not None:
        payload["error"] = result.error
    if result.experts:
        payload["experts"] = result.experts
    refs = tuple(written.result() for written in files.flush().values())
    return Record(kind, module.profile_key, inputs_hash, payload, refs, time.monotonic() - begin)
