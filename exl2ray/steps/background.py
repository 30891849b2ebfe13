"""The outputs of a job, made in the background: modules are put into shards as they are finished, whole bitrates written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from types import TracebackType
from typing import TYPE_CHECKING, Any

from exl2ray.allocation.planning import Plan
from exl2ray.calibration.soundness import baseline
from exl2ray.datasets import reported_rows
from exl2ray.events import OutputSummary
from exl2ray.output.writing import OutputWriter
from exl2ray.recipe import bpw_name
from exl2ray.store.records import Record

if TYPE_CHECKING:
    from exl2ray.steps.job import Job

THREADS = 3  # several, since one hashes no faster than 1 to 2 GB/s
_OTHERS = -1  # in place of the index of a module: what is not quantised


class Outputs:
    """Told of what is quantised, it writes. One whose files are there already is left alone.

    A context manager. After an error what waits is dropped. The shards are closed once none of the threads writes any more.
    A second Ctrl-C ends the wait for them, and shards stay open: a descriptor that is closed is given to the next file, and
    they would write into that.
    """

    def __init__(self, job: Job, writer: OutputWriter, plans: Sequence[Plan]) -> None:
        self._job, self._writer = job, writer
        self._threads = ThreadPoolExecutor(THREADS, "write")
        self._placing: dict[float, dict[int, Future[None]]] = {plan.bits: {} for plan in plans}  # by module
        self._writing: dict[float, Future[OutputSummary]] = {}
        self._told: set[float] = set()  # bitrates of which the end is told
        self._begun: dict[float, float] = {}  # time.monotonic()
        self._seconds: dict[float, float] = {}  # that writing took
        self._there: dict[float, OutputSummary] = {}

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=kind is not None)
        self._writer.filling.close()

    def begin(self, plan: Plan) -> None:
        """Before work for a bitrate that lacks something."""
        self._writer.filling.begin(plan, self._writer.target(plan))

    def finished(self, plan: Plan, index: int) -> None:
        """A module has a record. One that was given to two workers may be finished twice."""
        own, filling = self._placing[plan.bits], self._writer.filling
        if not own:
            own[_OTHERS] = self._threads.submit(filling.place_others, plan)
        if index not in own:
            own[index] = self._threads.submit(filling.place, plan, index)

    def complete(self, plan: Plan) -> None:
        """All modules of a bitrate have records."""
        job, records = self._job, self._writer.records(plan)
        _examine_records(job, plan, records)
        found = self._writer.finished(plan, records)
        if found is None:
            job.reporter.event("stage", stage=_stage(plan.bits), items=1, done=0)
            self._begun[plan.bits] = time.monotonic()
            self._writing[plan.bits] = self._threads.submit(self._write, plan, records)
        else:
            self._there[plan.bits] = found
            where = found.directory or job.work.store.root
            job.reporter.event("note", message=f"{plan.bits:g} bpw: {where} has the model already")

    def _write(self, plan: Plan, records: Mapping[int, Record]) -> OutputSummary:
        for future in self._placing[plan.bits].values():  # begun before this, and none of them waits for another
            future.result()
        summary = self._writer.write(plan, records)
        self._seconds[plan.bits] = time.monotonic() - self._begun[plan.bits]
        return summary

    def look(self) -> None:
        """Raises what went wrong in the background, as soon as it is known, and tells of what is complete."""
        futures: list[Future[Any]] = [*self._writing.values()]
        futures += chain.from_iterable(own.values() for own in self._placing.values())
        for future in futures:
            if future.done():
                future.result()
        for bits in list(self._seconds):
            self._tell(bits)

    def _tell(self, bits: float) -> None:
        if bits not in self._told:
            self._told.add(bits)
            self._job.reporter.event("end", stage=_stage(bits), seconds=self._seconds[bits])

    def written(self, plan: Plan) -> OutputSummary:
        """What became of a complete bitrate. Waits for it."""
        if plan.bits in self._there:
            return self._there[plan.bits]
        summary = self._writing[plan.bits].result()
        self._tell(plan.bits)
        return summary


def _stage(bits: float) -> str:
    return f"compile {bpw_name(bits)}"


def _examine_records(job: Job, plan: Plan, records: Mapping[int, Record]) -> None:
    """What the records of a finished bitrate say against it; for its card, so before that is written."""
    head, rows = job.spec.modules[-1], job.rows["quantize"].ids
    known = baseline(rows, reported_rows(job.recipe), head.linears[0].out_features)
    job.warnings.add_records(plan.bits, records, head.index, known)
