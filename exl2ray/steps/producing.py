"""Quantising and writing all bitrates of a job; a bitrate is written while others go on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2ray.allocation.planning import Plan
from exl2ray.calibration.soundness import baseline
from exl2ray.datasets import reported_rows
from exl2ray.errors import NumericError
from exl2ray.outputs import OutputSummary
from exl2ray.recipe import bpw_name
from exl2ray.result_warnings import is_broken, show
from exl2ray.steps.quantizing import quantize
from exl2ray.store.records import Record
from exl2ray.writing import OutputWriter

if TYPE_CHECKING:
    from exl2ray.steps.job import Job


WRITERS = 3


def produce(
    job: Job, plans: Sequence[Plan], patches: Sequence[str] = (), compile_full: str | None = None
) -> list[OutputSummary]:
    """Quantises and writes all bitrates. A bitrate is written as soon as it is complete, while others go on; one whose
    files are there already is left alone.

    ``patches``: texts of --set that were applied to the plans, for config.json. ``compile_full``: in place of -cf.
    """
    chosen = (*job.recipe.overrides, *patches)
    recipe = job.recipe
    if compile_full is not None:
        recipe = replace(recipe, compile_full=compile_full, bits=tuple(p.bits for p in plans))
    fingerprint, rows = job.job["identity"]["fingerprint"], len(job.rows["quantize"].ids)
    writer = OutputWriter(
        recipe, job.spec, job.source, job.work, fingerprint, rows, chosen, job.warnings, job.tokenizer_files,
        job.targets,
    )  # fmt: skip
    for plan in plans:
        writer.check(plan)
    job.targets.lock(recipe, [p.bits for p in plans], writer.owner)
    placing: dict[float, dict[int, Future[None]]] = {plan.bits: {} for plan in plans}  # by module; at -1 the rest
    with closing(writer.filling) as filling, _Writers() as pool:
        writing: dict[float, Future[OutputSummary]] = {}
        kept: dict[float, OutputSummary] = {}

        def done(plan: Plan, index: int) -> None:
            own = placing[plan.bits]
            if not own:
                own[-1] = pool.submit(filling.place_others, plan)
            if index not in own:  # a module that was given to two workers may be finished twice
                own[index] = pool.submit(filling.place, plan, index)

        def write(plan: Plan, records: Mapping[int, Record]) -> OutputSummary:
            for future in placing[plan.bits].values():  # begun before this, and none of them waits for another
                future.result()
            return writer.write(plan, records)

        def complete(plan: Plan) -> None:
            records = writer.records(plan)
            _examine_records(job, plan, records)
            found = writer.finished(plan, records)
            if found is not None:
                kept[plan.bits] = found
                where = found.directory or job.work.store.root
                job.reporter.event("note", message=f"{plan.bits:g} bpw: {where} has the model already")
                return
            job.reporter.event("stage", stage=_compile_stage(plan), items=1, done=0)
            writing[plan.bits] = pool.submit(write, plan, records)

        def tick() -> None:
            futures: list[Future[Any]] = [*writing.values(), *chain.from_iterable(p.values() for p in placing.values())]
            for future in futures:
                if future.done():
                    future.result()  # raises what went wrong as soon as it is known

        quantize(job, plans, complete, tick, lambda plan: filling.begin(plan, writer.target(plan)), done)
        outputs = []
        for plan in plans:
            if plan.bits in writing:
                start = time.monotonic()
                outputs.append(writing[plan.bits].result())
                job.reporter.event("end", stage=_compile_stage(plan), seconds=time.monotonic() - start)
            else:
                outputs.append(kept[plan.bits])
            names = [Path(f).name for f in outputs[-1].files]
            job.work.event("written", bits=plan.bits, directory=outputs[-1].directory, files=names)
        job.source_state.check()
        job.warnings.add(job.source_state.warnings)
        return outputs


class _Writers(ThreadPoolExecutor):
    """Threads that write: several, since one hashes no faster than 1 to 2 GB/s. What waits is dropped after an error."""

    def __init__(self) -> None:
        super().__init__(WRITERS, "write")

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.shutdown(wait=True, cancel_futures=kind is not None)


def _examine_records(job: Job, plan: Plan, records: Mapping[int, Record]) -> None:
    """What the records of a finished bitrate say against it; for its card, so before that is written."""
    head, rows = job.spec.modules[-1], job.rows["quantize"].ids
    known = baseline(rows, reported_rows(job.recipe), head.linears[0].out_features)
    job.warnings.add_records(plan.bits, records, head.index, known)


def judge(outputs: list[OutputSummary]) -> None:
    """Refuses a model whose perplexity on calibration rows shows that something went wrong. Its files stay there."""
    for out in outputs:
        after, before = out.calibration_perplexity, out.reference_perplexity
        if is_broken(after, before):
            both = f"calibration perplexity {show(after)}, of the source model {show(before)}"
            raise NumericError(
                f"{out.bits:g} bpw: {both}: the quantised model is broken",
                f"the files are kept ({', '.join(out.files)}); check the source model and the calibration data",
            )


def _compile_stage(plan: Plan) -> str:
    return f"compile {bpw_name(plan.bits)}"
