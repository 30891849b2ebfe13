"""Where a conversion computes, and with which versions: looked at before it starts.

One device needs no Ray, which takes 10 to 15 s to start and has nobody there to share with: under ``--executor auto`` the
conversion then runs in the process of the command. What is lost with it is the replacement of a worker after a CUDA error, so
`exl2ray.convert` goes on with Ray workers after one; what was committed stays.
"""

from __future__ import annotations

from typing import Literal

import torch

from exl2ray.errors import StoreError, UsageError
from exl2ray.host import SHARED_MEMORY_FIX, nccl_bytes, nvidia_cards, nvidia_driver_loaded, shared_memory_bytes
from exl2ray.recipe import Recipe


def pick_device(recipe: Recipe) -> torch.device:
    """Where the workers compute: cuda if there is a usable GPU, else cpu; UsageError if a GPU was asked for in vain.

    A driver on a cluster's head node often has no GPU of its own: there ``--device cuda`` is taken at its word, and the
    session says so if the cluster has none.
    """
    if recipe.device == "cpu":
        return torch.device("cpu")
    remote = recipe.executor != "inline" and recipe.cluster is not None
    available = torch.cuda.is_available()
    if recipe.device == "cuda" and remote:
        return torch.device("cuda")
    if recipe.device == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no GPU", "`exl2ray doctor` says why; --device cpu works everywhere")
    return torch.device("cuda" if available else "cpu")


def pick_executor(recipe: Recipe, device: torch.device) -> Literal["ray", "inline"]:
    """Ray where there are workers to share the work out to, which is on a cluster or with more than one GPU; else inline."""
    if recipe.executor != "auto":
        return recipe.executor
    if recipe.cluster is not None or (recipe.gpus or 1) > 1:
        return "ray"
    several = device.type == "cuda" and recipe.gpus is None and torch.cuda.device_count() > 1
    return "ray" if several else "inline"


def check_shared_memory(gpus: int) -> None:
    """StoreError if /dev/shm has too little room for NCCL between this many GPUs of one machine."""
    found, wanted = shared_memory_bytes(), nccl_bytes(gpus)
    free = 0 if found is None else found[0]
    if free < wanted:
        what = "missing" if found is None else f"{free / 1e6:.0f} MB are free of the {wanted / 1e6:.0f} MB needed"
        use = f"{gpus} GPUs that work on one model exchange Hessians and weights through it"
        raise StoreError(f"/dev/shm: {what}; {use}", SHARED_MEMORY_FIX)


def idle_gpu(device: torch.device, recipe: Recipe) -> str | None:
    """A warning if the conversion would run on the CPU of a machine with an NVIDIA GPU, though nobody asked for that."""
    if recipe.device != "auto" or device.type != "cpu" or not (nvidia_cards() or nvidia_driver_loaded()):
        return None
    return "this machine has an NVIDIA GPU that torch cannot use, so all runs on the CPU, slowly: `exl2ray doctor` says why"
