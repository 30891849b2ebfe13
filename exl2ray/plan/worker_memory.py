"""Memory of one worker in each pass, from shapes. What a GPU holds at a time depends on its size: see `exl2ray.quant.memory`.

These are estimates of peaks. Against what was measured (docs/log.md): 70B layer on 24 GiB 23.4 GB planned, 23.5 reserved;
Mixtral layer on 20 GiB 21.5 and 19.8; 7B on 7.98 GiB 6.9 and 7.6, main memory 13.3 and 13.6; on CPUs a tenth to a quarter too
much. A GPU too small for a batch is not the end: after running out of memory a module is tried with smaller batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from exl2ray.formats.hf import SourceModel
from exl2ray.formats.tensorfile import DTYPES
from exl2ray.model.spec import ModelSpec, ModuleSpec
from exl2ray.quality import Settings
from exl2ray.quant.memory import (
    CPU_BATCH_TOKENS,
    CPU_KEEP_BYTES,
    CPU_SOLVER_BYTES,
    PARTIAL_SUMS,
    SOLVED_BYTES,
    STATE_SETS,
    candidate_bytes,
    cross_bytes,
    hessian_bytes,
    keep_bytes_within,
    middle_bytes,
    peak_bytes,
    recorded_bytes,
    settings_within,
    states_fit_within,
    sums_on_host_within,
)
from exl2ray.quant.rows import SHARES
from exl2ray.quant.sensitivity import POSITIONS
from exl2ray.team.sensitivity import ROWS as GRADIENT_ROWS
from exl2ray.team.sensitivity import SHARE_ROWS
from exl2ray.team.sensitivity import TOKENS as GRADIENT_TOKENS

RESERVED = 1.1  # of what tensors take: torch's allocator rounds up and keeps what it has, as far as there is room
GPU_BASE_BYTES = 9 << 29  # main memory of a worker on a GPU besides what is counted: Python, torch, CUDA, pinned buffers
CPU_BASE_BYTES = 700 << 20
# Of a linear that was solved result, integers and packing are kept, and the decoded packing is compared with the result in
# float32.
KEPT_BYTES = 4
COMPARED_BYTES = 14
GRADIENT_BYTES = 16  # per number that a forward pass with gradients makes: itself, its gradient, both in float32 for a while
LOGIT_BYTES = 12  # per logit of one calibration row: half precision, float32, its softmax


@dataclass(frozen=True)
class RowSizes:
    """Calibration rows of the two passes: (rows, tokens), and how many rows have their perplexity reported."""

    measure: tuple[int, int]
    quantize: tuple[int, int]
    reported: int


@dataclass(frozen=True)
class Peak:
    """The most that one worker takes in a pass. gpu_bytes: None on CPUs. module: the one that takes it."""

    stage: str  # "measure", "sensitivity", "quantize" or "head"
    module: str
    gpu_bytes: int | None
    ram_bytes: int
    notes: tuple[str, ...] = ()


def peaks(
    spec: ModelSpec, source: SourceModel, rows: RowSizes, gpu_bytes: int | None, damping: float, corrected: bool,
    gradients: bool = False,
) -> list[Peak]:  # fmt: skip
    """Peaks of measuring, quantising and of the head, on a GPU of ``gpu_bytes`` or (None) on CPUs.

    corrected: with targets corrected towards the source model, whose states of all rows go along. gradients: and of the
    backward pass that sensitivities come from.

    On a GPU that has the room, recorded solver batches of earlier modules count too.
    """
    modules = _distinct(m for m in spec.modules if m.quantized)
    head = spec.modules[-1]
    found = [
        _worst(modules, lambda m: _measure(spec, source, m, rows.measure, gpu_bytes, damping)),
        *([_sensitivity(spec, source, rows, gpu_bytes, corrected)] if gradients else []),
        _worst(modules, lambda m: _quantize(spec, source, m, rows, gpu_bytes, damping, corrected)),
        replace(_quantize(spec, source, head, rows, gpu_bytes, damping, corrected), stage="head"),
    ]
    if gpu_bytes is None:
        return found
    recorded = recorded_bytes(modules, gpu_bytes)
    return [replace(p, gpu_bytes=_beside(p.gpu_bytes or 0, recorded, gpu_bytes)) for p in found]


def _beside(needed: int, recorded: int, total: int) -> int:
    """Recordings, and what the allocator keeps, are dropped when memory runs out: they never take more than there is."""
    return max(needed, min(int(RESERVED * (needed + recorded)), total))


def state_bytes(spec: ModelSpec, rows: tuple[int, int]) -> int:
    """Hidden states of a set of rows between two modules."""
    return prod(rows) * spec.hyper.hidden_size * DTYPES["F32" if spec.hyper.state_dtype == "float32" else "F16"].itemsize


def _distinct(modules: Iterable[ModuleSpec]) -> list[ModuleSpec]:
    """One module of every shape."""
    found: dict[object, ModuleSpec] = {}
    for m in modules:
        found.setdefault((m.kind, tuple((x.role, x.in_features, x.out_features) for x in m.linears)), m)
    return list(found.values())


def _worst(modules: Sequence[ModuleSpec], peak: Callable[[ModuleSpec], Peak]) -> Peak:
    """The largest of each figure; module and notes are those of the largest on the GPU."""
    found = [peak(m) for m in modules]
    most = max(found, key=lambda p: (p.gpu_bytes or 0, p.ram_bytes))
    notes = dict.fromkeys(n for p in found for n in p.notes)
    return replace(most, ram_bytes=max(p.ram_bytes for p in found), notes=tuple(notes))


def _measure(
    spec: ModelSpec, source: SourceModel, module: ModuleSpec, rows: tuple[int, int], gpu: int | None, damping: float
) -> Peak:
    states = state_bytes(spec, rows)
    if gpu is None:
        settings = _cpu_settings(rows, damping)
        # CPUs compute in float32: weights and activations take twice what is counted for GPUs
        twice = peak_bytes(module, settings, rows[1], 0)["reference"] - hessian_bytes(module)
        most = max(peak_bytes(module, settings, rows[1], states).values()) + twice
        return Peak("measure", module.profile_key, None, CPU_BASE_BYTES + most + states + _source_bytes(source, module))
    settings = settings_within(module, *rows, gpu, damping)
    fits = states_fit_within(spec.modules, states, rows[1], gpu)
    most = max(peak_bytes(module, settings, rows[1], states if fits else 0).values())
    notes, ram = _kept_on_host(fits, STATE_SETS * states)
    if settings.offload:
        notes.append("candidate weights in main memory")
        ram += candidate_bytes(module)
    return Peak("measure", module.profile_key, most, ram + 2 * _source_bytes(source, module), tuple(notes))


def _sensitivity(spec: ModelSpec, source: SourceModel, rows: RowSizes, gpu: int | None, corrected: bool) -> Peak:
    """float32 states before every module, the weights of the largest one, and what its way back takes."""
    count, tokens = min(GRADIENT_ROWS, rows.measure[0]), min(GRADIENT_TOKENS, rows.measure[1])
    states = 4 * count * tokens * spec.hyper.hidden_size * (len(spec.modules) - 1)
    module = max(spec.modules, key=lambda m: m.weights)
    share = spec.hyper.experts_per_token / spec.hyper.num_experts if module.kind == "moe" else 1.0
    widths = sum(x.in_features + x.out_features for x in module.linears if module.kind != "head")
    back = int(GRADIENT_BYTES * SHARE_ROWS * tokens * (share * widths + 8 * spec.hyper.hidden_size))
    back = max(back, GRADIENT_BYTES * POSITIONS * spec.modules[-1].linears[0].out_features)
    if gpu is None:
        ram = CPU_BASE_BYTES + states + 4 * module.weights + back + _source_bytes(source, module)
        return Peak("sensitivity", module.profile_key, None, ram)
    fits = states_fit_within(spec.modules, states, max(rows.measure[1], rows.quantize[1]), gpu, corrected)
    notes, ram = _kept_on_host(fits, states)
    most = 2 * module.weights + back + (states if fits else 0)
    return Peak("sensitivity", module.profile_key, most, ram + 2 * _source_bytes(source, module), tuple(notes))


def _quantize(
    spec: ModelSpec, source: SourceModel, module: ModuleSpec, rows: RowSizes, gpu: int | None, damping: float,
    corrected: bool,
) -> Peak:
    """A module (or the head) as one worker quantises it on what the quantised modules before it produce."""
    r, tokens = rows.quantize
    states = state_bytes(spec, rows.quantize)
    others = 2 * state_bytes(spec, (min(r, rows.reported), tokens))  # of the source model, before and after the module
    settings = _cpu_settings(rows.quantize, damping) if gpu is None else settings_within(module, r, tokens, gpu, damping)
    hessians = hessian_bytes(module)
    partial = PARTIAL_SUMS * (hessians + (cross_bytes(module) if corrected else 0))
    # In main memory states go as those after the module come, a share at a time; when rows are embedded there are three sets.
    others = states if corrected else others
    held, embedded = 2 * states + states // SHARES + (0 if corrected else others), 3 * states
    forward = 2 * module.weights + hessians + _activations(spec, module, settings, tokens)
    solve = 2 * module.weights + hessians + max(_solving(module, g) for g in {x.input_group for x in module.linears})
    middle = middle_bytes(module, r, tokens, 4 if gpu is None else 2) if corrected else 0
    if gpu is None:
        held += middle if middle <= CPU_KEEP_BYTES else 0
        twice = forward - hessians if module.kind != "head" else 2 * module.weights  # logits are float32 anyway
        most = max(embedded, max(forward + partial, solve) + twice + held)
        ram = CPU_BASE_BYTES + most + _source_bytes(source, module)
        return Peak("quantize", module.profile_key, None, ram)
    fits = states_fit_within(spec.modules, states, tokens, gpu, corrected, measuring=False)
    on_host = partial if sums_on_host_within(module, gpu, corrected) else 0
    notes, ram = _kept_on_host(fits, max(embedded, held + on_host), on_host)
    if on_host:
        notes.append("sums of Hessians in main memory")
        partial = 0
    most = max(forward + partial, solve) + (STATE_SETS * states + others if fits else 0)
    most += middle if middle <= keep_bytes_within(spec.modules, states if fits else 0, tokens, gpu) else 0
    return Peak("quantize", module.profile_key, most, ram + 2 * _source_bytes(source, module), tuple(notes))


def _kept_on_host(fits: bool, with_states: int, without: int = 0) -> tuple[list[str], int]:
    """(notes, main memory) of a GPU worker, from what is there beside it with the states and without."""
    if fits:
        return [], GPU_BASE_BYTES + without
    return ["hidden states in main memory"], GPU_BASE_BYTES + with_states


def _cpu_settings(rows: tuple[int, int], damping: float) -> Settings:
    return Settings(damping, max(1, min(rows[0], CPU_BATCH_TOKENS // rows[1])), CPU_SOLVER_BYTES)


def _activations(spec: ModelSpec, module: ModuleSpec, settings: Settings, tokens: int) -> int:
    """Of one forward: outputs of all linears in half precision, norms and residuals; of the head the logits of one row."""
    if module.kind == "head":
        return LOGIT_BYTES * tokens * module.linears[0].out_features
    share = spec.hyper.experts_per_token / spec.hyper.num_experts if module.kind == "moe" else 1.0
    outputs = sum(2 * x.padded_out for x in module.linears)
    return int(settings.batch_rows * tokens * (share * outputs + 16 * spec.hyper.hidden_size))


def _solving(module: ModuleSpec, group: str) -> int:
    """Factorisation and solution of the linears on one input, then the check of the largest of them."""
    linears = [x for x in module.linears if x.input_group == group]
    k = linears[0].in_features
    weights = [x.padded_weights for x in linears]
    return max(12 * k * k, 4 * k * k + SOLVED_BYTES * sum(weights), COMPARED_BYTES * max(weights) + KEPT_BYTES * sum(weights))


def _source_bytes(source: SourceModel, module: ModuleSpec) -> int:
    """A module's tensors as stored; those of the next one are read meanwhile."""
    names = {x.weight.name for x in module.linears}
    used = 4 * module.weights  # of a fused tensor perhaps only a part
    return min(used, sum(source.nbytes(name) for name in names if name in source))
