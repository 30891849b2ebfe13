"""The ``-cf`` directories of a conversion: looked at before work starts, locked from its start to its end.

Whose shards lie in such a directory has to be answered without the work directory. A dot file there names the fingerprint of
their source and what was written, and anything else is refused before work starts. While a model is being written it also
names the work directory (a random identity in its job.json), and a lock of the kernel on a second dot file keeps others out.
Where a file system has no such lock (some network mounts) two conversions that start at once may both begin; the claim is
looked at again before config.json is written, so one of them ends with an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from exl2ray.beneath import existing_parent
from exl2ray.calibration.data.sources import split_column
from exl2ray.errors import StoreError, UsageError
from exl2ray.formats.elsewhere import place_of
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.shards import OUTPUT_NAME
from exl2ray.formats.target import Owner, TargetLock, check_target, locked
from exl2ray.recipe import Recipe
from exl2ray.store.apart import refuse_within
from exl2ray.store.workdir import work_id


def owner_of(recipe: Recipe, fingerprint: str, work_id: str, files: Iterable[str] = ()) -> Owner:
    """The conversion as the claim of a target names it. ``work_id``: identity of its work directory, "" for a new one.
    ``files``: names that it writes beside those of the source.
    """
    data = (split_column(place)[0] for place in recipe.calibration_data if "://" not in place)
    own = tuple(path for path in (recipe.measurement, *data, recipe.eval_text) if path)
    work = recipe.out_dir if "://" in recipe.out_dir or not recipe.out_dir else os.path.abspath(recipe.out_dir)
    return Owner(fingerprint, recipe.in_dir, work_id, work, own, tuple(files))


def places(recipe: Recipe) -> dict[str, Any]:
    """What will be read and where will be written, links resolved: a resume has both from the work directory. source: of the
    model; targets: of -cf or -om, else the work directory; work.
    """

    def real(path: str) -> str:
        return path if "://" in path else os.path.realpath(path)

    outputs = [recipe.output_dir(b) for b in recipe.bits] if recipe.output_measurement is None else []
    targets = [real(d) for d in outputs if d is not None] or [real(recipe.output_measurement or recipe.out_dir)]
    return {"source": place_of(real(recipe.in_dir)), "targets": targets, "work": real(recipe.out_dir)}


class Targets:
    """Locks on directories; ``close`` gives them back."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._held: dict[str, TargetLock] = {}

    def lock(self, recipe: Recipe, bits: Iterable[float], owner: Owner) -> None:
        """Raises StoreError if another conversion is at one of them, UsageError for what must not be replaced."""
        for directory in (recipe.output_dir(b) for b in bits):
            if directory is not None and directory not in self._held:
                self._held[directory] = self._stack.enter_context(locked(Path(directory), owner))

    def check(self, directory: Path) -> None:
        """Raises StoreError if a directory that was locked is gone, or locked by somebody else now."""
        for path, lock in self._held.items():
            if Path(path) == directory:
                lock.check()

    def close(self) -> None:
        """Gives all locks back."""
        self._held.clear()
        self._stack.close()


def check_place(flag: str, wanted: str | Path, directory: Path, mode: int = os.W_OK | os.X_OK) -> None:
    """StoreError unless a directory can be written, or made. wanted: what the flag says. mode: of `os.access`."""
    place = existing_parent(directory)
    if not os.path.isdir(place) or not os.access(place, mode):
        what = f"{place.name or place} is not a directory that can be written"
        raise StoreError(f"{flag} {wanted}: {what}", f"choose another {flag}")


def check_output(recipe: Recipe, directory: Path, source: SourceModel | None) -> None:
    """Refuses an output directory that holds anything else, or that cannot be written. ``source``: None if unusable."""
    check_place("-cf", directory, directory, os.R_OK | os.W_OK | os.X_OK)
    if recipe.out_dir and "://" not in recipe.out_dir and os.path.realpath(directory) == os.path.realpath(recipe.out_dir):
        raise UsageError(f"-cf {directory}: is the work directory (-o)", "choose another directory for the model")
    refuse_within("-cf", directory, recipe.out_dir)
    foreign = sorted(p.name for p in directory.glob("*.safetensors") if not OUTPUT_NAME.fullmatch(p.name))
    if foreign:
        raise StoreError(
            f"{directory}: holds {foreign[0]}, which loaders would read as part of the model",
            "choose an empty output directory (-cf), or move that file away",
        )
    if source is not None and (directory.is_symlink() or (directory.is_dir() and any(directory.iterdir()))):
        # a fingerprint reads a little of every tensor
        check_target(directory, owner_of(recipe, source.fingerprint(), work_id(recipe.out_dir)))
