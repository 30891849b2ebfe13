"""The job of a recipe, and whether its work directory can be opened for it: what `plan` and `--dry-run` look at, too."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exl2ray.allocation.planning import has_sensitivities
from exl2ray.calibration.rows import Rows
from exl2ray.datasets import data_hashes, stored_places
from exl2ray.errors import SourceError, StoreError
from exl2ray.formats.elsewhere import place_of
from exl2ray.formats.files import refuse_other
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.json_file import parse_json_object
from exl2ray.formats.measurement import Measurement
from exl2ray.model.spec import ModelSpec
from exl2ray.output.targets import check_place
from exl2ray.recipe import JOB_FLAGS, Recipe
from exl2ray.result_warnings import few_scores_warning
from exl2ray.store.apart import refuse_within
from exl2ray.store.file_names import MEASUREMENT
from exl2ray.store.job_file import StoredJob
from exl2ray.store.workdir import WorkDir
from exl2ray.wording import shown

FEW_SCORES = 4  # rows of the measurement set for scores by which nothing is chosen: they tell how modules differ


def job_of(
    recipe: Recipe, source: SourceModel, spec: ModelSpec, rows: Mapping[str, Rows], data: Sequence[str],
    stored: StoredJob | None,
) -> dict[str, dict[str, Any]]:
    """The sections of job.json. ``recipe``: with ``--allocation`` as ``falls_back`` has it; ``data``: every -c, absolute;
    ``stored``: the job that is there, if it is gone on with."""
    identity = {
        "fingerprint": source.fingerprint(),
        "architecture": spec.arch.name,
        "in_dir": place_of(recipe.in_dir),
        "cal_dataset": stored_places(data),
    }
    job = recipe.job(identity, *data_hashes(recipe, rows))
    scored = score_rows(recipe, stored)
    job["measure"].update({} if scored is None else {"score_rows": scored})
    before = None if stored is None else stored.job["output"].get("compile_full")
    if isinstance(before, str) and os.path.abspath(before) == job["output"]["compile_full"]:
        job["output"]["compile_full"] = before  # of a job that was begun when it was kept as it was given
    return job


def score_rows(recipe: Recipe, stored: StoredJob | None) -> int | None:
    """On how many rows the option tables are scored, None: on all; if nobody says so, as the job began."""
    if recipe.score_rows is not None:
        return recipe.score_rows
    if stored is not None and not recipe.no_resume:
        if "score_rows" not in stored.job["measure"]:
            return None
        known = stored.job["measure"]["score_rows"]
        if type(known) is not int or known < 1:
            raise StoreError(
                f"{recipe.out_dir}: the job's measure.score_rows is {shown(known)}; a number of rows is needed",
                "job.json is damaged: restore it, or start anew with -nr",
            )
        return known
    for_others = recipe.measurement is not None or recipe.output_measurement is not None  # the reference chooses by them
    return None if for_others or recipe.allocates == "module" else FEW_SCORES


def few_scores(
    recipe: Recipe, spec: ModelSpec, given: Measurement | None, rows: Mapping[str, Rows]
) -> list[str]:
    """What is to be said of scores on few rows where options are chosen by them: those of -m, or of a local job that is gone
    on with."""
    if recipe.allocates != "module" and not falls_back(recipe, spec, given):
        return []
    if given is not None or "measure" not in rows:
        return few_scores_warning(None if given is None else given.scores)
    here = recipe.out_dir and "://" not in recipe.out_dir and not recipe.no_resume
    scored = score_rows(recipe, WorkDir.read_job(recipe.out_dir) if here else None)
    return few_scores_warning(scores_entry(scored, rows["measure"]))


def scores_entry(scored: int | None, rows: Rows) -> dict[str, int] | None:
    """What a measurement says of the rows that its tables were scored on; nothing if these were all."""
    return None if scored is None or scored >= len(rows.ids) else {"rows": scored}


FALLEN_BACK = "-m holds no sensitivities: options are chosen per module"


def falls_back(recipe: Recipe, spec: ModelSpec, given: Measurement | None) -> bool:
    """Whether options are chosen per module because ``-m`` is of a program that knows no sensitivities."""
    return given is not None and recipe.allocates == "linear" and not has_sensitivities(spec, given)


def allowed_changes(recipe: Recipe, stored: StoredJob | None) -> tuple[str, ...]:
    """Sections of the stored job that this run may change."""
    # After `measure`, the bitrate of the conversion is still open: naming it is no change of anything.
    measured = stored is not None and bool(stored.job["output"].get("measure_only"))
    return ("quantize", "output") if recipe.reuse or measured else ()


def measurement_target(wanted: str) -> Path:
    """Where -om has the measurement written: it names a file, or a directory to put measurement.json into."""
    path = Path(wanted)
    return path if path.suffix == ".json" else path / MEASUREMENT


def check_measurement_target(wanted: str, work: str) -> None:
    """StoreError if the file that -om asks for could not be written after measuring, UsageError if it would take the place of
    what is in the work directory ``work``."""
    path = measurement_target(wanted)
    refuse_within("-om", path, work, MEASUREMENT)
    if os.path.isdir(path):
        raise StoreError(f"-om {wanted}: {path} is a directory", "name a file that ends in .json, or another directory")
    check_place("-om", wanted, path.parent)
    refuse_other(path, "-om", "measurement", _is_measurement)


def _is_measurement(content: bytes) -> bool:
    """And not, say, the config.json of a model."""
    try:
        return "measurement" in parse_json_object(content, "")
    except SourceError:
        return False


def check_opening(
    recipe: Recipe, source: SourceModel, spec: ModelSpec, given: Measurement | None, rows: Mapping[str, Rows],
    data: Sequence[str],
) -> None:
    """Raises the StoreError that resuming the job in a local work directory would end with; writes nothing."""
    if recipe.no_resume or not recipe.out_dir or "://" in recipe.out_dir:
        return
    stored = WorkDir.read_job(recipe.out_dir)
    if stored is None:  # the fingerprint reads a little of every tensor
        return
    if falls_back(recipe, spec, given):
        recipe = replace(recipe, allocation="module")
    job, allowed = job_of(recipe, source, spec, rows, data, stored), allowed_changes(recipe, stored)
    WorkDir.check_opening(recipe.out_dir, job, resume=True, allow_changed=allowed, flags=JOB_FLAGS)
