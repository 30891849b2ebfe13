"""A worker that tunes, alone or in a group: steps, evaluations, checkpoints, and the decision in the end.

All members of a group go through the same steps, each with its shares of the rows (`exl2ray.tune.sums`). `exl2ray.driver`
makes a Ray actor of it or calls it in this process; what comes of a pass is in the work directory before it is told.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.evaluate.forward import Ahead
from exl2ray.quant.group import Comm, Solo
from exl2ray.store.nonce import verify_nonce
from exl2ray.store.open import open_store
from exl2ray.store.tensors import get_tensors
from exl2ray.team.comm import Group
from exl2ray.team.messages import Begun, ItemResult, Meeting, Pass, Ready, WorkerSetup
from exl2ray.team.packed_files import HostCopies
from exl2ray.tune import inputs, judge, state
from exl2ray.tune.deciding import decided
from exl2ray.tune.evaluating import Evaluator
from exl2ray.tune.keeping import Keeper
from exl2ray.tune.memory import SNAPSHOT_BYTES, TRAINED_BYTES, room_for
from exl2ray.tune.module import TunedModule
from exl2ray.tune.opening import load_source, load_tuned
from exl2ray.tune.rows import Batches
from exl2ray.tune.settings import RATE, Settings
from exl2ray.tune.shelves import Homes, Shelf
from exl2ray.tune.training import Rates, Trainer, schedule
from exl2ray.wording import file_size

EVALUATIONS = 8
PIECES = 50  # of a tuning, each told when it is done
WAIT = "wait"  # method: of what is told at once
BITS = 0.0  # the one chain of a tuning
NOWHERE = 1 << 62


@dataclass(frozen=True, kw_only=True)
class TunePass(Pass):
    """pieces: numbers of those that are not told yet; the one after the last stands for the decision."""

    settings: Settings
    identity: str
    held_kinds: tuple[str, ...]
    steps: int
    pieces: tuple[int, ...]
    inputs: inputs.Begun


def ends_of(steps: int) -> list[int]:
    """The step that each piece of a tuning ends with."""
    count = min(PIECES, steps)
    return [(k + 1) * steps // count for k in range(count)]


class TuningWorker:
    """setup: ``calibration`` names the rows in the work directory, "ids" and "held"."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup, self.device = setup, torch.device(setup.device)
        if setup.threads and self.device.type == "cpu":
            torch.set_num_threads(setup.threads)
        if self.device.type == "cuda":  # products with one workspace, so that torch may be asked for what is reproducible
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.store = open_store(setup.work_root)
        if setup.nonce is not None:
            verify_nonce(self.store, *setup.nonce, setup.versions)
        self._comm: Comm = Solo()
        self._met = Meeting()
        self._end = NOWHERE

    def run(self, part: Pass) -> Iterator[Begun | Ready | ItemResult]:
        """As `exl2ray.team.worker.Worker`."""
        assert isinstance(part, TunePass)
        if self.setup.threads and self.device.type == "cpu":
            torch.set_num_threads(self.setup.threads)  # of the thread that computes
        try:
            with torch.no_grad():
                yield from _Tuning(self, part).run()
        finally:
            self._end = NOWHERE

    def end_before(self, index: int) -> None:
        """Called while a pass runs, from another thread: it ends before its next step, saved."""
        self._end = index

    def is_to_end(self, comm: Comm) -> bool:
        return bool(min(comm.gather(self._end)) < NOWHERE)

    def group(self, meeting: Meeting) -> Comm:
        if self._met != meeting:
            self.release()
            if meeting.place is not None:
                self._comm = Group(meeting.place, meeting.rank, meeting.size, self.device)
            self._met = meeting
        return self._comm

    def release(self) -> None:
        """Leaves the group, and forgets what fills memory, after an error."""
        self._comm.close()
        self._comm, self._met = Solo(), Meeting()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


class _Tuning:
    """One call of a worker. A pass that begins again goes on from the last checkpoint, whatever was told since."""

    def __init__(self, worker: TuningWorker, part: TunePass) -> None:
        self.worker, self.part, self.settings = worker, part, part.settings
        self.device, self.store = worker.device, worker.store
        self.comm: Comm = Solo()
        self.notes: list[str] = []

    def run(self) -> Iterator[Begun | Ready | ItemResult]:
        together = self.part.meeting.size > 1
        yield Begun("join", self.part.pieces[0], "loading", BITS, together=together)
        begin = time.monotonic()
        self.comm = self.worker.group(self.part.meeting)
        rows = get_tensors(self.store, self.worker.setup.calibration)
        self.inputs = inputs.Inputs(self.settings.directory, self.settings.reference)
        self.inputs.follow(self.part.inputs)
        self.pair = self.inputs.pair
        self.modules_of = self.pair.start.spec.modules
        self.skip = int(self.pair.start.bos_id is not None)
        self.ids, self.held = rows["ids"].clone(), rows["held"].clone()
        shrink = max(self.part.shrink.values(), default=1)
        self.room = room_for(self.pair.start.spec, self.device, self.settings.streamed, shrink)
        self._ahead = Ahead(self.pair.source, self.device, again=self.room.streamed)
        self.source = self._shelf(lambda i: load_source(self.pair, self.modules_of[i], self.device, self._ahead.at(i)))
        self.saved = state.restore(self.store, self.comm, self.part.identity, self.notes)
        self.progress = self.saved.progress if self.saved else state.Progress(self.part.identity)
        if self.progress.step > self.part.steps:
            self.saved, self.progress = None, state.Progress(self.part.identity)
        self.was_over = self.progress.over
        if not self.progress.over:
            self._open()
        yield Ready("join", time.monotonic() - begin)
        yield from self._steps(together)
        kept = self.was_over or self.keeper.is_done
        if self.progress.over and kept and self.part.pieces[-1] == len(ends_of(self.part.steps)):
            yield Begun("decide", self.part.pieces[-1], "decision", BITS, together=together)
            begin = time.monotonic()
            saved = state.restore(self.store, self.comm, self.part.identity)
            assert saved is not None
            self.inputs.check()
            payload = decided(self.pair, saved, self._evaluator(), self.part.held_kinds, self.device, self._shelf)
            seconds, detail = time.monotonic() - begin, f"kept: {payload['words']}"
            yield ItemResult(self.part.pieces[-1], "decision", seconds, detail, payload, BITS, self._told())

    def _shelf(self, make: Any) -> Sequence[Any]:
        count = len(self.modules_of)
        return Shelf(count, make) if self.room.streamed else [make(i) for i in range(count)]

    def _evaluator(self) -> Evaluator:
        return Evaluator(self.held, self.source, self.device, self.skip, self.comm, self.room.streamed)

    # ---- steps -------------------------------------------------------------------------------------------------

    def _steps(self, together: bool) -> Iterator[Begun | Ready | ItemResult]:
        ends = ends_of(self.part.steps)
        pieces = [k for k in self.part.pieces if k < len(ends)]
        for k in pieces:
            yield Begun("steps", k, f"step {ends[k]}", BITS, together=together)
            begin, loss, counts = time.monotonic(), torch.zeros(()), self.progress.step < ends[k]
            while self.progress.step < ends[k] and not self.progress.over:
                if self.worker.is_to_end(self.comm):
                    yield from self._leave(k, together)
                    return
                begun = time.monotonic()
                loss = self._step()
                yield Ready("step", time.monotonic() - begun)  # so that somebody may ask for an end
            detail = f"KL {self._finite(loss):.4f}" if counts and self.progress.step >= ends[k] else ""
            yield ItemResult(k, f"step {ends[k]}", time.monotonic() - begin, detail, {}, BITS, self._told())
        if not self.progress.over:  # all was told, and not saved, when the worker was lost
            yield Begun("join", self.part.pieces[-1], "the last steps once more", BITS, together=together)
        while not self.progress.over:
            if self.worker.is_to_end(self.comm):
                yield from self._leave(self.part.pieces[-1], together)
                return
            self._step()
            yield Ready("step", 0.0)
        yield from self._close(together)

    def _open(self) -> None:
        """The model that is trained, from where it was left, or from the start."""
        folder = Path(self.store.root) / "homes"
        homes = Homes(folder, self.room.home_bytes // self.comm.size) if self.room.streamed else None
        self._homes, dtype = homes, self.settings.compute_dtype(self.device)
        self.modules = self._shelf(lambda i: self._module(i, homes, dtype))
        self._ahead.end()
        comm = self.comm
        self.trainer = Trainer(
            self.modules, self.source, self.device, self.skip, comm=comm, keep=self.room.keeps_graphs,
            streamed=self.room.streamed,
        )  # fmt: skip
        self.evaluate = self._evaluator()
        size = self.settings.rows_of_a_step(len(self.ids))
        self._copies = HostCopies(self.device) if self.device.type == "cuda" else None
        self.order = Batches(len(self.ids), size, self.part.steps, self.settings.seed)
        weights, last = self.pair.start.spec.weights, self.saved.progress.step if self.saved is not None else None
        state_bytes, every = weights * (TRAINED_BYTES + SNAPSHOT_BYTES), self.settings.checkpoint_seconds
        self.keeper = Keeper(self.store, comm, self.notes, every, state_bytes, weights * SNAPSHOT_BYTES, last)
        attention, place = "fused" if self.trainer.fused else "plain", "a module at a time" if homes else "as a whole"
        self.notes.append(f"tuning {place}, {str(dtype).removeprefix('torch.')}, {attention} attention")
        for _ in self.modules if homes is not None else ():
            pass  # each is made once, so that all that is trained has its place
        if homes is not None and homes.file_bytes:
            self.notes.append(f"{file_size(homes.file_bytes)} of what is trained lie in files, for want of main memory")
        if self.keeper.patience() > every:
            minutes = self.keeper.patience() / 60
            self.notes.append(f"checkpoints are of {file_size(state_bytes)}: one about every {minutes:.0f} minutes")
        if self.saved is not None:
            self.notes.append(f"going on from step {self.progress.step}")
        if not self.progress.scores:
            self._judge()

    def _module(self, index: int, homes: Homes | None, dtype: torch.dtype) -> TunedModule:
        module = self.modules_of[index]
        given = (self.pair, module, self.device, dtype, self.settings.reach, self.comm.rank, self.comm.size)
        if homes is None or module.profile_key not in homes:
            made = load_tuned(*given, ahead=self._ahead.at(index))
            if self.saved is not None:
                self.progress.snapshots[made.key] = self.saved.into(made)
            if homes is None:
                return made
            homes.keep(made)
        made = load_tuned(*given, homes.latents(module.profile_key))
        homes.back(made, self.progress.step)
        return made

    def _step(self) -> Tensor:
        s, step, steps = self.settings, self.progress.step, self.part.steps
        factor = schedule(step, steps, min(s.warmup, max(1, steps // 5)))
        loss = self.trainer.step(self.ids[self.order[step]], Rates(s.rate or RATE, s.gain_rate or RATE, factor))
        self.progress.step = step = step + 1
        if step % max(1, -(-steps // EVALUATIONS)) == 0 or step == steps:
            self._judge()
        if step == steps or self.progress.over:
            self._finite(loss)
            self.progress.over = True
        elif self.keeper.is_due():
            self.keeper.checkpoint(step, self._save)
        return loss

    def _save(self) -> None:
        self.inputs.check()
        nothing: dict[str, Tensor] = {}
        keys = [m.profile_key for m in self.modules_of]
        states = ((k, nothing if self.progress.over else self._state(i, k)) for i, k in enumerate(keys))
        state.save(self.store, self.comm, self.progress, states)

    def _leave(self, piece: int, together: bool) -> Iterator[Begun]:
        """Somebody asked for an end."""
        problem = self.keeper.checkpoint(self.progress.step, self._save)
        if problem:
            yield Begun(WAIT, piece, f"{problem}: {self.keeper.next()}", BITS, together=together)

    def _state(self, index: int, key: str) -> dict[str, Tensor]:
        return self.modules[index].state() if self._homes is None else self._homes.state(key)

    def _told(self) -> tuple[str, ...]:
        """Notes since the last time; all members of a group have the same, and the driver hears the first that comes."""
        notes = tuple(self.notes)
        self.notes.clear()
        return notes

    def _close(self, together: bool) -> Iterator[Begun]:
        """After the last step: the best state is in the store, and what was trained need not be in memory any more."""
        if not self.was_over:
            for words in self.keeper.at_last(self._save, lambda: self.worker.is_to_end(self.comm)):
                yield Begun(WAIT, self.part.pieces[-1], words, BITS, together=together)
        problem = self.trainer.recording.problem if hasattr(self, "trainer") else ""
        if problem:
            self.notes.append(f"steps could not be recorded for replay, and were launched one by one: {problem}")
        self.modules = self.trainer = self._homes = None  # type: ignore[assignment]

    def _finite(self, loss: Tensor) -> float:
        found = sum(self.comm.gather(float(loss)))
        if not math.isfinite(found):
            where = f"step {self.progress.step} of tuning"
            raise NumericError(f"{where}: the divergence is {found}", "a lower --rate may help; please report it")
        return float(found)

    # ---- held-out rows -----------------------------------------------------------------------------------------

    def _judge(self) -> None:
        """Takes note of a score; of the best state a snapshot is kept, and training that only makes it worse ends."""
        progress, kinds = self.progress, self.part.held_kinds
        modules = self.modules
        found = self.evaluate(Shelf(len(modules), lambda i: modules[i].block))
        progress.start = progress.start or found.tolist()
        start = torch.tensor(progress.start, dtype=torch.float64)
        best = progress.scores[progress.best][1:] if progress.best >= 0 else (True, math.inf)
        standing = judge.standing(start, found, kinds)
        progress.scores.append((progress.step, *standing))
        if standing < best or progress.best < 0:
            progress.best = len(progress.scores) - 1
            progress.snapshots = {m.key: m.snapshot(progress.snapshots.get(m.key), self._copies) for m in self.modules}
        progress.over = judge.is_over([score for *_, score in progress.scores])
        ratio = math.exp(standing[1] - progress.scores[0][2])
        lost = judge.worse(start, found, kinds)
        words = f"step {progress.step} of {self.part.steps}: held-out KL {math.exp(standing[1]):.4f}, "
        words += f"{ratio:.3f} times that of the start{'; worse on ' + ', '.join(lost) if lost else ''}"
        self.notes.append(words + ("; stopped here" if progress.over and progress.step < self.part.steps else ""))
