"""Quantising on the states of the source model: a loop over modules, each done for every bitrate that lacks it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from exl2ray.formats.exl2 import PackedLinear
from exl2ray.model.blocks import check_states
from exl2ray.quant.block import by_input
from exl2ray.quant.quantize import quantize_after, quantize_head
from exl2ray.store.layout import quant_kind
from exl2ray.store.records import Record
from exl2ray.team.member import Member
from exl2ray.team.messages import Begun, Choices, ItemResult, Ready, ReferencePass
from exl2ray.team.packed_files import PackedFiles
from exl2ray.team.runner import Runner, option_names, perplexity_of, perplexity_sums
from exl2ray.team.source_states import Entered


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
            record = _quantize(worker.runner, entered, choices, begin)
            entered.block.weights.update(source)
            worker.runner.records.commit(record)
            detail = f"error {record.payload['error']:.5f}" if "error" in record.payload else "head"
            notes = tuple(record.payload["notes"])
            yield worker.result(index, key, begin, detail, record.payload, bits=choices.bits, notes=notes)


def _quantize(run: Runner, entered: Entered, choices: Choices, begin: float) -> Record:
    """Quantises an entered module, the head included, and writes its tensors; the record to be committed."""
    block, module = entered.block, entered.block.module
    kind, inputs_hash = quant_kind(choices.bits), choices.hashes[module.index]
    params = {x.key: choices.params[x.key] for x in module.linears}
    files = PackedFiles(run, kind, module.profile_key, inputs_hash)
    payload: dict[str, Any]
    if entered.y is None:
        linear, ids = module.linears[0], run.rows("quantize")[: run.setup.perplexity_rows]
        before = perplexity_of([perplexity_sums(block, entered.x[: len(ids)], ids)])
        packed, notes = quantize_head(block, entered.x, params[linear.key], entered.settings, keep=True)
        files.add({linear.key: packed})
        writing = list(files.close().values())
        payload = {"reference_perplexity": before, "notes": list(notes)}
    else:
        writing = []
        last = list(by_input(module.linears))[-1]

        def done(group: str, packed: dict[str, PackedLinear]) -> None:
            files.add(packed)
            if group == last:
                writing.extend(files.close().values())

        hessians = dict(entered.hessians)  # kept for the next bitrate
        result, _ = quantize_after(
            block, entered.x, entered.y, hessians, params, entered.settings, check_states, done
        )
        payload = {"error": result.error, "notes": list(result.notes)}
        if result.experts:
            payload["experts"] = [dict(e) for e in result.experts]
    payload["options"] = option_names(params)
    refs = tuple(w.result() for w in writing)
    return Record(kind, module.profile_key, inputs_hash, payload, refs, time.monotonic() - begin)
