"""A model while it is tuned, in one worker: its steps, what the held-out rows say of it, and what is kept of it.

All members of a group call the methods together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.evaluate.forward import Ahead
from exl2ray.quant.group import Comm
from exl2ray.store.fs import Store
from exl2ray.store.tensors import get_tensors
from exl2ray.team.packed_files import HostCopies
from exl2ray.tune import judge, state
from exl2ray.tune.evaluating import Evaluator
from exl2ray.tune.inputs import Inputs
from exl2ray.tune.keeping import Keeper
from exl2ray.tune.memory import SNAPSHOT_BYTES, TRAINED_BYTES, room_for
from exl2ray.tune.messages import TunePass
from exl2ray.tune.module import TunedModule
from exl2ray.tune.opening import load_source, load_tuned
from exl2ray.tune.rows import Batches
from exl2ray.tune.settings import RATE
from exl2ray.tune.shelves import Homes, Shelf
from exl2ray.tune.training import Rates, Trainer, schedule
from exl2ray.wording import file_size, nats

EVALUATIONS = 8  # of the held-out rows, in all steps together
T = TypeVar("T")


class Ground:
    """What a tuning stands on: the models as they are in their files, the source's blocks, and the rows.

    rows: the file in the work directory, with "ids" and "held". skip: positions at the start of a row that do not count.
    """

    def __init__(self, part: TunePass, device: torch.device, store: Store, rows: str, comm: Comm) -> None:
        self.device, self.store, self.comm = device, store, comm
        tensors = get_tensors(store, rows)
        self.inputs = Inputs(part.settings.directory, part.settings.reference)
        self.inputs.follow(part.inputs)
        self.pair = self.inputs.pair
        start = self.pair.start
        self.modules, self.skip = start.spec.modules, int(start.bos_id is not None)
        self.ids, self.held = tensors["ids"].clone(), tensors["held"].clone()
        self.room = room_for(start.spec, device, part.settings.streamed, max(part.shrink.values(), default=1))
        self.ahead = Ahead(self.pair.source, device, again=self.room.streamed)
        self.source = self.shelf(lambda i: load_source(self.pair, self.modules[i], device, self.ahead.at(i)))

    def shelf(self, make: Callable[[int], T]) -> Sequence[T]:
        """One of each module, all at once or a module at a time."""
        count = len(self.modules)
        return Shelf(count, make) if self.room.streamed else [make(i) for i in range(count)]

    def evaluator(self) -> Evaluator:
        return Evaluator(self.held, self.source, self.device, self.skip, self.comm, self.room.streamed)


class Session:
    """The model that is trained, from where it was left, or from the start. ``progress`` is kept up to date.

    saved: where it was left. notes: get what is to be told.
    """

    def __init__(
        self, ground: Ground, part: TunePass, saved: state.Saved | None, progress: state.Progress, notes: list[str]
    ) -> None:
        self._ground, self._part, self._saved, self.progress, self._notes = ground, part, saved, progress, notes
        room, comm, device, settings = ground.room, ground.comm, ground.device, part.settings
        self._dtype = settings.compute_dtype(device)
        folder = Path(ground.store.root) / "homes"
        self._homes = Homes(folder, room.home_bytes // comm.size) if room.streamed else None
        self._modules = ground.shelf(self._module)
        ground.ahead.end()
        self._trainer = Trainer(
            self._modules, ground.source, device, ground.skip, comm=comm, keep=room.keeps_graphs, streamed=room.streamed
        )
        self._evaluate = ground.evaluator()
        self._copies = HostCopies(device) if device.type == "cuda" else None
        count = len(ground.ids)
        self._loss = torch.zeros(())  # this member's part of the last step's
        self._order = Batches(count, settings.rows_of_a_step(count), part.steps, settings.seed)
        weights, every = ground.pair.start.spec.weights, settings.checkpoint_seconds
        self._state_bytes = weights * (TRAINED_BYTES + SNAPSHOT_BYTES)
        last_bytes, last = weights * SNAPSHOT_BYTES, None if saved is None else saved.progress.step
        self._keeper = Keeper(ground.store, comm, notes, every, self._state_bytes, last_bytes, last)
        for _ in self._modules if self._homes is not None else ():
            pass  # each is made once, so that all that is trained has its place
        self._note_the_way()
        if not progress.scores:
            self._judge()

    def _module(self, index: int) -> TunedModule:
        ground, homes, module = self._ground, self._homes, self._ground.modules[index]
        given = (ground.pair, module, ground.device, self._dtype, ground.comm.rank, ground.comm.size)
        if homes is None or module.profile_key not in homes:
            made = load_tuned(*given, ahead=ground.ahead.at(index))
            if self._saved is not None:
                self.progress.snapshots[made.key] = self._saved.into(made)
            if homes is None:
                return made
            homes.keep(made)
        made = load_tuned(*given, homes.latents(module.profile_key))
        homes.back(made, self.progress.step)
        return made

    def _note_the_way(self) -> None:
        """What is worth knowing of how it is tuned."""
        homes, patience = self._homes, self._keeper.patience()
        place = "as a whole" if homes is None else "a module at a time"
        attention = "fused" if self._trainer.fused else "plain"
        passes = self._part.settings.passes or 1
        often = ("once", "twice")[passes - 1] if passes <= 2 else f"{passes} times"
        how = f"{str(self._dtype).removeprefix('torch.')}, {attention} attention"
        self._notes.append(f"tuning {place}, {how}, {often} over the text")
        if homes is not None and homes.file_bytes:
            self._notes.append(f"{file_size(homes.file_bytes)} of what is trained lie in files, for want of main memory")
        if patience > self._part.settings.checkpoint_seconds:
            every = f"one about every {patience / 60:.0f} minutes"
            self._notes.append(f"checkpoints are of {file_size(self._state_bytes)}: {every}")
        if self._saved is not None:
            self._notes.append(f"going on from step {self.progress.step}")

    # ---- steps -------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """The next one, with the evaluation and the checkpoint that are due after it."""
        s, step, steps = self._part.settings, self.progress.step, self._part.steps
        factor = schedule(step, steps, min(s.warmup, max(1, steps // 5)))
        rates = Rates(s.rate or RATE, s.gain_rate or RATE, factor)
        self._loss = self._trainer.step(self._ground.ids[self._order[step]], rates)
        self.progress.step = step = step + 1
        if step % max(1, -(-steps // EVALUATIONS)) == 0 or step == steps:
            self._judge()
        if step == steps or self.progress.over:
            self.divergence()
            self.progress.over = True
        elif self._keeper.is_due():
            self._keeper.checkpoint(step, self._save)

    def divergence(self) -> float:
        """Of the last step. Raises NumericError if it is not finite."""
        found = sum(self._ground.comm.gather(float(self._loss)))
        if not math.isfinite(found):
            where = f"step {self.progress.step} of tuning"
            raise NumericError(f"{where}: the divergence is {found}", "a lower --rate may help; please report it")
        return float(found)

    def _judge(self) -> None:
        """Takes note of a score; of the best state a snapshot is kept, and training that only makes it worse ends."""
        progress, kinds, modules = self.progress, self._part.held_kinds, self._modules
        found = self._evaluate(Shelf(len(modules), lambda i: modules[i].block))
        progress.start = progress.start or found.tolist()
        start = torch.tensor(progress.start, dtype=torch.float64)
        best = progress.scores[progress.best][1:] if progress.best >= 0 else (True, math.inf)
        standing = judge.standing(start, found, kinds)
        progress.scores.append((progress.step, *standing))
        if standing < best or progress.best < 0:
            progress.best = len(progress.scores) - 1
            progress.snapshots = {m.key: m.snapshot(progress.snapshots.get(m.key), self._copies) for m in modules}
        progress.over = judge.is_over([score for *_, score in progress.scores])
        ratio = math.exp(standing[1] - progress.scores[0][2])
        lost = judge.worse(start, found, kinds)
        words = f"step {progress.step} of {self._part.steps}: held-out KL {nats(math.exp(standing[1]))}, "
        words += f"{ratio:.3f} times that of the start{'; worse on ' + ', '.join(lost) if lost else ''}"
        self._notes.append(words + ("; stopped here" if progress.over and progress.step < self._part.steps else ""))

    # ---- what is kept ------------------------------------------------------------------------------------------

    def leave(self) -> str:
        """Keeps what there is, for somebody who asked for an end; what is to be told if that was not possible."""
        problem = self._keeper.checkpoint(self.progress.step, self._save)
        return f"{problem}: {self._keeper.next()}" if problem else ""

    def end(self, is_to_end: Callable[[], bool]) -> Iterator[str]:
        """After the last step: the best state is put into the store, unless an end is asked for while that is not possible.
        What it yields is to be told at once."""
        yield from self._keeper.at_last(self._save, is_to_end)
        problem = self._trainer.recording.problem
        if problem:
            self._notes.append(f"steps could not be recorded for replay, and were launched one by one: {problem}")

    @property
    def is_kept(self) -> bool:
        return self._keeper.is_done

    def _save(self) -> None:
        self._ground.inputs.check()
        keys = [m.profile_key for m in self._ground.modules]
        states = ((key, self._state(i, key)) for i, key in enumerate(keys))
        state.save(self._ground.store, self._ground.comm, self.progress, states)

    def _state(self, index: int, key: str) -> dict[str, Tensor]:
        if self.progress.over:
            return {}  # only the best state is needed
        return self._modules[index].state() if self._homes is None else self._homes.state(key)
