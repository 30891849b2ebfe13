"""One worker: owns a device, runs items, keeps hidden states between them, commits before it answers.

A plain class: `exl2ray.dist.session` wraps it in a Ray actor or calls it inline. Any worker can run any item: states that
it does not hold are loaded from the nearest checkpoint before the module, or computed from the token rows. Quantised
modules are never quantised again for that: the forward goes through their packed tensors.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl2ray.dist.items import ItemResult, MeasureItem, QuantizeItem, WorkerSetup
from exl2ray.errors import NumericError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.measurement import ModuleProfile
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import Block, check_states, load_block
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.quant.measure import Settings, batches, measure_block
from exl2ray.quant.memory import settings_for
from exl2ray.quant.pack import dequantize
from exl2ray.quant.quantize import quantize_block, quantize_head
from exl2ray.store.fs import Store
from exl2ray.store.layout import MEASURE, quant_kind
from exl2ray.store.nonce import verify_nonce
from exl2ray.store.records import FileRef, Record, Records, item_file
from exl2ray.store.tensors import get_tensors, put_tensors

STATES = "states-"  # key of a checkpoint's record: states at the entry of this module


@dataclass
class States:
    """Hidden states at the entry of module ``index``. ``chain`` says which pass and which choices they belong to.

    ``x``: (R, T, hidden), what the pass feeds to the module. ``other``: (P, T, hidden), the rows whose perplexity is
    reported, in the other model: the source where x comes from quantised modules, the quantised one where x comes from the
    source. None in the measurement.
    """

    chain: str
    index: int
    x: Tensor
    other: Tensor | None = None


class Worker:
    def __init__(self, setup: WorkerSetup) -> None:
        if setup.threads:
            torch.set_num_threads(setup.threads)
        self.setup = setup
        self.device = torch.device(setup.device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.store = Store.open(setup.work_root)
        if setup.nonce is not None:
            verify_nonce(self.store, *setup.nonce, setup.versions)
        self.records = Records(self.store)
        self.source = SourceModel(setup.in_dir)
        self.spec: ModelSpec = load_spec(self.source, setup.rope_scale, setup.rope_alpha)
        self.states: States | None = None
        self.saved = time.monotonic()

    # ---- items -------------------------------------------------------------------------------------------------

    def measure(self, item: MeasureItem) -> ItemResult:
        """Profiles one module and commits the profile; keeps the states after it."""
        start = time.monotonic()
        module = self.spec.modules[item.index]
        entry = self._entry_states(MEASURE, item.index, (), "reference")
        block = self._load(module)
        notes: list[str] = []
        profile, y = measure_block(block, entry.x, self._settings(module, entry.x), check_states, notes.append)
        seconds = time.monotonic() - start
        payload = {"profile": {"value": profile.to_json(), "extra": dict(profile.extra)}, "notes": notes}
        self.records.commit(Record(MEASURE, module.profile_key, item.inputs_hash, payload, (), seconds))
        self.states = States(entry.chain, item.index + 1, y)
        self._checkpoint(MEASURE, item.inputs_hash)
        return ItemResult(module.profile_key, seconds, describe(profile), payload, tuple(notes))

    def quantize(self, item: QuantizeItem) -> ItemResult:
        """Quantises one module (or the head), commits tensors and record; keeps the states after it."""
        start = time.monotonic()
        module = self.spec.modules[item.index]
        kind, inputs_hash = quant_kind(item.bits), item.hashes[item.index]
        entry = self._entry_states(kind, item.index, item.hashes, item.propagate)
        block = self._load(module)
        settings = self._settings(module, entry.x)
        if module.kind == "head":
            packed, payload, notes = self._head(block, entry, item, settings)
            detail = f"perplexity {payload['perplexity']:.4g} (source {payload['reference_perplexity']:.4g})"
        else:
            other = entry.other
            if other is not None and item.propagate == "quantized":
                other = self._advance(block, other, settings)  # before the weights are replaced
            result, quantised, unquantised = quantize_block(block, entry.x, item.params, settings, check_states)
            if other is not None and item.propagate == "reference":
                other = self._advance(block, other, settings)
            packed, notes = list(result.packed), result.notes
            payload = {"error": result.error, "notes": list(notes)}
            detail = f"error {result.error:.5f}"
            x = quantised if item.propagate == "quantized" else unquantised
            self.states = States(entry.chain, item.index + 1, x, other)
        tensors = {name: t for p in packed for name, t in p.tensors().items()}
        file = put_tensors(self.store, item_file(kind, "tensors", module.profile_key, inputs_hash), tensors)
        payload["options"] = {key: q.desc for key, q in item.params.items()}
        seconds = time.monotonic() - start
        self.records.commit(Record(kind, module.profile_key, inputs_hash, payload, (file,), seconds))
        if module.kind != "head":
            self._checkpoint(kind, inputs_hash)
        return ItemResult(module.profile_key, seconds, detail, payload, tuple(notes))

    def ping(self) -> dict[str, Any]:
        """What this worker is: shown at the start and used by the health check."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        return {"device": name, "threads": torch.get_num_threads()}

    # ---- head --------------------------------------------------------------------------------------------------

    def _head(
        self, block: Block, entry: States, item: QuantizeItem, settings: Settings
    ) -> tuple[list[PackedLinear], dict[str, Any], tuple[str, ...]]:
        """Quantised head, and the perplexity of both models on the first calibration rows."""
        ids = self._rows("quantize")[: self.setup.perplexity_rows]
        if entry.other is None:
            raise NumericError("the head was reached without the states of the perplexity rows")
        own = entry.x[: len(ids)]
        source, quantised = (entry.other, own) if item.propagate == "quantized" else (own, entry.other)
        before = perplexity(block, source, ids)
        key = block.module.linears[0].key
        packed, notes = quantize_head(block, entry.x, item.params[key], settings)
        after = perplexity(block, quantised, ids)
        payload = {"perplexity": _finite(after), "reference_perplexity": _finite(before), "notes": list(notes)}
        return [packed], payload, notes

    # ---- states ------------------------------------------------------------------------------------------------

    def _entry_states(self, kind: str, index: int, hashes: tuple[str, ...], propagate: str) -> States:
        """States at the entry of module ``index``: held, or from the nearest checkpoint, or from the token rows."""
        chain = f"{kind}:{propagate}"
        held = self.states
        self.states = None  # replaced when the item is done: two sets of states need not fit into memory
        if held is None or held.chain != chain or held.index > index:
            held = self._restore(kind, chain, index, hashes)
        while held.index < index:
            held = self._step(held, kind, hashes, propagate)
        return held

    def _restore(self, kind: str, chain: str, index: int, hashes: tuple[str, ...]) -> States:
        for record in sorted(self._checkpoints(kind), key=lambda r: -int(r.payload["index"])):
            at = int(record.payload["index"])
            known = not hashes or record.inputs_hash == hashes[at - 1]
            if at <= index and known and record.payload["chain"] == self._chain_id(chain):
                tensors = get_tensors(self.store, record.files[0].rel, expect=record.files[0])
                other = tensors.get("other")
                return States(chain, at, self._place(tensors["x"]), None if other is None else self._place(other))
        ids = self._rows("measure" if kind == MEASURE else "quantize")
        x = self._place(self._load(self.spec.modules[0]).forward(ids))
        return States(chain, 1, x, None if kind == MEASURE else x[: self.setup.perplexity_rows].clone())

    def _step(self, states: States, kind: str, hashes: tuple[str, ...], propagate: str) -> States:
        """States one module further: of the source through the block as it is, then of the quantised model."""
        module = self.spec.modules[states.index]
        block = self._load(module)
        settings = self._settings(module, states.x)
        quantised_pass = kind != MEASURE
        x, other = states.x, states.other
        if propagate == "reference":
            x = self._advance(block, x, settings)
        elif other is not None:
            other = self._advance(block, other, settings)
        if quantised_pass and module.quantized:
            for key, packed in self.packed(kind, module, hashes[states.index]).items():
                block.set_weight(key, dequantize(packed, self.device))
        if propagate == "quantized":
            x = self._advance(block, x, settings)
        elif other is not None:
            other = self._advance(block, other, settings)
        return States(states.chain, states.index + 1, x, other)

    def _advance(self, block: Block, x: Tensor, settings: Settings) -> Tensor:
        """Output of a block for all rows, where x lives."""
        out: Tensor | None = None
        for part in batches(x.shape[0], settings.batch_rows):
            y = block.forward(x[part].to(self.device))
            check_states(y, f"output of {block.module.profile_key}")
            if out is None:
                out = torch.empty((x.shape[0], *y.shape[1:]), dtype=y.dtype, device=x.device)
            out[part] = y
        if out is None:
            raise NumericError(f"{block.module.profile_key}: no calibration rows")
        return out

    def packed(self, kind: str, module: ModuleSpec, inputs_hash: str) -> dict[str, PackedLinear]:
        """Packed tensors of a quantised module, from its record."""
        record = self.records.find(kind, module.profile_key, inputs_hash)
        if record is None:
            raise NumericError(
                f"{module.profile_key} has no usable record in {kind}",
                "its files were removed or damaged while the job ran; run the same command again",
            )
        tensors = get_tensors(self.store, record.files[0].rel)
        return {x.key: PackedLinear.from_tensors(x.key, tensors.get) for x in module.linears}

    def _checkpoint(self, kind: str, inputs_hash: str) -> None:
        """Saves the states, if enough time has passed since the last time."""
        states = self.states
        if states is None or time.monotonic() - self.saved < self.setup.checkpoint_seconds:
            return
        start = time.monotonic()
        key = f"{STATES}{states.index}"
        tensors = {"x": states.x} if states.other is None else {"x": states.x, "other": states.other}
        file: FileRef = put_tensors(self.store, item_file(kind, "states", key, inputs_hash), tensors)
        payload = {"index": states.index, "chain": self._chain_id(states.chain)}
        older = self._checkpoints(kind)
        self.records.commit(Record(kind, key, inputs_hash, payload, (file,)))
        for record in older:
            if record.payload["chain"] == payload["chain"] and int(record.payload["index"]) < states.index:
                self.records.remove(record)
        # Saving may cost a twentieth of the time at most: slow disks are used less often.
        self.saved = time.monotonic() + max(0.0, 20 * (time.monotonic() - start) - self.setup.checkpoint_seconds)

    def _checkpoints(self, kind: str) -> list[Record]:
        return [r for (key, _), r in self.records.scan(kind).items() if key.startswith(STATES)]

    def _chain_id(self, chain: str) -> str:
        return f"{chain}:{self.setup.calibration_sha256[:16]}"

    # ---- helpers -----------------------------------------------------------------------------------------------

    def _load(self, module: ModuleSpec) -> Block:
        return load_block(self.spec, module, self.source, self.device, self.dtype)

    def _settings(self, module: ModuleSpec, x: Tensor) -> Settings:
        return settings_for(module, x.shape[0], x.shape[1], self.device, self.setup.damping)

    def _rows(self, name: str) -> Tensor:
        return get_tensors(self.store, self.setup.calibration)[name]

    def _place(self, x: Tensor) -> Tensor:
        """States live on the device when they take at most a quarter of its memory, else on the host."""
        if self.device.type == "cuda":
            total = torch.cuda.get_device_properties(self.device).total_memory
            return x.to(self.device) if x.numel() * x.element_size() * 4 <= total else x.cpu()
        return x.clone()


def perplexity(block: Block, x: Tensor, ids: Tensor) -> float:
    """exp of the mean negative log-likelihood of the next token; x (P, T, hidden) normed states, ids (P, T) int64.

    Rows with ids that the head does not know (noise rows) are left out. NaN if no row is left.
    """
    linear: LinearSpec = block.module.linears[0]
    device = block.weights[linear.key].device
    total, count = 0.0, 0
    for r in range(len(ids)):
        row = ids[r]
        if bool((row < 0).any()) or bool((row >= linear.out_features).any()):
            continue
        logits = block.forward(x[r : r + 1].to(device))[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, row[1:].to(device), reduction="sum")
        total, count = total + float(loss), count + len(row) - 1
    return float(torch.tensor(total / count, dtype=torch.float64).exp()) if count else float("nan")


def _finite(value: float) -> float | None:
    """JSON has no NaN: None stands for a perplexity that is not a finite number."""
    return value if value == value and abs(value) != float("inf") else None


def describe(profile: ModuleProfile) -> str:
    """Range of accuracies, for the progress display."""
    accuracies = [o.accuracy for options in profile.slots() for o in options]
    return f"accuracy {min(accuracies):.4f} .. {max(accuracies):.4f}"
