"""What a conversion begins before it is needed, and who waits for it.

    command -> (another process) Ray, processes of workers with torch -----------------------------.
    command -> (other processes) kernels that are not in the cache -----------------.
    command -> import torch -> kernels (thread; the context beside torch) ------.
           `-> import exl2ray -> checks, rows of tokens -> work directory -> worker -> first module -> first result
                              |                      |            `-> hashes of the source (threads) -----^
                              |                      `-> (in the worker) first weights (threads) --^
                              `-> samples of the weights (thread), before the work directory

An arrow that ends at a step is what that step waits for. What goes wrong in a thread is raised there, as it would have been
without one: a GPU's error where the worker is made, that of a file where the first result is told.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress

from exl2ray.errors import Exl2RayError
from exl2ray.quant import precompiling
from exl2ray.recipe import Recipe
from exl2ray.stopping import EXPENDABLE
from exl2ray.timeline import step


def begin_workers(recipe: Recipe) -> None:
    """Begins to start the Ray of a conversion that will need one of its own; `end_workers` stops it if nobody used it.

    A look at the flags and the folders tells: a job that was begun before may be finished, or held by another conversion.
    """
    if _will_use_ray(recipe) and _is_new(recipe):
        from exl2ray.driver.starting import begin_private, expected_workers

        begin_private(expected_workers(recipe.device, recipe.gpus))


def end_workers() -> None:
    """Ends what `begin_workers` began, where a check has refused the job, or no workers were needed."""
    if "exl2ray.driver.starting" in sys.modules:
        from exl2ray.driver.starting import stop_ray

        stop_ray()


def _will_use_ray(recipe: Recipe) -> bool:
    """Whether workers will be processes of a private Ray, without asking torch."""
    from exl2ray.driver.starting import expected_workers

    if recipe.cluster not in (None, "local"):
        return False
    several = recipe.cluster is not None or expected_workers(recipe.device, recipe.gpus) > 1
    return recipe.executor == "ray" or (recipe.executor == "auto" and several)


def _is_new(recipe: Recipe) -> bool:
    """Whether a model is there, and nothing where the work directory and the outputs will be."""
    if "://" in recipe.in_dir or "://" in recipe.out_dir or not os.path.isfile(os.path.join(recipe.in_dir, "config.json")):
        return False
    places = [recipe.out_dir, *(recipe.output_dir(b) for b in recipe.bits)]
    with suppress(OSError):
        return not any(place and os.path.exists(place) and os.listdir(place) for place in places)
    return False


def begin_device(recipe: Recipe) -> None:
    """Sets up the GPU in a thread, where this process is going to compute on one. Nothing is waited for or raised here."""
    if recipe.device != "cpu" and recipe.executor != "ray":
        threading.Thread(target=_set_up, args=(recipe,), name=f"{EXPENDABLE} GPU").start()


def _set_up(recipe: Recipe) -> None:
    elsewhere = _will_use_ray(recipe) or (recipe.executor != "inline" and recipe.cluster is not None)
    compiling = () if elsewhere else precompiling.begin(recipe.numerics)
    let_go = None if elsewhere or not precompiling.has_gpu() else precompiling.begin_context(f"{EXPENDABLE} context")
    with step("import torch"):
        from exl2ray.devices import pick_device, pick_executor
        from exl2ray.quant.warm import begin_warm_up

    def device() -> str | None:
        used = None
        with suppress(Exl2RayError):  # the checks tell of it
            found = pick_device(recipe)
            used = found.type if pick_executor(recipe, found) == "inline" else None
        if let_go is not None and used != "cuda":
            let_go()
        return used

    def compiled() -> None:
        with step("wait for compiled kernels"):
            precompiling.finish(compiling)

    begin_warm_up(device, recipe.numerics, compiled)
