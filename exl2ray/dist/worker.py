"""One worker: owns a device, runs items, keeps hidden states between them, commits before it answers.

A plain class: `exl2ray.dist.session` wraps it in a Ray actor or calls it inline. Any worker can run any item: states that
neither come with the item nor are held here are loaded from a checkpoint, or computed from the token rows. Quantised
modules are never quantised again for that: the forward goes through their packed tensors.

An item on one module comes in two steps. ``enter`` runs the reference forward; its output is the entry of the next module,
which another worker can start on while this one goes on with ``measure`` or ``quantize``.
"""

from __future__ import annotations

import os
import socket
import time
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl2ray.dist.arrays import Shipped, from_shipped, to_shipped
from exl2ray.dist.checkpoints import Chain, Checkpoints
from exl2ray.dist.comm import Comm, Group, Solo
from exl2ray.dist.gang import Gang
from exl2ray.dist.items import (
    ChainItem,
    EnterItem,
    ItemResult,
    JoinItem,
    MeasureItem,
    Meeting,
    PerplexityItem,
    QuantizeItem,
    RowSet,
    SensitivityItem,
    SweepItem,
    WorkerSetup,
)
from exl2ray.dist.packed_files import PackedFiles
from exl2ray.dist.perplexity import quantized_perplexity
from exl2ray.dist.probing import backward_pass, sensitivity_record
from exl2ray.dist.runner import Runner, option_names, perplexity_of, perplexity_sums
from exl2ray.dist.shared_reading import SharedReading
from exl2ray.dist.sweep import Found, Prepared, sweep_model
from exl2ray.errors import ClusterError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.measurement import ModuleProfile
from exl2ray.model.blocks import Block, check_states
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.measure import Settings, by_input, profile_of, score_options
from exl2ray.quant.measure_head import measure_head
from exl2ray.quant.quantize import quantize_after, quantize_head
from exl2ray.quant.rows import share_rows
from exl2ray.quant.warm import rehearse_solving, warm_up
from exl2ray.store.layout import MEASURE, REFERENCE_KIND, quant_kind
from exl2ray.store.nonce import verify_nonce
from exl2ray.store.records import FileRef, Record, hash_inputs

PERPLEXITY = "perplexity"  # key of a record


@dataclass(frozen=True)
class Context:
    """A module that was entered: states before and after it, what the reference forward collected. The head has no y."""

    rows: RowSet
    index: int
    block: Block
    x: Tensor
    y: Tensor | None
    hessians: dict[str, HessianAccumulator]
    settings: Settings


class Worker:
    def __init__(self, setup: WorkerSetup) -> None:
        if setup.threads and setup.device == "cpu":
            torch.set_num_threads(setup.threads)
        self.setup = setup
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.runner = Runner(setup)  # reads the first modules in the background meanwhile
        warm_up(self.runner.device, setup.numerics)
        if setup.nonce is not None:
            verify_nonce(self.runner.store, *setup.nonce, setup.versions)
        self.checkpoints = Checkpoints(self.runner.records, setup.checkpoint_seconds)
        self.context: Context | None = None
        self.found: Found | None = None  # of a sweep
        self.gang: Gang | None = None
        self.comm: Comm = Solo()
        self.reading: SharedReading | None = None  # of the group, until its first sweep
        self._met = Meeting()
        self.received = 0  # bytes of states that came through the object store

    def ping(self) -> dict[str, Any]:
        """What this worker is: shown at the start and used by the health check."""
        cuda = self.setup.device == "cuda"
        name = torch.cuda.get_device_name(self.runner.device) if cuda else "CPU"
        return {"worker": self.name, "device": name, "threads": torch.get_num_threads()}

    def meet(self, meeting: Meeting) -> None:
        """Connects to the other members of a group and gets ready for what it does first, when all will wait for the slowest:
        reads this member's part of the first weights, and loads the kernels for the shapes of the first modules."""
        self._group(meeting)
        self.reading = SharedReading(self.runner, self.comm)
        self.reading.expect(0)
        self.reading.expect(1)  # later windows lock no more memory than these two together: that would stop the GPU
        if self.runner.device.type == "cuda":
            self._rehearse()
        self.reading.wait()
        self.runner.ahead.wait()

    def _rehearse(self) -> None:
        """Runs the first modules on zeros, in batches as they will come, and quantises linears of the first one."""
        run = self.runner
        for module in run.spec.modules[1:3]:
            block = run.load(module)
            if module.index == 1:
                rehearse_solving(block, run.settings(module, torch.empty(1, run.rows("quantize").shape[1], 0)))
            for name in ("measure", "quantize"):
                ids = run.rows(name)
                for rows in {len(r) for r in share_rows(len(ids)) if len(r)}:
                    shape = (rows, ids.shape[1], run.spec.hyper.hidden_size)
                    x = torch.zeros(shape, dtype=getattr(torch, run.spec.hyper.state_dtype), device=run.device)
                    run.advance(block, x, run.settings(module, x))
        run.expect(1, 4)  # two layers: later reads find this much page-locked memory, and locking it stops the GPU

    # ---- modules on reference states ---------------------------------------------------------------------------

    def sweep(self, item: SweepItem) -> ItemResult:
        """Runs the source model with the group; keeps what this member's modules begin with, for `enter`."""
        begin = time.monotonic()
        self.context = self.found = None
        self._leave_gang()
        comm = self._group(item.meeting)
        before, reading = comm.received, self.reading or SharedReading(self.runner, comm)
        self.reading = None
        self.found = sweep_model(self.runner, comm, reading, item)
        words = f"member {comm.rank + 1} of {comm.size}, {len(self.found.prepared)} modules prepared"
        return self._result("sweep", begin, words, {}, received=comm.received - before)

    def enter(self, item: EnterItem, entry: Shipped | None = None) -> tuple[ItemResult, Shipped | None]:
        """Reference forward of one module: its result, and the states after it if they are to be shipped."""
        begin, before = time.monotonic(), self.received
        self._leave_gang()
        module = self.runner.spec.modules[item.index]
        prepared = self._prepared(item)
        x = self._entry(item, entry) if prepared is None else prepared.x
        block = self.runner.load(module)
        settings = self.runner.settings(module, x, item.shrink)
        if module.kind == "head":
            self.context = Context(item.rows, item.index, block, x, None, {}, settings)
        else:
            y, hessians = self.runner.enter(block, x, item.shrink) if prepared is None else (prepared.y, prepared.hessians)
            self.context = Context(item.rows, item.index, block, x, y, hessians, settings)
            if self.checkpoints.due():
                self.checkpoints.save(self._chain(item.rows), item.index + 1, {None: {"x": y}}, item.keep_from)
        after = self.context.y
        shipped = to_shipped(after) if item.ship and after is not None else None
        return self._result(module.profile_key, begin, "entered", {}, received=self.received - before), shipped

    def measure(self, item: MeasureItem) -> ItemResult:
        """Scores options of the entered module. All of them: commits the profile. A part: returns the scored rows."""
        begin = time.monotonic()
        c = self._entered("measure", item.index)
        if c.y is None:
            return self._measure_head(c, item, begin)
        # A whole module uses its Hessians up as they are factorised; the next part of a split one needs them again.
        hessians = c.hessians if item.part == (0, 1) else dict(c.hessians)
        lists, extra = score_options(c.block, c.x, _states(c), hessians, c.settings, item.part)
        if item.part != (0, 1):
            payload = {"lists": lists, "extra": extra}
            return self._result(c.block.module.profile_key, begin, f"part {item.part[0] + 1}/{item.part[1]}", payload)
        notes: list[str] = []
        profile = profile_of(c.block.module, lists, extra, notes.append)
        record = measure_record(profile, item.inputs_hash, notes, time.monotonic() - begin)
        self.runner.records.commit(record)
        return self._result(record.key, begin, describe(profile), record.payload, tuple(notes))

    def _measure_head(self, c: Context, item: MeasureItem, begin: float) -> ItemResult:
        key, mode = c.block.module.profile_key.rsplit(".", 1)
        profile = ModuleProfile(key, mode, extra=measure_head(c.block, c.x, c.settings))
        notes = [f"{profile.entry_key}: {n}" for n in profile.extra.get("notes", ())]
        record = measure_record(profile, item.inputs_hash, notes, time.monotonic() - begin)
        self.runner.records.commit(record)
        return self._result(record.key, begin, "head", record.payload, tuple(notes))

    def quantize(self, item: QuantizeItem) -> ItemResult:
        """Quantises the entered module (or the head) for one bitrate; commits tensors and record."""
        begin = time.monotonic()
        c = self._entered("quantize", item.index)
        weights = dict(c.block.weights)  # the next bitrate starts from the source again
        try:
            writing, payload = self._head(c, item) if c.y is None else self._module(c, item)
        finally:
            c.block.weights.update(weights)
        key = c.block.module.profile_key
        payload["options"] = option_names(item.params)
        files = tuple(w.result() for w in writing)
        record = Record(quant_kind(item.bits), key, item.inputs_hash, payload, files, time.monotonic() - begin)
        self.runner.records.commit(record)
        detail = f"error {payload['error']:.5f}" if "error" in payload else "head"
        return self._result(key, begin, detail, payload, tuple(payload["notes"]))

    def _module(self, c: Context, item: QuantizeItem) -> tuple[list[Future[FileRef]], dict[str, Any]]:
        hessians = dict(c.hessians)  # kept for the next bitrate
        last = list(by_input(c.block.module.linears))[-1]
        files = PackedFiles(self.runner, quant_kind(item.bits), c.block.module.profile_key, item.inputs_hash)
        writing: list[Future[FileRef]] = []

        def done(group: str, packed: dict[str, PackedLinear]) -> None:
            files.add(packed)
            if group == last:
                writing.extend(files.close().values())

        result, _ = quantize_after(c.block, c.x, _states(c), hessians, item.params, c.settings, check_states, done)
        self.runner.keep(quant_kind(item.bits), item.inputs_hash, {p.key: p for p in result.packed})
        payload: dict[str, Any] = {"error": result.error, "notes": list(result.notes)}
        if result.experts:
            payload["experts"] = [dict(e) for e in result.experts]
        return writing, payload

    def _head(self, c: Context, item: QuantizeItem) -> tuple[list[Future[FileRef]], dict[str, Any]]:
        linear = c.block.module.linears[0]
        ids = self.runner.rows("quantize")[: self.setup.perplexity_rows]
        before = perplexity_of([perplexity_sums(c.block, c.x[: len(ids)], ids)])
        packed, notes = quantize_head(c.block, c.x, item.params[linear.key], c.settings, keep=True)
        files = PackedFiles(self.runner, quant_kind(item.bits), c.block.module.profile_key, item.inputs_hash)
        files.add({linear.key: packed})
        self.runner.keep(quant_kind(item.bits), item.inputs_hash, {linear.key: packed})
        return list(files.close().values()), {"reference_perplexity": before, "notes": list(notes)}

    def perplexity(self, item: PerplexityItem) -> ItemResult:
        """Perplexity of a quantised model that was not calibrated module after module; the first member commits it."""
        begin = time.monotonic()
        self.context = self.found = None
        self._leave_gang()
        comm = self._group(item.meeting)
        before = comm.received
        value = quantized_perplexity(self.runner, comm, item)
        payload = {"perplexity": value}
        if comm.rank == 0:
            record = Record(quant_kind(item.bits), PERPLEXITY, item.hashes[-1], payload, (), time.monotonic() - begin)
            self.runner.records.commit(record)
        shown = "not a number" if value is None else f"{value:.4g}"
        return self._result(PERPLEXITY, begin, shown, payload, received=comm.received - before)

    def sensitivity(self, item: SensitivityItem) -> ItemResult:
        """A backward pass over some shares of rows; commits a record per share."""
        begin = time.monotonic()
        self.context = self.found = None
        self._leave_gang()
        found = backward_pass(self.runner, item)
        seconds = (time.monotonic() - begin) / len(found)
        for share, sums in found.items():
            self.runner.records.commit(sensitivity_record(share, sums, item.inputs_hash, seconds))
        rows = sum(len(r) for r in item.shares.values())
        return self._result(item.name, begin, f"{rows} rows of {item.tokens} tokens", {"sums": found})

    # ---- the chain, alone or in a group ------------------------------------------------------------------------

    def join(self, item: JoinItem) -> ItemResult:
        """Forms a group (of one, perhaps) for the chain of one bitrate."""
        begin = time.monotonic()
        self.context = self.found = None
        # A patched model shares hashes of modules with the model before the patch, but not the states between them.
        plan = hash_inputs(hashes=list(item.hashes))[:16]
        chain = Chain(quant_kind(item.bits), f"quantized:{self.setup.calibration_sha256[:32]}:{plan}", item.hashes)
        if self.gang is None or self.gang.chain != chain:
            self._leave_gang()
            self.gang = Gang(self.runner, self.checkpoints, chain)
        comm = self._group(item.meeting)
        before, reading = comm.received, self.reading or SharedReading(self.runner, comm)
        self.reading = None
        if comm.size > 1:
            reading.expect(0, 1)
        self.gang.join(item, comm, reading)
        reading.close()
        words = f"member {comm.rank + 1} of {comm.size}"
        return self._result("group", begin, words, {}, received=comm.received - before)

    def chain(self, item: ChainItem) -> ItemResult:
        """One module of the chain; the first member answers for the group."""
        begin = time.monotonic()
        if self.gang is None:
            raise ClusterError("a module of a chain came before its group was formed")
        key = self.runner.spec.modules[item.index].profile_key
        before = self.gang.comm.received
        payload, detail = self.gang.quantize(item)
        received = self.gang.comm.received - before
        return self._result(key, begin, detail, payload, tuple(payload.get("notes", ())), received)

    def release(self) -> None:
        """Forget everything that fills memory, after an error."""
        self.context = self.found = None
        self._leave_gang()
        self._part()
        self.runner.forget()
        if self.runner.device.type == "cuda":
            torch.cuda.empty_cache()

    def _leave_gang(self) -> None:
        self.gang = None

    def _group(self, meeting: Meeting) -> Comm:
        """The connection to a group; the present one, if it is of this meeting."""
        if self._met != meeting:
            self._part()
            if meeting.place is not None:
                self.comm = Group(meeting.place, meeting.rank, meeting.size, self.runner.device)
            self._met = meeting
        return self.comm

    def _part(self) -> None:
        self.comm.close()
        self.comm, self.reading, self._met = Solo(), None, Meeting()

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _prepared(self, item: EnterItem) -> Prepared | None:
        """What a sweep has left for this module; it is used once."""
        if self.found is None or self.found.rows != item.rows:
            return None
        prepared = self.found.prepared.pop(item.index, None)
        if prepared is not None:
            self.context = None
        return prepared

    def _entry(self, item: EnterItem, entry: Shipped | None) -> Tensor:
        """States at the entry of the item's module. The context is dropped: two sets of states need not fit."""
        held, self.context = self.context, None
        run, found = self.runner, self.found
        if found is not None and (found.rows, found.index) == (item.rows, item.index) and found.x is not None:
            x, found.x = found.x, None
            return x
        if held is not None and held.rows == item.rows and held.index == item.index:
            return held.x
        if held is not None and held.rows == item.rows and held.y is not None and item.start <= held.index + 1 <= item.index:
            index, x = held.index + 1, held.y
        elif entry is not None:
            index, x = item.start, from_shipped(entry, run.home(entry.array.nbytes))
            self.received += entry.array.nbytes
        else:
            saved = self.checkpoints.load(self._chain(item.rows), item.index)
            index, x = (1, run.embedded(item.rows)) if saved is None else (saved.index, run.place(saved.tensors["x"]))
            if index == 1 and item.rows == "quantize":
                run.keep_reported(x)
        del held
        for module in run.spec.modules[index : item.index]:
            x = run.advance_all(run.load(module), x, item.shrink)
        return x

    def _entered(self, rows: RowSet, index: int) -> Context:
        if self.context is None or (self.context.rows, self.context.index) != (rows, index):
            raise ClusterError(f"module {index} was not entered on this worker")
        return self.context

    def _chain(self, rows: RowSet) -> Chain:
        return Chain(MEASURE if rows == "measure" else REFERENCE_KIND, f"reference:{self.setup.calibration_sha256[:32]}")

    def _result(
        self,
        key: str,
        begin: float,
        detail: str,
        payload: dict[str, Any],
        notes: tuple[str, ...] = (),
        received: int = 0,
    ) -> ItemResult:
        return ItemResult(key, time.monotonic() - begin, detail, payload, notes, self.name, received)


def _states(c: Context) -> Tensor:
    if c.y is None:
        raise ClusterError(f"{c.block.module.profile_key} has no states after it")
    return c.y


def measure_record(profile: ModuleProfile, inputs_hash: str, notes: list[str], seconds: float) -> Record:
    """The record of a measured module; its key is that of the module in measurement.json."""
    payload = {"profile": {"value": profile.to_json(), "extra": dict(profile.extra)}, "notes": notes}
    return Record(MEASURE, profile.entry_key, inputs_hash, payload, (), seconds)


def describe(profile: ModuleProfile) -> str:
    """Range of accuracies, for the progress display."""
    accuracies = [o.accuracy for options in profile.slots() for o in options]
    return f"accuracy {min(accuracies):.4f} .. {max(accuracies):.4f}"
