"""Room on disks: what a conversion still has to write into the work directory and the output, and what is free there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exl2ray.beneath import existing_parent
from exl2ray.errors import StoreError
from exl2ray.formats.side_files import side_bytes
from exl2ray.host import usable_memory_bytes
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.sizes import OutputSize
from exl2ray.plan.worker_memory import RowSizes, state_bytes
from exl2ray.recipe import Recipe, bpw_name
from exl2ray.remote.source import cached_bytes
from exl2ray.store.file_names import quant_kind
from exl2ray.tune.estimate import a_module_at_a_time
from exl2ray.wording import file_size

FILE_BYTES = 4096  # of a record, and of the header of a file of packed tensors: more than most take
CHECKPOINT_BYTES = 13  # a weight, of a tuning: latent and moments in float32, the best integers so far
BACKLOG = 0.1  # of the packed tensors: modules that are not in the shards yet
STATE_COPIES = 2  # a checkpoint is written before the one before it goes


@dataclass(frozen=True)
class DiskNeed:
    """What is still to be written to one place. least_bytes: what is certain; bytes: with checkpoints of hidden states.

    free_bytes: None where that cannot be known (object stores). device: which file system it is.
    """

    what: str
    path: str
    least_bytes: int
    bytes: int
    free_bytes: int | None
    device: int | None


def disk_needs(recipe: Recipe, spec: ModelSpec, sizes: Sequence[OutputSize], rows: RowSizes) -> list[DiskNeed]:
    """Needs of the work directory and of each output, less what an earlier run left there to be used or replaced."""
    modules = sum(m.quantized for m in spec.modules)
    tokens = rows.measure[0] * rows.measure[1] + rows.quantize[0] * rows.quantize[1]
    least = most = 8 * tokens
    if recipe.measurement is None:
        most += modules * FILE_BYTES + STATE_COPIES * state_bytes(spec, rows.measure)
    outputs = []
    for size in () if recipe.output_measurement is not None else sizes:
        states = state_bytes(spec, rows.quantize) + state_bytes(spec, (rows.reported, rows.quantize[1]))
        most += len(spec.linears) * FILE_BYTES + STATE_COPIES * states
        directory, tensors = recipe.output_dir(size.bits), Path(recipe.out_dir) / quant_kind(size.bits) / "tensors"
        if directory is None or recipe.tune is not None or _on_one_disk(recipe.out_dir, directory):
            # Shards are filled in the work directory, and linked into the output (or the solved model that is tuned).
            done = _bytes_in(tensors, "output*")
            least += max(0, size.low_bytes - done)
            most += max(0, size.high_bytes - done) + int(BACKLOG * size.packed_high_bytes)
        else:
            done = _bytes_in(tensors, "*")
            least, most = least + max(0, size.packed_low_bytes - done), most + max(0, size.packed_high_bytes - done)
        if directory is not None:
            linked = recipe.tune is None and _on_one_disk(recipe.out_dir, directory)
            outputs.append(_need(f"output {bpw_name(size.bits)}", directory, *_output(recipe, directory, size, linked)))
        if recipe.tune is not None:
            most += STATE_COPIES * CHECKPOINT_BYTES * spec.weights
            most += a_module_at_a_time(spec, 1, usable_memory_bytes()).file_bytes
            least, most = least + side_bytes(recipe.in_dir), most + side_bytes(recipe.in_dir)
    most += cached_bytes(recipe.in_dir)
    work = [_need("work directory", recipe.out_dir, least, max(least, most))] if recipe.out_dir else []
    return work + outputs


def check_disks(needs: Sequence[DiskNeed]) -> list[StoreError]:
    """An error for every file system that cannot hold what is certain to be written to it."""
    errors = []
    for device in dict.fromkeys(n.device for n in needs if n.device is not None):
        here = [n for n in needs if n.device == device]
        needed, free = sum(n.least_bytes for n in here), here[0].free_bytes or 0
        if needed > free:
            places = " and ".join(f"{n.path} ({n.what}, {file_size(n.least_bytes)})" for n in here)
            errors.append(
                StoreError(
                    f"too little disk space: {places} {'need' if len(here) == 1 else 'together need'} "
                    f"{file_size(needed)} or more, {file_size(free)} are free",
                    "free space, or put the work directory (-o) or the output (-cf) on another disk",
                )
            )
    return errors


def _need(what: str, path: str, least: int, most: int) -> DiskNeed:
    if "://" in path:
        return DiskNeed(what, path, least, most, None, None)
    place = existing_parent(Path(path))
    try:
        stats = os.statvfs(place)
        return DiskNeed(what, path, least, most, stats.f_bavail * stats.f_frsize, place.stat().st_dev)
    except OSError:
        return DiskNeed(what, path, least, most, None, None)


def _output(recipe: Recipe, directory: str, size: OutputSize, linked: bool) -> tuple[int, int]:
    """(least, most) bytes to write into an output directory. An earlier output there is replaced. linked: but for shards."""
    here, files = _bytes_in(Path(directory), "output*"), side_bytes(recipe.in_dir)
    if linked:
        return files, files
    return max(0, size.low_bytes + files - here), max(0, size.high_bytes + files - here)


def _on_one_disk(*places: str) -> bool:
    """Whether files of one can most likely be linked into the other."""
    try:
        devices = {os.stat(existing_parent(Path(p))).st_dev if p and "://" not in p else -1 for p in places}
        return len(devices) == 1 and -1 not in devices
    except OSError:
        return False


def _bytes_in(directory: Path, pattern: str) -> int:
    try:
        return sum(p.stat().st_size for p in directory.glob(f"{pattern}.safetensors"))
    except OSError:  # a folder that this user may not enter: told by others
        return 0
