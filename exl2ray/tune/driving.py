"""A tuning's pass as its driver sees it: workers go through it (`exl2ray.tune.worker`), what they tell is shown."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from exl2ray.driver.actors import open_workers
from exl2ray.driver.independent import Item
from exl2ray.driver.policy import Limits
from exl2ray.driver.sequential import Sequential
from exl2ray.driver.supervise import Supervisor
from exl2ray.driver.workers import Workers
from exl2ray.events import Reporter
from exl2ray.store.fs import Store
from exl2ray.store.nonce import write_nonce
from exl2ray.store.tensors import put_tensors
from exl2ray.store.versions import versions
from exl2ray.team.messages import Choices, ItemResult, WorkerSetup
from exl2ray.tune.inputs import Inputs
from exl2ray.tune.messages import BITS, WAIT, TunePass, ends_of
from exl2ray.tune.rows import TuningRows
from exl2ray.tune.settings import Settings, Where
from exl2ray.tune.sums import SHARES
from exl2ray.tune.worker import TuningWorker

ROWS = "rows.safetensors"
STAGE = "tune"


def trained(
    settings: Settings, rows: TuningRows, identity: str, store: Store, device: torch.device, where: Where, reporter: Reporter,
    inputs: Inputs,
) -> ItemResult:  # fmt: skip
    """Has workers do all steps; what is decided in the end (`exl2ray.tune.worker`)."""
    steps = settings.steps(len(rows.ids))
    names = [f"step {end}" for end in ends_of(steps)] + ["decision"]
    file = put_tensors(store, ROWS, {"ids": rows.ids, "held": rows.held_ids})
    rel, token = write_nonce(store, versions())
    threads = torch.get_num_threads()  # sums depend on it, so it does not depend on the number of workers
    setup = WorkerSetup(
        settings.directory, store.root, str(device), None, None, 0.0, settings.checkpoint_seconds, ROWS, file.sha256, 0,
        threads=threads, nonce=(rel, token), versions=versions(),
    )  # fmt: skip
    directory, reference = _absolute(settings.directory), _absolute(settings.reference)  # workers may run elsewhere
    plain = replace(settings, sources=(), directory=directory, reference=reference)

    def part(choices: Choices, pieces: tuple[int, ...]) -> TunePass:
        return TunePass(
            settings=plain, identity=identity, held_kinds=rows.held_kinds, steps=steps, pieces=pieces, inputs=inputs.begun()
        )

    told = _Told(reporter, len(names) - 1, inputs)
    with _workers(setup, where) as workers:
        items = [Item(k, name, 1.0) for k, name in enumerate(names)]
        work = Sequential([(Choices(BITS, {}, ()), items)], workers, Limits(), told.result, make=part, largest=SHARES)
        Supervisor(workers, Limits(), told.event).run(work)
    store.delete(rel)
    told.end()
    assert told.decision is not None
    return told.decision


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


@contextmanager
def _workers(setup: WorkerSetup, where: Where) -> Iterator[Workers]:
    workers = open_workers(setup, TuningWorker, where.executor, where.workers, where.address)
    try:
        yield workers
    finally:
        workers.close()


class _Told:
    """What workers tell, for whoever watches."""

    def __init__(self, reporter: Reporter, pieces: int, inputs: Inputs) -> None:
        self._reporter, self._pieces, self._inputs, self._done = reporter, pieces, inputs, 0
        self._waits = ""
        self._begin = 0.0  # of the steps: models that are refused when they are loaded have none
        self.decision: ItemResult | None = None

    def result(self, result: ItemResult) -> None:
        self._inputs.settle()
        if result.index == self._pieces:
            self.decision = result
        elif result.detail:
            self._done = result.index + 1
            self._reporter.event(
                "item", stage=STAGE, key=result.key, done=self._done, items=self._pieces, seconds=result.seconds,
                detail=result.detail,
            )  # fmt: skip
        elif not self._begin:
            self._done = result.index + 1  # trained by an earlier run
        for note in result.notes:
            self._reporter.event("note", message=note)

    def event(self, name: str, **fields: Any) -> None:
        """Of the supervisor."""
        if name == "started" and fields["method"] == "steps" and not self._begin:
            self._begin = time.monotonic()
            self._reporter.event("stage", stage=STAGE, items=self._pieces, done=self._done)
        elif name == "started" and fields["method"] == WAIT:
            if fields["key"] != self._waits:  # each member of a group says it, and again and again
                self._reporter.event("warning", message=fields["key"])
            self._waits = fields["key"]
        elif name == "lost":
            message = f"a worker was lost at {fields['key']} ({fields['reason']}); going on from the last checkpoint"
            self._reporter.event("warning", message=message)
        elif name == "retry":
            self._reporter.event("warning", message=f"{fields['key']}: {fields['reason']}")
        elif name == "note":
            self._reporter.event("note", message=fields["message"])

    def end(self) -> None:
        if self._begin:
            self._reporter.event("end", stage=STAGE, seconds=time.monotonic() - self._begin)
