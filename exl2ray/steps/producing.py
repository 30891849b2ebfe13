"""From the plans of a job's bitrates to models: what each is quantised with, that it is written, and what is said of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.allocation.planning import Plan
from exl2ray.errors import NumericError
from exl2ray.events import OutputSummary
from exl2ray.output.writing import OutputWriter
from exl2ray.result_warnings import is_broken
from exl2ray.steps.background import Outputs
from exl2ray.steps.patching import Wanted, kept, remember, warn_of_lost
from exl2ray.steps.quantizing import quantize
from exl2ray.wording import perplexity

if TYPE_CHECKING:
    from exl2ray.steps.job import Job


def produce(
    job: Job, plans: Sequence[Plan], compile_full: str | None, patch: Wanted | None = None
) -> list[OutputSummary]:
    """Quantises and writes all bitrates. A bitrate is written as soon as it is complete, while others go on; one whose
    files are there already is left alone.

    ``compile_full``: in place of -cf. ``patch``: what a patch wants; without one, a model that was patched stays so.
    """
    recipe = job.recipe
    if compile_full is not None:
        recipe = replace(recipe, compile_full=compile_full, bits=tuple(p.bits for p in plans))
    writer = OutputWriter(
        recipe, job.spec, job.source, job.work, fingerprint=job.job["identity"]["fingerprint"],
        calibration_rows=len(job.rows["quantize"].ids), warnings=job.warnings, side_files=job.side_files,
        targets=job.targets,
    )  # fmt: skip
    for plan in plans:
        writer.check(plan)
    plans = [(kept if patch is None else patch.of)(job, plan, writer.target(plan)) for plan in plans]
    for plan in plans:
        warn_of_lost(job, plan, writer.target(plan))
    job.targets.lock(recipe, [p.bits for p in plans], writer.owner)
    with Outputs(job, writer, plans) as outputs:
        quantize(job, plans, outputs)
        written = []
        for plan in plans:
            written.append(outputs.written(plan))
            remember(job.work, plan, writer.target(plan))
            _log(job, plan, written[-1])
        job.source_state.check()
        job.warnings.add(job.source_state.warnings)
        return written


def _log(job: Job, plan: Plan, output: OutputSummary) -> None:
    hashes = [plan.hashes[m.index][:16] for m in job.spec.modules if m.linears]
    files = [Path(f).name for f in output.files]
    place = output.directory and os.path.abspath(output.directory)  # the log is read from other places
    job.work.event(
        "written", bits=plan.bits, modules=hashes, directory=place, files=files, bytes=output.file_bytes
    )


def judge(outputs: list[OutputSummary]) -> None:
    """Refuses a model whose perplexity on calibration rows shows that something went wrong. Its files stay there."""
    for out in outputs:
        after, before = out.calibration_perplexity, out.reference_perplexity
        if is_broken(after, before):
            both = f"calibration perplexity {perplexity(after)}, of the source model {perplexity(before)}"
            raise NumericError(
                f"{out.bits:g} bpw: {both}: the quantised model is broken",
                f"the files are kept ({', '.join(out.files)}); check the source model and the calibration data",
            )
