"""A worker that tunes, alone or in a group: steps, evaluations, checkpoints, and the decision in the end.

All members of a group go through the same steps, each with its shares of the rows (`exl2ray.tune.sums`). `exl2ray.driver`
makes a Ray actor of it or calls it in this process; what comes of a pass is in the work directory before it is told.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Generator, Iterator

import torch

from exl2ray.quant.group import Comm
from exl2ray.store.open import open_store
from exl2ray.team.grouped import NOWHERE, Grouped
from exl2ray.team.messages import Begun, ItemResult, Meeting, Pass, Ready, WorkerSetup
from exl2ray.tune import state
from exl2ray.tune.deciding import decided
from exl2ray.tune.messages import BITS, WAIT, TunePass, ends_of
from exl2ray.tune.session import Ground, Session
from exl2ray.wording import nats

Says = Iterator[Begun | Ready | ItemResult]


class TuningWorker(Grouped):
    """setup: ``calibration`` names the rows in the work directory, "ids" and "held"."""

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(setup)
        if self.device.type == "cuda":  # products with one workspace, so that torch may be asked for what is reproducible
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.store = open_store(setup.work_root)
        self.check_place(self.store)

    def run(self, part: Pass) -> Says:
        """As `exl2ray.team.worker.Worker`. When it is to end before an index, it ends before its next step, saved."""
        assert isinstance(part, TunePass)
        self.set_threads()
        try:
            with torch.no_grad():
                yield from _Tuning(self, part).run()
        finally:
            self.end = NOWHERE

    def is_to_end(self, comm: Comm) -> bool:
        return bool(min(comm.gather(self.end)) < NOWHERE)

    def group(self, meeting: Meeting) -> Comm:
        if self._met != meeting:
            self.release()  # memory that torch holds back is none for the connections of a group
        return super().group(meeting)


class _Tuning:
    """One call of a worker. A pass that begins again goes on from the last checkpoint, whatever was told since."""

    def __init__(self, worker: TuningWorker, part: TunePass) -> None:
        self.worker, self.part = worker, part
        self.notes: list[str] = []

    def run(self) -> Says:
        last = self.part.pieces[-1]
        yield self._begun("join", self.part.pieces[0], "loading")
        begin = time.monotonic()
        self._open()
        yield Ready("join", time.monotonic() - begin)
        yield from self._train()
        if self.kept and last == len(ends_of(self.part.steps)):
            yield self._begun("decide", last, "decision")
            yield self._decision(last)

    def _open(self) -> None:
        worker, part = self.worker, self.part
        self.comm = worker.group(part.meeting)
        self.ground = Ground(part, worker.device, worker.store, worker.setup.calibration, self.comm)
        saved = state.restore(worker.store, self.comm, part.identity, self.notes)
        if saved is not None and saved.progress.step > part.steps:
            saved = None
        self.progress = state.Progress(part.identity) if saved is None else saved.progress
        self.kept = self.progress.over  # what the last step left is in the store
        self.session = None if self.kept else Session(self.ground, part, saved, self.progress, self.notes)

    def _train(self) -> Says:
        """The steps that are left, piece by piece. Then what was trained is in the store, and not in memory any more."""
        ends, last = ends_of(self.part.steps), self.part.pieces[-1]
        for piece in self.part.pieces:
            if piece == len(ends):
                break
            end, name = ends[piece], f"step {ends[piece]}"
            passed = self.progress.over or end <= self.progress.step  # by an earlier run
            yield self._begun("join" if passed else "steps", piece, name)
            begin, step = time.monotonic(), self.progress.step
            stopped = yield from self._steps(end, piece)
            if stopped:
                return
            detail = ""
            if self.session is not None and step < end <= self.progress.step:
                detail = f"KL {nats(self.session.divergence())}"
            yield ItemResult(piece, name, time.monotonic() - begin, detail, {}, BITS, self._told())
        if not self.progress.over:  # all was told, and not saved, when the worker was lost
            yield self._begun("join", last, "the last steps once more")
            stopped = yield from self._steps(self.part.steps, last)
            if stopped:
                return
        if self.session is not None:
            for words in self.session.end(lambda: self.worker.is_to_end(self.comm)):
                yield self._begun(WAIT, last, words)
            self.kept, self.session = self.session.is_kept, None
            gc.collect()  # a recorded step and what it steps through hold each other

    def _steps(self, end: int, piece: int) -> Generator[Begun | Ready, None, bool]:
        """Goes up to a step, if it is not the last one before; True if somebody asked for an end."""
        while self.session is not None and self.progress.step < end and not self.progress.over:
            if self.worker.is_to_end(self.comm):
                words = self.session.leave()
                if words:
                    yield self._begun(WAIT, piece, words)
                return True
            begin = time.monotonic()
            self.session.step()
            yield Ready("step", time.monotonic() - begin)  # so that somebody may ask for an end
        return False

    def _decision(self, piece: int) -> ItemResult:
        begin, ground = time.monotonic(), self.ground
        saved = state.restore(self.worker.store, self.comm, self.part.identity)
        assert saved is not None
        ground.inputs.check()
        payload = decided(ground.pair, saved, ground.evaluator(), self.part.held_kinds, ground.device, ground.shelf)
        detail = f"kept: {payload['words']}"
        return ItemResult(piece, "decision", time.monotonic() - begin, detail, payload, BITS, self._told())

    # ---- what is told ------------------------------------------------------------------------------------------

    def _begun(self, method: str, piece: int, key: str) -> Begun:
        return Begun(method, piece, key, BITS, together=self.part.meeting.size > 1)

    def _told(self) -> tuple[str, ...]:
        """Notes since the last time; all members of a group have the same, and the driver hears the first that comes."""
        notes = tuple(self.notes)
        self.notes.clear()
        return notes
