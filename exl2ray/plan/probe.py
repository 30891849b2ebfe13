"""The worst layer and the head, for real: a worker with the model's weights, random states, files in a scratch directory.

What fails here would fail hours into a conversion: memory of the largest module, kernels, the factorisation of the largest
Hessians, writing. What it takes is the basis of a better estimate of the time.
"""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from exl2ray.allocation.planning import option_bits
from exl2ray.beneath import existing_parent
from exl2ray.errors import NumericError, StoreError
from exl2ray.formats.elsewhere import place_of
from exl2ray.formats.layout import QParams
from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.plan.findings import Examination
from exl2ray.plan.times import Timed, kind_of
from exl2ray.quant.qparams import head_option, option_tables
from exl2ray.recipe import Recipe
from exl2ray.store.file_names import CALIBRATION
from exl2ray.store.open import open_store
from exl2ray.store.temporary import abandoned, hold
from exl2ray.store.tensors import put_tensors
from exl2ray.store.versions import versions
from exl2ray.team.messages import Choices, MeasurePass, Pass, ReferencePass, RowSet, WorkerSetup
from exl2ray.team.worker import Worker

GPU_RUNS = 3  # the first compiles kernels, the second records, the third is what all further layers take
CPU_SECONDS = 20.0  # of one timed run on CPUs, by taking fewer rows
SEED = 0
SCRATCH, LOCK = "exl2ray-probe-", ".in-use"  # of the directory, and of the file in it that its process holds


@dataclass(frozen=True)
class Probed:
    """One module in one pass. first_seconds: with compilation and recording. gpu_bytes: most that torch had reserved."""

    timed: Timed
    module: str
    first_seconds: float
    gpu_bytes: int | None


@dataclass(frozen=True)
class ProbeResult:
    """All that was run, each module in each pass."""

    items: tuple[Probed, ...]
    ram_bytes: int  # most that this process had in main memory

    @property
    def timed(self) -> list[Timed]:
        return [p.timed for p in self.items]


def probe(recipe: Recipe, found: Examination, say: Callable[[str], None]) -> ProbeResult:
    """Runs the layer with the most weights, then the head, on this machine's device. ``say`` hears what is going on.

    Raises StoreError, SourceError or NumericError as a conversion would, torch.OutOfMemoryError as it is.
    """
    if found.spec is None or found.source is None or found.device is None:
        raise NumericError("nothing can be probed before the problems above are solved")
    place = Path(tempfile.gettempdir()) if "://" in recipe.out_dir else existing_parent(Path(recipe.out_dir or "."))
    try:
        for folder in abandoned(place, SCRATCH, LOCK):  # of processes that were killed
            shutil.rmtree(folder, ignore_errors=True)
        scratch, held = tempfile.mkdtemp(prefix=SCRATCH, dir=place), ExitStack()
        with suppress(OSError):
            held.callback(os.close, hold(Path(scratch), LOCK))
    except OSError as e:
        raise StoreError(f"{place}: cannot be written: {e.strerror or e}", "name a work directory with -o") from e
    try:
        run = _Run(recipe, found.spec, found.device, scratch, found)
        items = []
        for module in worst_layer(found.spec):
            items += [run.timed(module, "measure", say), run.timed(module, "quantize", say)]
        items.append(run.timed(found.spec.modules[-1], "quantize", say))
        run.worker.release()
        return ProbeResult(tuple(items), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        held.close()


def worst_layer(spec: ModelSpec) -> list[ModuleSpec]:
    """The modules of the layer with most weights; the first of equal ones."""
    layers: dict[int, list[ModuleSpec]] = {}
    for m in spec.modules:
        if m.quantized and m.layer is not None:
            layers.setdefault(m.layer, []).append(m)
    return max(layers.values(), key=lambda ms: sum(m.weights for m in ms))


def options_near(module: ModuleSpec, bits: float, head_bits: int) -> dict[str, QParams]:
    """Linear key -> option of the table rows whose size is nearest to a bitrate; the head's own option."""
    if module.kind == "head":
        return {x.key: head_option(head_bits) for x in module.linears}
    out: dict[str, QParams] = {}
    tables = option_tables({x.role for x in module.linears})
    for table, (sizes, weights) in zip(tables, option_bits(module), strict=True):
        row = table.rows[min(range(len(sizes)), key=lambda i: abs(sizes[i] - bits * weights))]
        out.update({x.key: row[table.roles.index(x.role)] for x in module.linears if x.role in table.roles})
    return out


class _Run:
    def __init__(
        self, recipe: Recipe, spec: ModelSpec, device: torch.device, scratch: str, found: Examination
    ) -> None:
        self.recipe, self.spec, self.device = recipe, spec, device
        self.rows = {name: r.ids for name, r in found.rows.items()}
        store = open_store(scratch)
        file = put_tensors(store, CALIBRATION, self.rows)
        self.worker = Worker(
            WorkerSetup(
                in_dir=place_of(recipe.in_dir), work_root=store.root, device=device.type, rope_scale=recipe.rope_scale,
                rope_alpha=recipe.rope_alpha, damping=recipe.damping, checkpoint_seconds=1e9, calibration=CALIBRATION,
                calibration_sha256=file.sha256, perplexity_rows=1, moe_all_experts=recipe.moe_all_experts,
                rotate=recipe.rotate, threads=torch.get_num_threads(), versions=versions(),
            )
        )  # fmt: skip
        self.runs = 0

    def timed(self, module: ModuleSpec, stage: RowSet, say: Callable[[str], None]) -> Probed:
        """Seconds of a module once everything is warm; on CPUs with as few rows as keep it short."""
        rows, tokens = self.rows[stage].shape
        gpu = self.device.type == "cuda"
        count = rows if gpu else 1
        say(f"probe: {stage} {module.profile_key}, {rows} rows of {tokens} tokens")
        first = last = self._once(module, stage, count)
        if gpu:
            torch.cuda.reset_peak_memory_stats(self.device)
            for _ in range(GPU_RUNS - 1):
                last = self._once(module, stage, count)
        else:
            count = max(1, min(rows, int(CPU_SECONDS / first)))  # a row more never takes more than the first one
            last = self._once(module, stage, count)
        peak = torch.cuda.max_memory_reserved(self.device) if gpu else None
        return Probed(Timed(stage, kind_of(module), module.weights, count, tokens, last), module.profile_key, first, peak)

    def _once(self, module: ModuleSpec, stage: RowSet, count: int) -> float:
        """Enters the module with random states and does its item, files included."""
        states = self._states(count, self.rows[stage].shape[1])
        self.worker.release()
        self.runs += 1
        begin = time.perf_counter()
        self.worker.stand_before(stage, module.index, states)
        for _ in self.worker.run(self._pass(module, stage)):
            pass
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def _pass(self, module: ModuleSpec, stage: RowSet) -> Pass:
        """The one module, under a hash of its own."""
        only, name = (module.index,), f"{self.runs:064x}"
        if stage == "measure":
            return MeasurePass(modules=only, hashes={module.index: name})
        bits = self.recipe.bits[0]
        params = options_near(module, bits, self.recipe.usual_head_bits)
        choices = Choices(bits, params, (name,) * len(self.spec.modules))
        return ReferencePass(modules=only, choices=(choices,), wanted={module.index: (bits,)})

    def _states(self, rows: int, tokens: int) -> torch.Tensor:
        """Random states. One row is drawn, the others are the same with other features: drawing gigabytes takes longer."""
        hyper = self.spec.hyper
        row = torch.randn(tokens, hyper.hidden_size, generator=torch.Generator().manual_seed(SEED))
        x = torch.empty(rows, tokens, hyper.hidden_size, dtype=getattr(torch, hyper.state_dtype))
        for r in range(rows):
            x[r] = row.roll(r, dims=1)
        return x
