"""Measuring: a loop over modules of the source model, each of which is scored and committed."""

from __future__ import annotations

import time
from collections.abc import Iterator

from exl2ray.formats.measurement import ModuleProfile
from exl2ray.quant.module import measure_module
from exl2ray.store.layout import MEASURE
from exl2ray.store.records import Record
from exl2ray.team.member import Member
from exl2ray.team.messages import Begun, ItemResult, MeasurePass, Ready


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
