"""One model on one device: blocks, forward passes over calibration rows, packed modules read back from their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from exl2ray.errors import StoreError
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import QParams
from exl2ray.formats.readahead import TensorReader
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import Block, check_states, load_block
from exl2ray.model.rotated import rotated
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec
from exl2ray.model.weights import read_ahead, whole_tensors
from exl2ray.quality import Settings
from exl2ray.quant import block as quant
from exl2ray.quant.memory import keep_bytes, room_for_contexts, settings_for, states_fit, sums_on_host
from exl2ray.quant.pack import dequantize
from exl2ray.quant.rows import forward_rows, shared_batches
from exl2ray.remote.source import local
from exl2ray.store.open import open_store
from exl2ray.store.records import Record, Records
from exl2ray.store.tensors import get_tensors
from exl2ray.team.messages import RowSet, WorkerSetup
from exl2ray.team.packed_files import Writers


class Runner:
    """What all items need. Modules are read when they are used and not kept."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        self.device = torch.device(setup.device)
        self.dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        self.store = open_store(setup.work_root)
        self.records = Records(self.store)
        self.source = SourceModel(local(setup.in_dir, setup.work_root, cache_bytes=setup.source_cache))
        self.ahead = read_ahead(self.source, pin=self.device.type == "cuda")
        spec = load_spec(self.source, setup.rope_scale, setup.rope_alpha)
        self.spec: ModelSpec = rotated(spec) if setup.rotate else spec
        self._rows: dict[str, Tensor] = {}
        self._homes: dict[tuple[int, RowSet], torch.device] = {}
        self.writers = Writers(self.store, self.device)
        self.expect_the_first()
        self.shrink: Mapping[str, int] = {}  # of batches, for items that ran out of memory
        self.in_hand = ""  # the item whose entry in ``shrink`` counts
        self.crowded = False  # the GPU ran out of memory once: states stay on the host from then on

    def load(self, module: ModuleSpec, state_dtype: torch.dtype | None = None) -> Block:
        """The module with its source weights; ``state_dtype`` in place of the family's own. Those of the next two are read in
        the background meanwhile: most items follow the order of the model, and pass through a module or more on the way to
        their own."""
        block = load_block(self.spec, module, self.ahead, self.device, self.dtype, state_dtype)
        self.fetch(self.spec.modules[module.index + 1 : module.index + 3])
        return block

    def load_for_gradients(self, module: ModuleSpec, coming: Sequence[ModuleSpec]) -> Block:
        """The module for a forward or backward pass with gradients; the weights of ``coming`` are read in the background.

        States are float32. On a GPU the linears are bfloat16: gradients leave the range of float16.
        """
        dtype = torch.bfloat16 if self.device.type == "cuda" else self.dtype
        block = load_block(self.spec, module, self.ahead, self.device, dtype, torch.float32)
        self.fetch(coming)
        return block

    def load_from(self, source: TensorReader, module: ModuleSpec) -> Block:
        """The module with its source weights, as ``source`` reads them."""
        return load_block(self.spec, module, source, self.device, self.dtype)

    def expect(self, index: int, count: int = 3) -> None:
        """Starts to read ``count`` modules from here on in the background."""
        self.fetch(self.spec.modules[index : index + count])

    def expect_the_first(self) -> None:
        """Starts to read what a pass begins with; members of a group share the embedding out."""
        self.expect(0 if self.setup.alone or self.device.type == "cpu" else 1)

    def fetch(self, modules: Sequence[ModuleSpec]) -> None:
        """Starts to read the weights of these modules in the background; those of others are dropped."""
        self.ahead.fetch([name for m in modules for name in whole_tensors(m)])

    def load_quantized(self, module: ModuleSpec, packed: dict[str, PackedLinear]) -> Block:
        """The module with the weights that its packed tensors decode to; its source weights are not read."""

        def read(spec: ModelSpec, linear: LinearSpec, source: SourceModel) -> tuple[Tensor, Tensor | None]:
            p = packed[linear.key]
            return dequantize(p, self.device), p.bias

        return load_block(self.spec, module, self.source, self.device, self.dtype, read=read)

    def settings(self, module: ModuleSpec, rows: int, tokens: int) -> Settings:
        """How to run a module on so many calibration rows at most, from shapes alone; smaller batches after running out of
        memory."""
        shrink, numerics = self.shrink.get(self.in_hand, 1), self.setup.numerics
        s = replace(
            settings_for(module, rows, tokens, self.device, self.setup.damping),
            sums_on_host=sums_on_host(module, self.device, numerics.target_correction > 0),
            all_experts=self.setup.moe_all_experts,
            score_rows=self.setup.score_rows,
            numerics=numerics,
        )
        if shrink == 1:
            return replace(s, keep_bytes=self._keep_bytes)
        if not self.crowded:
            self.crowded = True
            self._homes.clear()
        return replace(
            s,
            batch_rows=max(1, s.batch_rows // shrink),
            budget_bytes=None if s.budget_bytes is None else s.budget_bytes // shrink,
            expert_tokens=None if s.expert_tokens is None else max(1, s.expert_tokens // shrink),
            offload=self.device.type == "cuda",
            ahead=False,
        )

    @cached_property
    def _keep_bytes(self) -> int:
        if not self.setup.numerics.target_correction > 0:
            return 0
        states = self.state_bytes("quantize")
        beside = states if self.home(states, "quantize").type == self.device.type else 0
        return keep_bytes(self.spec.modules, beside, self._longest, self.device)

    def rows(self, name: str) -> Tensor:
        """Token ids (R, T) int64 of a set of calibration rows."""
        if not self._rows:
            self._rows = {k: t.clone() for k, t in get_tensors(self.store, self.setup.calibration).items()}
        return self._rows[name]

    def embedded(self, name: RowSet, block: Block | None = None) -> Tensor:
        """States (R, T, hidden) at the entry of module 1. All rows at once: noise rows need the others' statistics.

        block: module 0, if it has been read.
        """
        return self.place((block or self.load(self.spec.modules[0])).forward(self.rows(name)), name)

    def home(self, nbytes: int, rows: RowSet = "measure") -> torch.device:
        """Where states of this size are kept, of rows that are measured or quantised on: on the device if every module has
        room beside them, else on the host."""
        key = nbytes, rows
        if key not in self._homes:
            corrected = self.setup.numerics.target_correction > 0
            fits = not self.crowded and states_fit(
                self.spec.modules, nbytes, self._longest, self.device, corrected, measuring=rows == "measure"
            )
            self._homes[key] = self.device if fits else torch.device("cpu")
        return self._homes[key]

    @property
    def _longest(self) -> int:
        """Tokens of the longest calibration row."""
        return max(self.rows(name).shape[1] for name in ("measure", "quantize"))

    def room(self, nbytes: int, rows: RowSet = "measure") -> int:
        """Bytes for what can be done without, beside states of ``nbytes``."""
        if self.home(nbytes, rows).type != self.device.type:
            return 0
        return room_for_contexts(self.spec.modules, nbytes, self._longest, self.device, rows == "measure")

    def state_bytes(self, name: str) -> int:
        """Of a set of calibration rows between two modules."""
        hyper = self.spec.hyper
        return self.rows(name).numel() * hyper.hidden_size * int(getattr(torch, hyper.state_dtype).itemsize)

    def place(self, x: Tensor, rows: RowSet) -> Tensor:
        """States where they are kept; on a CPU a copy."""
        return x.clone() if self.device.type == "cpu" else x.to(self.home(x.numel() * x.element_size(), rows))

    def advance(self, block: Block, x: Tensor, shared: bool = False) -> Tensor:
        """Output of a block for rows x (R, T, hidden), where they live. shared: x is a whole set of rows, and they shall
        have the same bits as if they were spread over workers."""
        settings = self.settings(block.module, len(x), x.shape[1])
        slices = shared_batches(len(x), settings.batch_rows) if shared else None
        return forward_rows(block, x, settings, check_states, self.device, slices)

    def packed(self, kind: str, module: ModuleSpec, inputs_hash: str, deep: bool = True) -> dict[str, PackedLinear]:
        """Packed tensors of a quantised module, from its record; StoreError if that is gone. ``deep``: hashes the files."""
        record = self.records.required(kind, module.profile_key, inputs_hash)
        try:
            tensors = self._tensors(record, deep)
        except StoreError:
            # Its files may have gone into shards a moment ago.
            now = self.records.required(kind, module.profile_key, inputs_hash)
            if now.files == record.files:
                raise
            tensors = self._tensors(now, deep)
        return {x.key: PackedLinear.from_tensors(x.key, tensors.get) for x in module.linears}

    def _tensors(self, record: Record, deep: bool) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for file in record.files:
            out.update(get_tensors(self.store, file.rel, expect=file, deep=deep))
        return out


def perplexity_sums(block: quant.Block, x: Tensor, ids: Tensor) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of the next token, and their number; x (P, T, hidden) normed, ids (P, T) int64.

    Rows with ids that the head does not know (noise rows) are left out.
    """
    linear = block.module.linears[0]
    device = block.weights[linear.key].device
    total, count = 0.0, 0
    for r in range(len(ids)):
        row = ids[r]
        if bool((row < 0).any()) or bool((row >= linear.out_features).any()):
            continue
        logits = block.forward(x[r : r + 1].to(device))[0, :-1].float()
        loss = torch.nn.functional.cross_entropy(logits, row[1:].to(device), reduction="sum")
        total, count = total + float(loss), count + len(row) - 1
    return total, count


def perplexity_of(sums: list[tuple[float, int]]) -> float | None:
    """exp of the mean over all sums, added in order; None (JSON has no NaN) if it is not a finite number."""
    total, count = 0.0, 0
    for t, c in sums:
        total, count = total + t, count + c
    if not count:
        return None
    value = float(torch.tensor(total / count, dtype=torch.float64).exp())
    return value if value == value and abs(value) != float("inf") else None


def option_names(params: Mapping[str, QParams]) -> dict[str, str]:
    """Linear key -> description of its option, for records."""
    return {key: q.desc for key, q in params.items()}
