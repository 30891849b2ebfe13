"""Kernels: Numba CUDA for GPUs, Numba njit for CPUs. Each has a plain torch reference in ``exl2ray.quant``.

Compiled kernels are cached per user and machine: a package folder may be read-only, or shared by nodes that differ.
"""

import os
import stat
import tempfile
from contextlib import suppress


def _cache_folder() -> str:
    """A folder that nobody else can have made or write to: what numba finds in its cache it runs."""
    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = os.path.join(tempfile.gettempdir(), f"exl2ray-numba-{user}")
    try:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        found = os.lstat(folder)
        if stat.S_ISDIR(found.st_mode) and found.st_uid == user and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return folder
        return tempfile.mkdtemp(prefix="exl2ray-numba-")
    except OSError:  # no room: numba does without
        return folder


if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = _cache_folder()
