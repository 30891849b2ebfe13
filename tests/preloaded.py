"""Imports all that the commands import when they run, and reads the built-in text: a process that imports this hands it to
its forks, which would each need up to a second for it. Not matplotlib, which makes caches when it is imported."""

from __future__ import annotations

from importlib import import_module

from numba.core.registry import cpu_target

from exl2ray.calibration.text import builtin_documents

for name in (
    "cli", "commands.allocations", "commands.evaluate", "commands.plan", "convert", "cuda.cpu",
    "driver.workers", "output.writing", "steps", "steps.evaluating", "steps.producing", "steps.tuning",
):  # fmt: skip
    import_module(f"exl2ray.{name}")
cpu_target.typing_context.refresh()  # what numba imports when it first loads a compiled function
cpu_target.target_context.refresh()
builtin_documents()  # read once and kept: a tenth of a second
