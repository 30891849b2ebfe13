"""Links in a model's folder. Whoever made the folder chose where they lead, and what is copied may be published.

The Hub's cache is made of links, from ``models--X/snapshots/REVISION/file`` to ``models--X/blobs/HASH``: these are
followed. Side files and config.json, whose content becomes part of the output, may be links inside the folder or that
cache, and nothing else. Weights may be linked from anywhere: they must be safetensors files with the model's tensors, and
people do keep them on other disks.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from exl2ray.errors import SourceError


def outside(path: Path, directory: Path) -> Path | None:
    """Where ``path`` really lies if that is neither in ``directory`` nor among the blobs of the same cached repository."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(directory))  # resolve() fails at a link to itself
    cached = root.parent.name == "snapshots" and real.parent == root.parent.parent / "blobs"
    return None if cached or real.is_relative_to(root) else real


def outside_links(directory: str | Path, names: Iterable[str]) -> dict[str, Path]:
    """Names of files in ``directory`` that are links out of it, and where these lead."""
    directory = Path(directory)
    found = {name: outside(directory / name, directory) for name in names}
    return {name: target for name, target in found.items() if target is not None}


def link_error(directory: str | Path, name: str, target: Path) -> SourceError:
    """The refusal to copy what a link leads to."""
    link = Path(directory) / name
    return SourceError(
        f"{link}: a link to {target}, outside of the model's folder; its content would become part of the output",
        # No command: who made the folder chose the target, and a command is soon run.
        "look at what the link leads to; if that is of the model, put the file itself in its place",
    )
