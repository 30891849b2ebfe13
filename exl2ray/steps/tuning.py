"""The last step of a conversion with --tune: every solved model of the job becomes a tuned one in its -cf.

The solved model lies in the work directory, quant/<bpw>/solved, complete: it is where a tuning starts, also after a kill.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.errors import ClusterError
from exl2ray.events import OutputSummary, Reporter
from exl2ray.output.targets import owner_of
from exl2ray.recipe import Recipe
from exl2ray.store.file_names import SOLVED, quant_kind
from exl2ray.units import parse_count
from exl2ray.wording import nats

if TYPE_CHECKING:
    import torch

    from exl2ray.steps.job import Job
    from exl2ray.tune.run import Tuned
    from exl2ray.tune.settings import Settings, Where

WORK = "tune"  # beside the records of a bitrate


def place_of_solved(recipe: Recipe) -> str | None:
    """In place of -cf for what is only solved, with {bpw} for the bitrate; None if nothing is tuned."""
    return None if recipe.tune is None else os.path.join(recipe.out_dir, "quant", "{bpw}", SOLVED)


def tune_outputs(job: Job, outputs: Sequence[OutputSummary], reporter: Reporter) -> list[OutputSummary]:
    """``outputs`` as they are in -cf after tuning; as they are if none is asked for.

    What is finished is left alone. Raises what `exl2ray.tune.run.tune` does. For a job whose workers are gone, and that still
    holds its work directory.
    """
    if job.recipe.tune is None:
        return list(outputs)
    from exl2ray.publish.card import add_tuning
    from exl2ray.tune.run import tune

    where = place_of_tuning(job.recipe, job.device, job.spec.weights)
    if where.executor == "inline" and job.device.type == "cuda" and not torch_has_gpu():
        raise ClusterError(
            f"--tune: no GPU on this machine; the solved models are complete in {job.recipe.out_dir}/quant/*/{SOLVED}",
            "run the same command on a machine with a GPU, or tune them there with `exl2ray tune`",
        )
    out = []
    for output in outputs:
        settings = _settings(job.recipe, output)
        owner = owner_of(job.recipe, job.job["identity"]["fingerprint"], job.work.id, job.side_files)
        reporter.event("note", message=f"{output.bits:g} bpw: tuning on {job.recipe.tune} tokens")
        begun, step = time.monotonic(), {"stage": f"tune {output.bits}", "items": 1}
        job.work.event("stage", **step, done=0)
        found = tune(settings, job.device, reporter, owner, where)
        job.work.event("item", **step, key="model", done=1, seconds=time.monotonic() - begun)
        add_tuning(settings.output, found.before, found.after, found.kept, found.tokens, found.worse)
        reporter.event("note", message=f"{output.bits:g} bpw: {told(found)}")
        files = tuple(str(Path(settings.output) / Path(f).name) for f in output.files)
        out.append(replace(output, directory=settings.output, files=files, file_bytes=found.file_bytes, tuned=_facts(found)))
    return out


def place_of_tuning(recipe: Recipe, device: torch.device, weights: int) -> Where:
    """On what workers a model of so many weights is tuned: as --executor, --gpus and --ray-address say, but a small one on
    one GPU unless --gpus asks for more. There its steps are replayed from a recording, which a group cannot do."""
    from exl2ray.devices import pick_executor
    from exl2ray.tune.memory import SMALL_WEIGHTS
    from exl2ray.tune.settings import Where

    executor = pick_executor(recipe, device)
    if executor == "ray" and device.type == "cuda" and recipe.gpus is None and weights < SMALL_WEIGHTS:
        remote = recipe.executor == "ray" or recipe.cluster is not None
        return Where("ray", 1, recipe.ray_address) if remote else Where()
    return Where(executor, recipe.gpus, recipe.ray_address)


def torch_has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def told(found: Tuned) -> str:
    """What came of a tuning, in a line."""
    before, after = found.before["mean"], found.after["mean"]
    if found.kept == "nothing":
        why = f"tuning makes {', '.join(found.worse)} worse" if found.worse else "nothing gained by tuning"
        return f"{why}: the model is as it was (held-out KL {nats(before)})"
    ratio = after / before if before else 1.0
    return f"tuned, held-out KL {nats(before)} -> {nats(after)} ({ratio:.3f} times); kept: {found.kept}"


def _facts(found: Tuned) -> dict[str, object]:
    kept = ("kept", "ratio", "steps", "tokens", "before", "after", "changed", "worse")
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(found).items() if k in kept}


def _settings(recipe: Recipe, output: OutputSummary) -> Settings:
    from exl2ray.datasets import tuning_text
    from exl2ray.tune.settings import Settings

    target, solved = recipe.output_dir(output.bits), output.directory
    if target is None or solved is None or recipe.tune is None:
        raise AssertionError("a tuning has -cf")
    flag, sources = tuning_text(recipe)
    work = os.path.join(recipe.out_dir, quant_kind(output.bits), WORK)
    tokens = parse_count(recipe.tune, "--tune")
    return Settings(solved, recipe.in_dir, target, sources, tokens, seed=recipe.seed, work=work, text_flag=flag,
        written=recipe.out_dir)
