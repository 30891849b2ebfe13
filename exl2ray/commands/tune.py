"""``exl2ray tune``: an EXL2 model tuned on the divergence from its source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from exl2ray.calibration.data.sources import local_source
from exl2ray.datasets import text_source
from exl2ray.devices import pick_device
from exl2ray.errors import Interrupted, UsageError
from exl2ray.evaluate.forward import open_model
from exl2ray.recipe import Recipe
from exl2ray.remote.address import is_remote, redacted
from exl2ray.steps.tuning import place_of_tuning
from exl2ray.terminal.console import Warnings, show_text
from exl2ray.terminal.live import human_reporter, show_table
from exl2ray.terminal.pasted import check_models
from exl2ray.tune.rows import naming
from exl2ray.tune.run import Tuned, tune
from exl2ray.tune.settings import LENGTH, Settings
from exl2ray.units import parse_count
from exl2ray.wording import duration, file_size, nats

# Gemma 3 270M at 6.35 bits a weight: nothing kept with 1.4e-3, 0.905 times the KL with this (docs/log.md, 2026-11-30).
LOWER_RATE = "a lower rate may keep something, above all at six bits a weight and more: --rate 5e-4 --gain-rate 5e-4"


def run(
    directory: str,
    reference: str,
    output: str,
    tokens: str,
    passes: int | None,
    text: Sequence[str],
    length: int | None,
    step_tokens: int | None,
    rate: float | None,
    gain_rate: float | None,
    seed: int,
    quiet: bool,
    **place: Any,
) -> Tuned:
    """Writes the tuned model. place: fields of a recipe that say where to compute. Raises UsageError naming the flag, and
    what `exl2ray.tune.run.tune` raises; KeyboardInterrupt becomes Interrupted, with a hint."""
    for flag, model in (("", directory), ("--reference ", reference)):
        if is_remote(model):
            raise UsageError(
                f"{flag}{redacted(model)}: is an address; tuning reads weights again and again, so in a folder",
                "fetch it first, for one with: hf download OWNER/NAME --local-dir FOLDER",
            )
    check_models(directory, reference)
    if length is not None and length < 16:
        raise UsageError(f"--length {length}: at least 16 tokens a row are needed", f"{LENGTH} is usual")
    if step_tokens is not None and step_tokens < (length or LENGTH):
        raise UsageError(f"--step-tokens {step_tokens}: a step takes at least one row of --length {length or LENGTH}")
    for flag, value in (("--rate", rate), ("--gain-rate", gain_rate)):
        if value is not None and not 0 < value < 1:
            raise UsageError(f"{flag} {value}: a number between 0 and 1 is needed", "0.002 is usual")
    with naming("--text"):
        sources = tuple(text_source(given, local_source) for given in text)
    recipe = Recipe("", "", **place)
    chosen = pick_device(recipe)
    count = parse_count(tokens, "--tokens")
    settings = Settings(
        directory, reference, output, sources, count, length, step_tokens, rate, gain_rate, seed=seed, passes=passes
    )
    where = place_of_tuning(recipe, chosen, open_model(directory).spec.weights)
    reporter = Warnings() if quiet else human_reporter()
    try:
        return tune(settings, chosen, reporter, where=where)
    except KeyboardInterrupt as e:
        hint = "run the same command again: it goes on from the last checkpoint"
        raise Interrupted(f"stopped; what has been trained is kept in {output}", hint) from e
    finally:
        reporter.close()


def show(result: Tuned, report: bool) -> None:
    if report:
        rows = [
            [kind, nats(before), nats(result.after[kind]), f"{result.after[kind] / before:.3f}" if before else "-"]
            for kind, before in result.before.items()
        ]
        show_table("KL (nats) on held-out text", ["kind", "before", "after", "ratio"], rows)
    before, after = result.before["mean"], result.after["mean"]
    if result.kept == "nothing":
        why = f"worse on {', '.join(result.worse)}, so all is rolled back" if result.worse else "nothing gained"
        show_text(f"{why}: {result.directory} holds the model as it was (KL {nats(before)})")
        show_text(LOWER_RATE, "  hint: ")
    else:
        show_text(
            f"{result.directory}: KL {nats(before)} -> {nats(after)}; kept: {result.kept}, "
            f"{100 * result.changed:.2f} % of the integers changed in {result.steps} steps; {file_size(result.file_bytes)}"
        )
    parts = [f"{part} {duration(seconds)}" for part, seconds in result.seconds.items()]
    show_text(", ".join([*parts, *([f"GPU memory {file_size(result.peak_bytes)}"] if result.peak_bytes else [])]))
