"""The story of a conversion, on one screen.

    calibrate   tokens of the calibration rows                       exl2ray.calibration
    measure     every module: cost and error of each option          exl2ray.team.source_passes -> exl2ray.quant.module
    allocate    one option per module within the budget              exl2ray.allocation.knapsack
    quantise    module by module, on what the quantised ones produce  exl2ray.team.chain -> exl2ray.quant.module
    write       shards, tokenizer, config.json                       exl2ray.formats.shards
    tune        with --tune: integers and norms on the end loss      exl2ray.steps.tuning -> exl2ray.tune.run

Each step leaves its result in the work directory (exl2ray.store) before it counts as done; a step that finds its result
there does nothing. Kill the process at any time, run the same command again, and the same bytes come out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.beforehand import begin_device, begin_workers, end_workers
from exl2ray.errors import Interrupted, UsageError
from exl2ray.events import OutputSummary, Reporter, Summary
from exl2ray.recipe import Recipe
from exl2ray.stopping import interruptible
from exl2ray.team.messages import DeviceFailed
from exl2ray.terminal.console import places_text
from exl2ray.timeline import step

if TYPE_CHECKING:
    from exl2ray.steps.job import Job


def convert(recipe: Recipe, reporter: Reporter) -> Summary:
    """Runs or resumes a conversion. Raises Exl2RayError; KeyboardInterrupt becomes Interrupted with a hint to resume.

    A CUDA error costs a process its GPU. Under ``--executor auto`` the conversion then goes on in worker processes, from
    what is in the work directory.
    """
    start = time.monotonic()
    with step("python, command line", 0.0):
        _warn_of_others(recipe, reporter)
    try:
        return _convert(recipe, reporter, start)
    except DeviceFailed as e:
        if recipe.executor != "auto":
            raise
        reporter.event("warning", message=f"{e.message}; going on in another process")
        return _convert(replace(recipe, executor="ray", no_resume=False), reporter, start)


def _convert(recipe: Recipe, reporter: Reporter, start: float) -> Summary:
    try:
        begin_workers(recipe)
        return _converted(recipe, reporter, start)
    finally:
        end_workers()  # of a job that was refused, or needed none


def _converted(recipe: Recipe, reporter: Reporter, start: float) -> Summary:
    begin_device(recipe)
    with step("import exl2ray"):
        from exl2ray.steps import evaluating, tuning
        from exl2ray.steps.allocating import allocate
        from exl2ray.steps.job import Job
        from exl2ray.steps.measuring import export_measurement, measure
        from exl2ray.steps.producing import produce

    recipe, begun = _in_reach(recipe, reporter), False
    try:
        with interruptible(), Job(recipe, reporter) as job:
            begun = True
            job.lock_targets()
            measurement = measure(job)
            if recipe.output_measurement is not None:
                path = export_measurement(job, measurement)
                return Summary((), path, time.monotonic() - start, tuple(job.warnings.all(())))
            plans = [allocate(job, measurement, bits) for bits in recipe.bits]
            outputs = produce(job, plans, compile_full=tuning.place_of_solved(recipe))
            job.let_go()
            outputs = tuning.tune_outputs(job, outputs, reporter)
            if recipe.evaluates:
                outputs = evaluating.evaluate_outputs(recipe, outputs, job.device.type, reporter)
            else:
                evaluating.drop_outdated(recipe, outputs, reporter)
        return _finished(job, outputs, reporter, start)
    except KeyboardInterrupt as e:
        raise _stopped(recipe, begun) from e


def _places(recipe: Recipe, compile_full: str | None) -> set[str]:
    """The directories of all bitrates with this -cf, links resolved."""
    from exl2ray.output.targets import places

    single = (replace(recipe, bits=(bits,), compile_full=compile_full) for bits in recipe.bits)
    return {directory for r in single for directory in places(r)["targets"]}


def patch(
    recipe: Recipe,
    overrides: Sequence[str],
    reporter: Reporter,
    bits: Sequence[float] | None = None,
    compile_full: str | None = None,
    undo: bool = False,
) -> Summary:
    """Quantises again only what ``overrides`` (texts of --set) change in the finished conversion of ``recipe``.

    All other choices stay, so the model grows or shrinks by what was asked for; what it was patched with earlier stays, too,
    unless that is to be undone. bits: bitrates to patch; None: all. compile_full: where to write; None: over the output of
    the recipe. Raises UsageError if a bitrate is not finished, or an override matches nothing.
    """
    from exl2ray.allocation.overrides import parse_overrides
    from exl2ray.remote.source import localised
    from exl2ray.steps.allocating import allocate
    from exl2ray.steps.evaluating import drop_outdated
    from exl2ray.steps.job import Job
    from exl2ray.steps.measuring import measure
    from exl2ray.steps.patching import Wanted
    from exl2ray.steps.producing import produce
    from exl2ray.store.apart import refuse_within

    start = time.monotonic()
    if recipe.tune is not None and (
        compile_full is None or not _places(recipe, compile_full).isdisjoint(_places(recipe, recipe.compile_full))
    ):
        raise UsageError(
            f"{recipe.compile_full} was tuned (--tune {recipe.tune}); a patch would put a model there that is not",
            "name another directory with -cf, and tune what comes of it with `exl2ray tune`",
        )
    _warn_of_others(recipe, reporter)
    recipe = localised(recipe)
    writes = replace(recipe, bits=tuple(bits or recipe.bits), compile_full=compile_full or recipe.compile_full)
    for directory in _places(recipe, compile_full) if compile_full is not None else ():
        refuse_within("-cf", Path(directory), recipe.out_dir)
    try:
        with interruptible(), Job(recipe, reporter, writes=writes) as job:
            parse_overrides(overrides, job.spec)
            wanted = Wanted(tuple(dict.fromkeys(overrides)), undo)
            measurement = measure(job)
            plans = [allocate(job, measurement, b) for b in bits or recipe.bits]
            outputs = produce(job, plans, compile_full, wanted)
        drop_outdated(recipe, outputs, reporter)
        return _finished(job, outputs, reporter, start)
    except KeyboardInterrupt as e:
        raise Interrupted("stopped; finished modules are in the work directory", "run the same command again") from e


def _in_reach(recipe: Recipe, reporter: Reporter) -> Recipe:
    """With a folder as ``in_dir``, which stands for the address of a model that is elsewhere.

    With --nearest: bitrates that this model cannot have become the nearest that it can.
    """
    from exl2ray.allocation.planning import within_reach
    from exl2ray.remote.source import localised

    recipe, notes = within_reach(localised(recipe))
    for note in notes:
        reporter.event("note", message=note)
    return recipe


def _warn_of_others(recipe: Recipe, reporter: Reporter) -> None:
    from exl2ray.store.trust import others_who_write

    others = others_who_write(recipe.out_dir, groups=False)
    if others is not None:
        reporter.event("warning", message=f"{others}: what is found finished there is used as it is")


def _finished(job: Job, outputs: list[OutputSummary], reporter: Reporter, start: float) -> Summary:
    """Tells of the finished models; raises NumericError for one that is clearly broken."""
    from exl2ray.steps.producing import judge

    seconds = time.monotonic() - start
    warnings = job.warnings.all(o.bits for o in outputs)
    reporter.event("done", outputs=[o.__dict__ for o in outputs], warnings=warnings, seconds=seconds)
    judge(outputs)
    return Summary(tuple(outputs), job.measurement_path, seconds, tuple(warnings))


def dry_run(recipe: Recipe, reporter: Reporter) -> None:
    """Checks everything that can be checked before work starts, and says what would be done."""
    from exl2ray.output.targets import places
    from exl2ray.steps.job import Job

    recipe = _in_reach(recipe, reporter)
    with Job(recipe, reporter, dry=True):
        reporter.event("note", message=places_text(places(recipe)))
        reporter.event("note", message="dry run: nothing was computed or written")


def _stopped(recipe: Recipe, begun: bool) -> Interrupted:
    if not begun:  # -o alone would go on with nothing, or, after -nr, with the job that was there before
        stopped = Interrupted("stopped before anything was begun", "run the same command again")
        stopped.begun = False
        return stopped
    hint = f"resume with: exl2ray convert -o {recipe.out_dir}"
    return Interrupted("stopped; everything finished so far is in the work directory", hint)


__all__ = ["OutputSummary", "Summary", "convert", "dry_run"]
