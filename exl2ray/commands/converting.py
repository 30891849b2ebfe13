"""``exl2ray convert``, ``measure`` and ``patch``: a conversion whose events are shown as they happen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from exl2ray import convert as story
from exl2ray.errors import UsageError
from exl2ray.events import Reporter
from exl2ray.recipe import Recipe
from exl2ray.store.apart import no_work_directory
from exl2ray.store.job_file import JOB_FILE
from exl2ray.store.open import open_store
from exl2ray.terminal.console import JsonLines, reserved_stdout
from exl2ray.terminal.flags import stored_settings
from exl2ray.terminal.live import human_reporter
from exl2ray.terminal.program import Invocation
from exl2ray.terminal.streams import Watched


def convert(
    run: Invocation, command: str, recipe: Recipe, dry_run: bool, notes: Sequence[str], publish: str | None = None,
    private: bool = False, clean: bool = False,
) -> None:  # fmt: skip
    """Converts, or measures if the recipe asks for that. ``notes`` are told first; ``command`` resumes the job. publish: the
    repository that the models go to, see `exl2ray.commands.hub_to_hub`.
    """

    def work(reporter: Reporter) -> None:
        for note in notes:
            reporter.event("note", message=note)
        if dry_run:
            story.dry_run(recipe, reporter)
            return
        if publish is not None:
            from exl2ray.commands import hub_to_hub

            hub_to_hub.convert(recipe, hub_to_hub.Wishes(publish, private, clean), reporter)
            return
        done = story.convert(recipe, reporter)
        if recipe.output_measurement is not None:
            warnings = list(done.warnings)
            reporter.event("done", outputs=[], measurement=done.measurement, warnings=warnings, seconds=done.seconds)

    if not dry_run:  # which leaves nothing that could be resumed
        run.command, run.out_dir = command if publish is None else f"{command} --publish {publish}", recipe.out_dir
    _reported(run, work)


def patch(
    run: Invocation, out_dir: str, overrides: Sequence[str], undo: bool, bits: Sequence[float], compile_full: str | None,
    trust_work_dir: bool, **place: Any,
) -> None:  # fmt: skip
    """Changes single linears of the conversion in ``out_dir``. ``place``: where to compute, as fields of a recipe."""
    if not overrides and not undo:
        raise UsageError("nothing to change", "give --set PATTERN=BITS, or --undo to drop what earlier patches set")
    if not open_store(out_dir).exists(JOB_FILE):
        raise no_work_directory(out_dir, "give that of a finished conversion")
    other = {"out_dir": out_dir, "evaluate": "never", "output_measurement": None}
    settings = {**stored_settings(out_dir, trust=trust_work_dir), **place, **other}
    unknown = [b for b in bits if b not in settings["bits"]]
    if unknown:
        have = ", ".join(f"{b:g}" for b in settings["bits"])
        raise UsageError(f"-b {unknown[0]:g}: the conversion in {out_dir} has {have}")
    stored = Recipe(**settings)

    def work(reporter: Reporter) -> None:
        story.patch(stored, overrides, reporter, bits or stored.bits, compile_full, undo)

    run.command, run.out_dir = "patch", out_dir
    _reported(run, work)


def _reported(run: Invocation, work: Callable[[Reporter], None]) -> None:
    """Runs ``work`` with what shows its events: lines of JSON with --json, else for people."""
    if run.json:
        with reserved_stdout() as out:
            _closing(JsonLines(out), work)
    else:
        _closing(human_reporter(), work)


def _closing(reporter: Reporter, work: Callable[[Reporter], None]) -> None:
    watched = Watched(reporter)
    try:
        work(watched)
    finally:
        watched.close()
