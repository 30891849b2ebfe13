"""What is looked at before a conversion starts: devices, outputs, versions, files given by the user."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch

from exl2ray import __version__
from exl2ray.errors import StoreError, UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.shards import OUTPUT_NAME
from exl2ray.formats.target import check_target
from exl2ray.host import SHARED_MEMORY_FIX, nccl_bytes, nvidia_cards, nvidia_driver_loaded, shared_memory_bytes
from exl2ray.recipe import Recipe
from exl2ray.store.workdir import work_id
from exl2ray.targets import owner_of


def pick_device(recipe: Recipe) -> torch.device:
    """Where the workers compute: cuda if there is a usable GPU, else cpu; UsageError if a GPU was asked for in vain.

    A driver on a cluster's head node often has no GPU of its own: there ``--device cuda`` is taken at its word, and the
    session says so if the cluster has none.
    """
    if recipe.device == "cpu":
        return torch.device("cpu")
    remote = recipe.executor != "inline" and bool(recipe.ray_address or os.environ.get("RAY_ADDRESS"))
    available = torch.cuda.is_available()
    if recipe.device == "cuda" and remote:
        return torch.device("cuda")
    if recipe.device == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no GPU", "`exl2ray doctor` says why; --device cpu works everywhere")
    return torch.device("cuda" if available else "cpu")


def pick_executor(recipe: Recipe, device: torch.device) -> Literal["ray", "inline"]:
    """Ray where there are workers to share the work out to: a cluster, or more than one GPU. One device runs in this process,
    which spares the start of Ray (10 to 15 s) and a second copy of everything.
    """
    if recipe.executor != "auto":
        return recipe.executor
    if recipe.ray_address or os.environ.get("RAY_ADDRESS") or (recipe.gpus or 1) > 1:
        return "ray"
    several = device.type == "cuda" and recipe.gpus is None and torch.cuda.device_count() > 1
    return "ray" if several else "inline"


def versions() -> dict[str, str]:
    """Versions that matter to results, for job.json and the workers' check."""
    out = {"exl2ray": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "numba", "ray"):
        try:
            out[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return out


def check_output(recipe: Recipe, directory: Path, source: SourceModel | None) -> None:
    """Refuses an output directory that holds anything else, or that cannot be written. ``source``: None if unusable."""
    existing = directory
    while not existing.exists() and existing.parent != existing:
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise StoreError(f"{directory}: {existing} is not a directory that can be written", "choose another -cf")
    if recipe.out_dir and "://" not in recipe.out_dir and directory.resolve() == Path(recipe.out_dir).resolve():
        raise UsageError(f"-cf {directory}: is the work directory (-o)", "choose another directory for the model")
    foreign = sorted(p.name for p in directory.glob("*.safetensors") if not OUTPUT_NAME.fullmatch(p.name))
    if foreign:
        raise StoreError(
            f"{directory}: holds {foreign[0]}, which loaders would read as part of the model",
            "choose an empty output directory (-cf), or move that file away",
        )
    if source is not None and (directory.is_symlink() or (directory.is_dir() and any(directory.iterdir()))):
        # a fingerprint reads a little of every tensor
        check_target(directory, owner_of(recipe, source.fingerprint(), work_id(recipe.out_dir)))


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
