"""Environment variables that libraries beneath a conversion read when they are loaded: what would end it, or make it crawl.

Loads none of them: `doctor` asks before anything is tried.
"""

from __future__ import annotations

import os
import re

from exl2ray.errors import UsageError

# What Numba and OpenMP read when they are loaded, and end with or pass over where it makes no sense.
_COUNTS = re.compile(r"NUMBA_NUM_THREADS=0*[1-9]\d*|OMP_NUM_THREADS=\d+(,\s*\d+)*", re.ASCII)  # OpenMP: one a level
_LAYERS = ("default", "safe", "threadsafe", "forksafe", "tbb", "omp", "workqueue")
_SLOW = {
    "NUMBA_DISABLE_JIT": "kernels are not compiled but run in Python: a conversion takes very long",
    "NUMBA_ENABLE_CUDASIM": "CUDA kernels are simulated, and not run on a GPU",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for: a GPU stands idle between them",
}


def check_environment() -> None:
    """Raises UsageError for a variable that would end the first kernel, or count for nothing."""
    for name in ("NUMBA_NUM_THREADS", "OMP_NUM_THREADS"):
        value = os.environ.get(name, "").strip()
        if value and not _COUNTS.fullmatch(f"{name}={value}"):
            raise UsageError(f"environment variable {name} is {value[:40]!r}, not a number of threads", f"unset {name}")
    layer = os.environ.get("NUMBA_THREADING_LAYER", "").strip()
    if layer and layer not in _LAYERS:
        text = f"environment variable NUMBA_THREADING_LAYER is {layer[:40]!r}, not one of {', '.join(_LAYERS)}"
        raise UsageError(text, "unset NUMBA_THREADING_LAYER")


def slow_variables() -> dict[str, str]:
    """Variables that are left from debugging, and what they do: numbers other than 0, as the libraries read them."""
    return {name: f"{name}={value}: {text}" for name, text in _SLOW.items() if _is_on(value := os.environ.get(name, ""))}


def _is_on(value: str) -> bool:
    try:
        return int(value) != 0
    except ValueError:
        return False
