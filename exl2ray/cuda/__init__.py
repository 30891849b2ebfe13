"""Kernels: Numba CUDA for GPUs, Numba njit for CPUs. Each has a plain torch reference in ``exl2ray.quant``.

Compiled kernels are cached per user and machine: a package folder may be read-only, or shared by nodes that differ.
"""

import os
import tempfile

_user = os.getuid() if hasattr(os, "getuid") else "user"
os.environ.setdefault("NUMBA_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"exl2ray-numba-{_user}"))
