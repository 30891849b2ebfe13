"""What a conversion begins before it is needed, and who waits for it.

    command -> import torch -> CUDA context, kernels (thread) ------------------.
           `-> import exl2ray -> checks, rows of tokens -> work directory -> worker -> first module -> first result
                                                     |            `-> hashes of the source (threads) -----^
                                                     `-> (in the worker) first weights (threads) --^

An arrow that ends at a step is what that step waits for. What goes wrong in a thread is raised there, as it would have been
without one: a GPU's error where the worker is made, that of a file where the first result is told.
"""

from __future__ import annotations

import threading
from contextlib import suppress

from exl2ray.errors import Exl2RayError
from exl2ray.recipe import Recipe
from exl2ray.stopping import EXPENDABLE
from exl2ray.timeline import step


def begin_device(recipe: Recipe) -> None:
    """Sets up the GPU in a thread, where this process is going to compute on one. Nothing is waited for or raised here."""
    if recipe.device != "cpu" and recipe.executor != "ray":
        threading.Thread(target=_set_up, args=(recipe,), name=f"{EXPENDABLE} GPU").start()


def _set_up(recipe: Recipe) -> None:
    with step("import torch"):
        from exl2ray.devices import pick_device, pick_executor
        from exl2ray.quant.warm import begin_warm_up

    def device() -> str | None:
        with suppress(Exl2RayError):  # the checks tell of it
            found = pick_device(recipe)
            return found.type if pick_executor(recipe, found) == "inline" else None
        return None

    begin_warm_up(device, recipe.numerics)
