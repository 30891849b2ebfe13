"""Everything that would stop a conversion and can be known before it starts: `plan` lists it all, `convert` refuses to start.

Each check stands alone, so that one problem does not hide the next; only what cannot be looked at without the failed one is
left out (no tokenizer, no calibration rows).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from exl2ray.allocation.knapsack import check_reachable
from exl2ray.allocation.overrides import Override, parse_overrides
from exl2ray.allocation.planning import reachable_slots
from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.rows import ROW_CATEGORIES, Rows, RowSet
from exl2ray.calibration.tokenizer import ModelTokenizer, load_tokenizer
from exl2ray.datasets import check_tuning_text, pass_rows, reported_rows, sources_of
from exl2ray.devices import check_shared_memory, idle_gpu, pick_device, pick_executor
from exl2ray.environment import slow_variables
from exl2ray.errors import CalibrationError, Exl2RayError, SourceError, UsageError
from exl2ray.evaluate.tokens import load_tokens
from exl2ray.formats.elsewhere import mount_at
from exl2ray.formats.hf import SourceModel, weight_files
from exl2ray.formats.hfconfig import config_value, read_config
from exl2ray.formats.links import link_error, outside_links
from exl2ray.formats.origin import origin_findings, rope_flags
from exl2ray.formats.shards import refuse_same_directory
from exl2ray.formats.side_files import broken_side_files, examine_side_files
from exl2ray.formats.source.folder import Folder
from exl2ray.formats.source.kinds import refusal
from exl2ray.formats.tensorfile import MAX_TENSORS, TensorFile
from exl2ray.job_opening import check_measurement_target, check_opening, few_scores
from exl2ray.model.arch import load_spec
from exl2ray.model.rotated import rotated
from exl2ray.model.spec import ModelSpec
from exl2ray.output.targets import check_output, check_place
from exl2ray.plan.disk import check_disks, disk_needs
from exl2ray.plan.doubts import calibration_doubts, model_doubts, tokenizer_doubts
from exl2ray.plan.findings import Examination
from exl2ray.plan.flat import flat_warnings
from exl2ray.plan.measured import measured
from exl2ray.plan.scan import scan_values, stored_names
from exl2ray.plan.sizes import OutputSize, freedom_of, size_range
from exl2ray.plan.worker_memory import RowSizes
from exl2ray.recipe import Recipe
from exl2ray.store.open import local_path
from exl2ray.store.workdir import WorkDir
from exl2ray.terminal.pasted import missing_folder
from exl2ray.timeline import step
from exl2ray.tune.memory import check_memory
from exl2ray.wording import some

BUILTIN_ROWS = tuple(sum(getattr(s, row_set) for s in ROW_CATEGORIES) for row_set in ("measure", "quantize"))
UNKNOWN_TENSORS = 4096  # whose values are looked at in a model of which no architecture is known


def examine(recipe: Recipe) -> Examination:
    """All checks, in seconds; raises nothing that is a problem of model, data, flags or disks."""
    found = Examination()
    with step("checks: headers"):
        _examine_source(found, recipe)
        _examine_side_files(found, recipe)
    with ThreadPoolExecutor(1, "samples") as beside:
        try:
            _examine_all(found, recipe, _begin_samples(found, recipe, beside))
        except BaseException:  # of a stop, say, which waits for what has begun
            beside.shutdown(wait=False, cancel_futures=True)
            raise
    return found


def _examine_all(found: Examination, recipe: Recipe, samples: Samples) -> None:
    """All that comes after a first look at the model."""
    with step("checks: device"):
        device = found.device = found.attempt("device", lambda: pick_device(recipe))
    idle = None if device is None else idle_gpu(device, recipe)
    found.warnings += [*slow_variables().values(), *([] if idle is None else [idle]), *_without_effect(recipe)]
    _examine_directories(found, recipe)
    spec, source = found.spec, found.source
    if spec is not None and recipe.output_measurement is None and not found.has("tensors"):  # else linears have no options
        found.overrides = found.attempt("--set", lambda: parse_overrides(recipe.overrides, spec)) or ()
        tables = reachable_slots(spec, found.overrides)
        for bits in recipe.bits:
            found.attempt("bitrate", lambda b=bits: check_reachable(b, tables))  # type: ignore[misc]
    if recipe.measurement is not None:
        found.measurement = found.attempt("measurement", lambda: measured(recipe, spec))
    with step("checks: rows of tokens"):
        _examine_calibration(found, recipe)
    if source is not None and spec is not None and len(found.rows) == 2 and not found.has("work directory", "measurement"):
        given, rows, data = found.measurement, found.rows, found.data
        found.attempt("work directory", lambda: check_opening(recipe, source, spec, given, rows, data))
    found.add("values", samples.values())
    with step("checks: soundness"):
        _examine_soundness(found, recipe, samples)
    if not found.has("tensors", "bitrate"):  # without these, sizes are not known
        with step("checks: room on disks"):
            _examine_disks(found, recipe)
    if device is not None and spec is not None and recipe.tune is not None:
        found.attempt("--tune", lambda: check_memory(spec, device, f"--tune {recipe.tune}"))
    if device is not None:
        found.attempt("shared memory", lambda: _check_shared_memory(recipe, device))


@dataclass(frozen=True)
class Samples:
    """What samples of the weights say, when it is asked for: as `scan_values` and `flat_warnings`."""

    values: Callable[[], list[SourceError]]
    flat: Callable[[], list[str]]


def _begin_samples(found: Examination, recipe: Recipe, beside: Executor) -> Samples:
    """Begins to look at a model on this disk: samples wait for the disk, rows of tokens for another process. One that lies
    elsewhere is looked at when it is asked for: that may take long, and a stop would have to wait for it.
    """
    source, spec = found.source, found.spec
    if source is None:
        return Samples(list, list)
    values = partial(_values, source, spec, recipe.seed)
    flat = list[str] if spec is None else partial(_flat, source, spec, recipe.seed)
    if mount_at(source.path) is not None:
        return Samples(values, flat)
    return Samples(beside.submit(values).result, beside.submit(flat).result)


def _values(source: SourceModel, spec: ModelSpec | None, seed: int) -> list[SourceError]:
    names = source.names()[:UNKNOWN_TENSORS] if spec is None else stored_names(spec)
    with step("checks: samples of weights"):
        return scan_values(source, names, seed)


def _flat(source: SourceModel, spec: ModelSpec, seed: int) -> list[str]:
    with step("checks: empty weights"):
        return flat_warnings(source, spec, seed)


def _examine_soundness(found: Examination, recipe: Recipe, samples: Samples) -> None:
    """What makes the result doubtful; looked at where the files can be read."""
    spec, source = found.spec, found.source
    found.doubts += calibration_doubts(found.rows)
    if spec is None or source is None or found.has("tensors", "values"):
        return
    found.doubts += samples.flat()
    found.doubts += model_doubts(source, spec, found.rows)
    if found.measurement is not None:
        warnings, notes = origin_findings(found.measurement, source, rope_flags(recipe.rope_scale, recipe.rope_alpha))
        found.doubts, found.notes = found.doubts + warnings, found.notes + notes
    if not found.has("measurement", "work directory"):
        given, rows = found.measurement, found.rows
        found.doubts += found.attempt("work directory", lambda: few_scores(recipe, spec, given, rows)) or []


def row_sizes(recipe: Recipe, rows: dict[str, Rows]) -> RowSizes:
    """Sizes of the calibration rows; where there are none, as the recipe asks for them."""
    given = recipe.cal_dataset is not None
    sizes = {
        "measure": (recipe.measurement_rows if given else BUILTIN_ROWS[0], recipe.measurement_length),
        "quantize": (recipe.dataset_rows if given else BUILTIN_ROWS[1], recipe.length),
        **{name: (r.ids.shape[0], r.ids.shape[1]) for name, r in rows.items()},
    }
    return RowSizes(sizes["measure"], sizes["quantize"], reported_rows(recipe))


def size_ranges(
    recipe: Recipe, spec: ModelSpec, source: SourceModel, overrides: Sequence[Override]
) -> list[OutputSize]:
    """Bytes of the output at each bitrate, from headers."""
    freedom = freedom_of(recipe, overrides)
    return [size_range(spec, source, b, freedom, recipe.shard_bytes) for b in recipe.bits]


# ---- the model --------------------------------------------------------------------------------------------------------


def _examine_source(found: Examination, recipe: Recipe) -> None:
    if not os.path.exists(recipe.in_dir):
        found.add("source", [missing_folder(recipe.in_dir)])
        return
    try:
        source = found.source = SourceModel(recipe.in_dir)
    except SourceError as e:
        found.add("source", _broken_files(Path(recipe.in_dir)) or [e])
        return
    misfits: list[SourceError] = []
    spec = found.spec = found.attempt(
        "architecture", lambda: load_spec(source, recipe.rope_scale, recipe.rope_alpha, misfits)
    )
    if spec is not None and recipe.rotate and not misfits:
        found.spec = found.attempt("--rotate", lambda: rotated(spec)) or spec
    found.add("tensors", misfits)


def _examine_side_files(found: Examination, recipe: Recipe) -> None:
    """Files that would be copied into the output: their sizes and kinds. Links out of the model's folder: refused where
    content would be copied, a warning for weights."""
    source = found.source
    if source is None:
        return
    beside = examine_side_files(source.path)
    found.add("source", beside.refused)
    found.warnings += beside.warnings
    if not beside.refused:
        found.warnings += broken_side_files(source.path)
    if recipe.compile_full is not None:
        copied = outside_links(source.path, ["config.json", *beside.sizes])
        found.add("source", [link_error(source.path, name, real) for name, real in copied.items()])
    weights = outside_links(source.path, source.files)
    if weights:
        links = some([f"{name} to {real}" for name, real in weights.items()], 1)
        found.warnings.append(f"weights are links out of the model's folder: {links}")


def _broken_files(directory: Path) -> list[Exl2RayError]:
    """Every file of a model directory that cannot be read; nothing if each of them can."""
    folder, refused = Folder(directory), refusal(directory)
    errors: list[Exl2RayError] = [] if refused is None else [refused]
    pointers = {n for n in folder.files if folder.is_lfs_pointer(n)}
    if refused is not None and not pointers:  # not a model of this kind at all
        return errors
    checks: list[Callable[[], Any]] = [lambda: read_config(directory / "config.json", strict=False)]
    tensors = 0
    try:
        checks += [lambda f=f: TensorFile(f) for f in weight_files(directory) if f.name not in pointers]  # type: ignore[misc]
    except SourceError as e:
        errors.append(e)
    for check in checks:
        try:
            tensors += len(getattr(check(), "tensors", ()))
        except SourceError as e:
            errors.append(e)
        if tensors > MAX_TENSORS:  # what was found before is told; more would take minutes
            break
    return errors


def _vocabulary(found: Examination) -> int | None:
    """Rows of the model's embedding, also for an architecture that is not known."""
    if found.spec is not None:
        return found.spec.hyper.vocab_size
    size = None if found.source is None else config_value(found.source.config, "vocab_size")
    return size if type(size) is int else None


# ---- tokens -----------------------------------------------------------------------------------------------------------


def _examine_calibration(found: Examination, recipe: Recipe) -> None:
    vocabulary = _vocabulary(found)
    if found.source is None or vocabulary is None:
        return
    config = found.source.config
    tokenizer = found.attempt("tokenizer", lambda: load_tokenizer(recipe.in_dir, config, vocabulary))
    found.tokenizer = tokenizer
    if tokenizer is None:
        return
    found.warnings += tokenizer.warnings
    with tokenizer:  # its process takes some hundred MB
        found.doubts += found.attempt("tokenizer", lambda: tokenizer_doubts(tokenizer)) or []
        sources = found.attempt("calibration", lambda: sources_of(recipe))
        if sources is None:
            return
        found.data = tuple(source.given for source in sources)
        with CalibrationData(sources, tokenizer, recipe.chat_rows, recipe.most_tokens) as data:
            for name in get_args(RowSet):
                rows = found.attempt("calibration", partial(pass_rows, recipe, name, tokenizer, vocabulary, found.spec, data))
                if rows is not None:
                    found.rows[name] = rows
        spec = found.spec
        if recipe.tune is not None and spec is not None and not found.has("calibration"):
            found.attempt("--tune", lambda: check_tuning_text(recipe, spec, tokenizer))
        if recipe.eval_text is not None and recipe.evaluates:
            found.attempt("--eval-text", lambda: _check_eval_text(recipe.eval_text or "", tokenizer))


def _without_effect(recipe: Recipe) -> list[str]:
    """Warnings of what was asked for and does nothing, beside the rest of what was."""
    out = []
    asked = {"-r": (recipe.dataset_rows, Recipe.dataset_rows), "-mr": (recipe.measurement_rows, Recipe.measurement_rows)}
    rows = [f"{flag} {count}" for flag, (count, usual) in asked.items() if count != usual]
    if rows and recipe.cal_dataset is None:
        own = f"{BUILTIN_ROWS[1]} to quantise on and {BUILTIN_ROWS[0]} to measure on"
        out.append(f"{', '.join(rows)}: for the data of -c; the built-in text has rows of its own, {own}")
    if recipe.evaluates or recipe.output_measurement is not None:
        return out
    if recipe.evaluate == "always":
        out.append("--evaluate always: nothing is evaluated, since no complete model is asked for: give -cf FOLDER")
    elif recipe.evaluate == "auto" and recipe.eval_text is not None:
        least = "with -cf and several -b, or with --evaluate always" if recipe.compile_full else "with -cf"
        out.append(f"--eval-text: nothing is evaluated; models are {least}")
    return out


def _check_eval_text(path: str, tokenizer: ModelTokenizer) -> None:
    try:
        load_tokens(path, tokenizer, rows=1)
    except (CalibrationError, UsageError) as e:
        hint = "a text, Parquet or .jsonl file, or a .npy array of token ids, of 2048 tokens or more"
        raise type(e)(f"--eval-text {e.message.removeprefix('-c ')}", hint) from e


# ---- directories and machine ------------------------------------------------------------------------------------------


def _examine_directories(found: Examination, recipe: Recipe) -> None:
    found.attempt("output", lambda: _check_apart(recipe))
    for bits in recipe.bits:
        directory = recipe.output_dir(bits)
        if directory is not None:
            found.attempt("output", lambda d=directory: _check_target(recipe, d, found.source))  # type: ignore[misc]
    wanted = recipe.output_measurement
    if wanted is not None:
        found.attempt("output", lambda: check_measurement_target(wanted, recipe.out_dir))
    found.attempt("work directory", lambda: _check_work(recipe))


def _check_apart(recipe: Recipe) -> None:
    """UsageError for two bitrates whose directories are one, by links or by another way to write its name."""
    known: dict[str, str] = {}
    for directory in (recipe.output_dir(bits) for bits in recipe.bits):
        if directory is not None:
            other = known.setdefault(os.path.realpath(directory), directory)
            if other != directory:
                raise UsageError(f"-cf {other} and {directory} are one directory", "name another with -cf, with {bpw} in it")


def _check_target(recipe: Recipe, directory: str, source: SourceModel | None) -> None:
    refuse_same_directory(recipe.in_dir, directory)
    check_output(recipe, Path(directory), source)


def _check_work(recipe: Recipe) -> None:
    """A directory of ours, or one that can be made. What an existing job says: ``check_opening``."""
    if "://" in recipe.out_dir:
        local_path(recipe.out_dir)
        if recipe.compile_full is None and recipe.output_measurement is None:
            raise UsageError("-cf is needed when the work directory is not a local path", "give -cf DIR")
        return
    if not recipe.out_dir:  # `plan` without -o
        return
    if os.path.realpath(recipe.in_dir) == os.path.realpath(recipe.out_dir):
        raise UsageError(f"{recipe.out_dir}: the work directory (-o) is the source model (-i)", "choose another directory")
    check_place("-o", recipe.out_dir, Path(recipe.out_dir))
    if recipe.no_resume:
        WorkDir.check_opening(recipe.out_dir, {}, resume=False)
    else:
        WorkDir.read_job(recipe.out_dir)


def _examine_disks(found: Examination, recipe: Recipe) -> None:
    spec, source = found.spec, found.source
    if spec is None or source is None:
        return
    sizes = size_ranges(recipe, spec, source, found.overrides)
    found.disks = disk_needs(recipe, spec, sizes, row_sizes(recipe, found.rows))
    found.add("disk", check_disks(found.disks))


def _check_shared_memory(recipe: Recipe, device: torch.device) -> None:
    """Several GPUs of one machine talk through /dev/shm; a cluster's machines are looked at by their own workers."""
    gpus = recipe.gpus or (torch.cuda.device_count() if device.type == "cuda" else 0)
    if recipe.cluster is None and device.type == "cuda" and gpus > 1 and pick_executor(recipe, device) == "ray":
        check_shared_memory(gpus)
