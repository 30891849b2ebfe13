"""The whole plan: what a conversion will make, need and take, and everything that would stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import prod
from typing import Any

import torch

from exl2ray.allocation.knapsack import nearest_reachable, reachable_range
from exl2ray.allocation.planning import choose, decoder_bpw, reachable_slots, within_reach
from exl2ray.calibration.data.sources import WRITTEN
from exl2ray.calibration.data.taken import PASSES, described_passes
from exl2ray.errors import BudgetError, Exl2RayError, UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.side_files import side_bytes
from exl2ray.host import usable_memory_bytes
from exl2ray.job_opening import FALLEN_BACK, falls_back
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.disk import DiskNeed
from exl2ray.plan.findings import Examination
from exl2ray.plan.fit import Fit, best_fit, check_fit
from exl2ray.plan.probe import ProbeResult, probe
from exl2ray.plan.problems import examine, row_sizes
from exl2ray.plan.sizes import OutputSize, exact_size, freedom_of, size_range
from exl2ray.plan.times import LOGGED, Timed, Times, estimate, far_below, logged_for
from exl2ray.plan.tuned import of_tuning
from exl2ray.plan.worker_memory import Peak, peaks
from exl2ray.recipe import Recipe, bpw_name
from exl2ray.remote.address import redacted
from exl2ray.remote.source import localised
from exl2ray.result_warnings import unspent_warning
from exl2ray.units import parse_size
from exl2ray.wording import file_size

GIB = 1 << 30
LEAST_MEMORY = 1 << 20
USUAL_GPUS = (24 * GIB, 80 * GIB)  # planned for where this machine has none
LONGEST_DEFAULT_CONTEXT = 32768
PROBED = "a layer and the head timed on this machine just now, files included; the other modules by their weights"
TIMED = (
    "seconds per weight of a 70B layer on one {gpu}, for the default calibration rows (docs/log.md); files and start as in "
    "logged conversions"
)


@dataclass(frozen=True)
class Wishes:
    """What `plan` is asked beside the flags of a conversion. ``gpu_memory``: sizes of GPUs to plan for."""

    fit: str | None = None
    context: int | None = None
    cache: str = "fp16"
    gpu_memory: tuple[str, ...] = ()
    probe: bool = False


@dataclass(frozen=True)
class DeviceMemory:
    """Peaks of the passes on one kind of device. total_bytes: of the GPU, None for CPUs."""

    device: str
    total_bytes: int | None
    peaks: tuple[Peak, ...]


@dataclass
class Report:
    """The answer. What problems leave unknown is None or empty."""

    model: str
    architecture: str | None = None
    layers: int | None = None
    weights: int | None = None  # numbers in all tensors of the source
    source_bytes: int | None = None
    source_files: int | None = None
    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    calibration: list[dict[str, Any]] = field(default_factory=list)  # what -c gave to each pass
    reachable_bpw: tuple[float, float] | None = None
    sizes: list[OutputSize] = field(default_factory=list)
    other_bytes: int | None = None  # tokenizer and other files that are copied
    memory: list[DeviceMemory] = field(default_factory=list)
    main_memory_bytes: int = 0
    disks: list[DiskNeed] = field(default_factory=list)
    disks_not_examined: str | None = None  # why
    times: list[Times] = field(default_factory=list)
    probe: ProbeResult | None = None
    fit: Fit | None = None
    warnings: list[str] = field(default_factory=list)
    problems: list[tuple[str, Exl2RayError]] = field(default_factory=list)


def compose(recipe: Recipe, wishes: Wishes, bits_given: bool, say: Callable[[str], None]) -> Report:
    """Examines model, data and machine. Raises UsageError for flags that make no sense; problems are in the report.

    bits_given: whether the user named bitrates; if not, --fit chooses the one to plan for. ``say`` hears of the probe.
    """
    gpu_sizes = [parse_size(text, "--gpu-memory") for text in wishes.gpu_memory]
    memory = parse_size(wishes.fit, "--fit") if wishes.fit is not None else None
    for flag, size in (*(("--gpu-memory", size) for size in gpu_sizes), ("--fit", memory)):
        if size is not None and size < LEAST_MEMORY:
            raise UsageError(f"{flag}: no GPU has {size} bytes", "as in 24GB (10^9 bytes) or 24GiB (2^30 bytes)")
    if wishes.context is not None and memory is None:
        raise UsageError("--context is a setting of --fit", "name the memory of the card with --fit 24GB")
    try:
        recipe, notes = within_reach(localised(recipe))
    except Exl2RayError as e:
        return Report(redacted(recipe.in_dir), problems=[("source", e)])
    found = examine(recipe)
    report = Report(recipe.in_dir, problems=[(p.topic, p.error) for p in found.problems], warnings=notes)
    if found.spec is not None and falls_back(recipe, found.spec, found.measurement):
        recipe = replace(recipe, allocation="module")
        report.warnings.append(FALLEN_BACK)
    _describe(report, found)
    if found.spec is None or found.source is None or found.has("tensors"):
        return report
    planner = _Planner(report, recipe, found, found.spec, found.source)
    bits = planner.bitrates(memory, wishes, bits_given)
    report.sizes = [planner.size(b) for b in bits]
    report.other_bytes = side_bytes(recipe.in_dir)
    report.disks = found.disks
    if not recipe.out_dir:
        report.disks_not_examined = "the disk of the work directory was not looked at: name it with -o"
    elif not found.disks:
        report.disks_not_examined = "disks were not looked at: problems leave open how much will be written"
    planner.memory(gpu_sizes)
    if wishes.probe and not found.problems:
        planner.probe(say)
    if report.sizes:
        planner.times([b for b in bits if b in recipe.bits or not bits_given])
        report.warnings += _not_estimated(recipe) if report.times else []
        if recipe.tune is not None:
            report.warnings.append(of_tuning(recipe.tune, found.spec, len(recipe.bits), found.device))
    return report


def _describe(report: Report, found: Examination) -> None:
    """Model and rows, as far as they could be read."""
    source, spec = found.source, found.spec
    if source is not None:
        names = source.names()
        report.architecture, report.source_files = source.architecture, len(source.files)
        report.weights = sum(prod(source.shape(n)) for n in names)
        report.source_bytes = sum(source.nbytes(n) for n in names)
    if spec is not None:
        report.layers = spec.hyper.num_layers
        report.warnings += spec.warnings
    report.warnings += [*found.warnings, *found.doubts, *found.notes]
    report.rows = {name: (r.ids.shape[0], r.ids.shape[1]) for name, r in found.rows.items()}
    taken = [(PASSES[name], t) for name, rows in found.rows.items() for t in rows.taken]
    report.calibration = [{"pass": name, **asdict(t)} for name, t in taken]
    report.warnings += described_passes(found.rows)
    report.warnings += sorted({n for rows in found.rows.values() for n in rows.notes})
    for need in found.disks:
        if need.free_bytes is not None and need.least_bytes <= need.free_bytes < need.bytes:
            free, most = file_size(need.free_bytes), file_size(need.bytes)
            report.warnings.append(f"{need.path}: {free} free; with saved hidden states it may need {most}")


def _not_estimated(recipe: Recipe) -> list[str]:
    """What takes time and is not in the estimates, which count the plain algorithm on one device."""
    out = []
    if recipe.allocates == "linear" and recipe.measurement is None:
        out.append("the time leaves out the pass in which --allocation linear measures sensitivities")
    if recipe.tune and any(place.partition(":")[0] == WRITTEN for place in recipe.tuning_text):
        out.append("the time leaves out the text that the source writes for --tune-text self")
    beyond = recipe.numerics.describe()
    if beyond:
        out.append(f"the time is that of the plain algorithm; quantising with {beyond} takes longer")
    if recipe.propagate == "reference":
        out.append("the time does not know that --propagate reference shares a forward between bitrates")
    return out


class _Planner:
    """Fills a report, once model and config are known to fit."""

    def __init__(
        self, report: Report, recipe: Recipe, found: Examination, spec: ModelSpec, source: SourceModel
    ) -> None:
        self.report, self.recipe, self.found, self.spec, self.source = report, recipe, found, spec, source
        self.rows = row_sizes(recipe, found.rows)
        self.shard_bytes = recipe.shard_bytes

    def bitrates(self, memory: int | None, wishes: Wishes, bits_given: bool) -> list[float]:
        """Those asked for that can be reached, and the one that --fit finds."""
        wanted = self.found.overrides
        slots = reachable_slots(self.spec, wanted)
        low, _ = self.report.reachable_bpw = reachable_range(slots)
        bits = [b for b in self.recipe.bits if nearest_reachable(b, slots) == b] if bits_given or memory is None else []
        if memory is None:
            return bits
        longest = self.spec.hyper.max_seq_len
        context = min(longest, LONGEST_DEFAULT_CONTEXT) if wishes.context is None else wishes.context
        freedom = freedom_of(self.recipe, wanted)
        fit = best_fit(self.spec, self.source, memory, context, wishes.cache, freedom, self.shard_bytes)
        self.report.fit = fit
        if context > longest:
            self.report.warnings.append(f"--context {context} is longer than the {longest} positions of the model")
        try:
            check_fit(fit, low)
        except BudgetError as e:
            self.report.problems.append(("fit", e))
        return sorted({*bits, *([] if fit.bits is None else [fit.bits])})

    def size(self, bits: float) -> OutputSize:
        """Exact with a measurement, else between bounds."""
        recipe, spec, measurement, wanted = self.recipe, self.spec, self.found.measurement, self.found.overrides
        if measurement is None:
            return size_range(spec, self.source, bits, freedom_of(recipe, wanted), self.shard_bytes)
        chosen = choose(spec, measurement, bits, recipe, wanted)
        achieved = decoder_bpw(spec, chosen.params)
        self.report.warnings += unspent_warning(bits, achieved, chosen.allocation.unspent, bool(wanted))
        return exact_size(spec, self.source, bits, chosen.params, self.shard_bytes)

    def memory(self, gpu_sizes: Sequence[int]) -> None:
        devices: list[tuple[str, int | None]] = [(_gpu_name(size), size) for size in gpu_sizes]
        if not devices and self.recipe.device != "cpu":
            devices += this_machines_gpus() or [(_gpu_name(size), size) for size in USUAL_GPUS]
        if self.found.device is not None and self.found.device.type == "cpu":
            devices.append(("CPU", None))
        self.report.main_memory_bytes = usable_memory_bytes()
        corrected = self.recipe.numerics.target_correction > 0
        gradients = self.recipe.allocates == "linear" and self.recipe.measurement is None
        for name, total in devices:
            found = peaks(self.spec, self.source, self.rows, total, self.recipe.damping, corrected, gradients)
            device = DeviceMemory(name, total, tuple(found))
            self.report.memory.append(device)
            self.report.warnings += _too_much(device, self.report.main_memory_bytes)

    def probe(self, say: Callable[[str], None]) -> None:
        try:
            self.report.probe = probe(self.recipe, self.found, say)
        except torch.OutOfMemoryError as e:
            first = str(e).splitlines()[0]
            self.report.warnings.append(f"the probe ran out of GPU memory ({first}); a conversion would use smaller batches")
        except Exl2RayError as e:
            self.report.problems.append(("probe", e))

    def times(self, bits: Sequence[float]) -> None:
        names = [] if self.recipe.output_measurement is not None else [bpw_name(b) for b in bits]
        measure, ray = self.recipe.measurement is None, self.recipe.executor == "ray" or bool(self.recipe.ray_address)
        written = sum(s.high_bytes for s in self.report.sizes if s.bits in bits)

        def add(device: str, basis: str, timed: Sequence[Timed], whole: bool) -> None:
            found = estimate(self.spec, self.rows, names, measure, timed, device, basis, whole, written, ray)
            self.report.times.append(found)

        if self.report.probe is not None:
            device = self.found.device
            name = torch.cuda.get_device_name(device) if device is not None and device.type == "cuda" else "CPU"
            add(name, PROBED, self.report.probe.timed, True)
            return
        if self.recipe.device == "cpu":
            return  # no rates of CPUs are known
        gpus = this_machines_gpus()
        here = [g for g in (logged_for(name) for name, _ in gpus) if g is not None]
        for gpu in dict.fromkeys(here if gpus else LOGGED):  # where there is no GPU: for those who will use another machine
            add(gpu, TIMED.format(gpu=gpu), LOGGED[gpu], False)
            if far_below(self.spec):
                text = f"layers of this model are far smaller than those that were timed on {gpu}: the time is too low"
                self.report.warnings.append(text)


def _gpu_name(size: int) -> str:
    return f"GPU of {size / GIB:.4g} GiB"


def _too_much(device: DeviceMemory, main_memory: int) -> list[str]:
    """Warnings where a device may not have what a pass takes."""
    out = []
    for p in device.peaks:
        if device.total_bytes is not None and p.gpu_bytes is not None and p.gpu_bytes > device.total_bytes:
            need = f"{device.device}: {p.stage} of {p.module} may need {file_size(p.gpu_bytes)}"
            out.append(f"{need}; a module that runs out of memory is tried once more with smaller batches")
    most = max(p.ram_bytes for p in device.peaks)
    if device.total_bytes is None and most > main_memory:
        out.append(f"main memory: a CPU worker may need {file_size(most)}, there are {file_size(main_memory)}")
    return out


def this_machines_gpus() -> list[tuple[str, int | None]]:
    """(name, bytes) of each kind of GPU that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return list(dict.fromkeys((str(p.name), int(p.total_memory)) for p in found))
