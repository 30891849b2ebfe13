"""Versions of what results depend on."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib import metadata

from exl2ray import __version__


def versions() -> dict[str, str]:
    """Of software that matters to results, here: for job.json, and compared wherever workers run."""
    out = {"exl2ray": __version__, "python": platform.python_version()}
    for package in ("torch", "numpy", "numba", "ray"):
        with suppress(metadata.PackageNotFoundError):
            out[package] = metadata.version(package)
    return out
