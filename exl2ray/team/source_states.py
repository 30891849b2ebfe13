"""Where a worker is in the source model: the states of a set of rows at the entry of a module, and how to get to another."""

from __future__ import annotations

from torch import Tensor

from exl2ray.model.blocks import check_states
from exl2ray.quant.entering import Entered, enter_module
from exl2ray.store.file_names import MEASURE, REFERENCE_KIND
from exl2ray.store.records import Record
from exl2ray.team.checkpoints import Chain, Checkpoints
from exl2ray.team.messages import RowSet
from exl2ray.team.runner import Runner
from exl2ray.team.source_forward import Found


class SourceStates:
    """States of one set of rows on one worker. They only go forward; another way begins at a checkpoint or the token rows."""

    def __init__(self, run: Runner, checkpoints: Checkpoints, rows: RowSet) -> None:
        self.rows = rows
        self._run, self._checkpoints = run, checkpoints
        kind = MEASURE if rows == "measure" else REFERENCE_KIND
        self._chain = Chain(kind, f"reference:{run.setup.calibration_sha256[:32]}")
        self._held: tuple[int, Tensor] | None = None  # module, states at its entry
        self._found: Found | None = None  # of running the source model with a group
        self._saved: list[Record] = []  # the last checkpoint of this worker

    def adopt(self, found: Found) -> None:
        """Goes on from what a joint run of the source model has left here."""
        self._found = found
        self._held = None if found.x is None else (found.index, found.x)
        found.x = None

    def way(self, index: int) -> int:
        """Modules to be run before ``index`` can be, at most."""
        if self._found is not None and index in self._found.prepared:
            return 0
        here = 1 if self._held is None or self._held[0] > index else self._held[0]
        return index - here

    def enter(self, index: int, keep_from: int) -> Entered:
        """Runs a module, and those before it as far as need be. keep_from: checkpoints that a module from here on may need
        stay."""
        run, module = self._run, self._run.spec.modules[index]
        prepared = None if self._found is None else self._found.prepared.pop(index, None)
        if prepared is not None:
            self._held = None
        x = self._at(index) if prepared is None else prepared.x
        block, settings = run.load(module), run.settings(module, len(x), x.shape[1])
        if prepared is None:
            entered = enter_module(block, x, settings, check_states)
        else:
            entered = Entered(block, x, prepared.y, prepared.hessians, settings)
        if entered.y is None:
            self._held = (index, x)
            return entered
        self._held = (index + 1, entered.y)
        if self._checkpoints.due():
            saved = self._checkpoints.save(self._chain, index + 1, {None: {"x": entered.y}}, keep_from)
            for record in self._saved:  # this worker has finished all up to here since
                run.records.remove(record)
            self._saved = saved
        return entered

    def _at(self, index: int) -> Tensor:
        """States at the entry of a module. What is held is let go first: two sets of states need not fit."""
        run, held, self._held = self._run, self._held, None
        if held is not None and held[0] <= index:
            here, x = held
        else:
            held = None
            saved = self._checkpoints.load(self._chain, index)
            if saved is None:
                here, x = 1, run.embedded(self.rows)
            else:
                here, x = saved.index, run.place(saved.tensors["x"], self.rows)
        del held
        for module in run.spec.modules[here:index]:
            x = run.advance(run.load(module), x, shared=True)
        return x
