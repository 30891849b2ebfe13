"""Kernels: Numba CUDA for GPUs, Numba njit for CPUs. Each has a plain torch reference in ``exl2ray.quant``.

Compiled kernels are cached per user and machine: a package folder may be read-only, or shared by nodes that differ.
"""

import os
import stat
import tempfile
from contextlib import suppress

from exl2ray.environment import check_environment


def _cache_folder() -> str:
    """A folder that nobody else can have made or write to: what numba finds in its cache it runs."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), "__pycache__")
    user = os.getuid() if hasattr(os, "getuid") else "user"
    try:
        place = os.path.abspath(tempfile.gettempdir())
        # The last resort of tempfile is the current directory: it may be the folder of a model, with a cache in it.
        if place == os.getcwd() and not os.stat(place).st_mode & stat.S_ISVTX:
            return beside
        folder = os.path.join(place, f"exl2ray-numba-{user}")
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return folder
        return tempfile.mkdtemp(prefix="exl2ray-numba-")
    except OSError:  # no room: where numba cannot write, it does without
        return beside


check_environment()
if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = _cache_folder()
