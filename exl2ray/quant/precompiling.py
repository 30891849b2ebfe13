"""The solver's kernels, compiled by a process beside this one where they are not in Numba's cache.

Numba compiles one kernel at a time in a process, whatever its threads. So on a machine that never ran them a second process
does the larger half (3 of 7 s on an H200), and does so while this one is importing torch; what it finds is in the cache then.
Whether it succeeds is of no consequence: what is missing is compiled where it is needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from exl2ray.quality import Numerics
from exl2ray.stopping import at_the_end

PATIENCE = 120  # seconds, for a process that hangs, or whose parent was killed
# Its path first of all: the current directory may be a model's. It ends at once: taking CUDA down takes a third of a second.
BOOT = (
    f"import sys; sys.path[:] = sys.argv[2:]; import signal; signal.alarm({PATIENCE}); "
    "from exl2ray.quant.warm import compile_solver; compile_solver(sys.argv[1]); import os; os._exit(0)"
)


def begin(numerics: Numerics) -> subprocess.Popen[bytes] | None:
    """The process, which ends with this one; None if there is nothing for it to do, or no GPU."""
    if not _has_gpu() or _are_cached():
        return None
    paths = [p for p in sys.path if p]
    with suppress(OSError):
        child = subprocess.Popen(
            [sys.executable, "-c", BOOT, json.dumps(asdict(numerics)), *paths], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        at_the_end(child.kill)  # which does nothing to one that has been waited for
        return child
    return None


def finish(child: subprocess.Popen[bytes] | None) -> None:
    """Waits for its end, however it ends."""
    if child is None:
        return
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _has_gpu() -> bool:
    """As far as can be told without torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path("/dev").glob("nvidia[0-9]*"))


def _are_cached() -> bool:
    """Whether there are kernels of this version; Numba itself looks closer."""
    from exl2ray import cuda  # makes the folder of the cache

    sources = [Path(cuda.__file__).with_name(f"{name}.py") for name in ("kernels", "settle")]
    with suppress(OSError):
        changed = max(path.stat().st_mtime for path in sources)
        cached = Path(os.environ["NUMBA_CACHE_DIR"]).glob("**/settle.*.nbi")
        return any(path.stat().st_mtime >= changed for path in cached)
    return False
