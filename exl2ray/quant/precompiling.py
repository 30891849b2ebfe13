"""Kernels, compiled by processes beside this one where they are not in Numba's cache.

Numba compiles one kernel at a time in a process, whatever its threads. So on a machine that never ran them up to three more
processes do, while this one imports torch. They do without it (`exl2ray.cuda.compiling`): a process that imported it as well,
to run the solver, had the solver's kernels at 9.7 s of a start of 10.3. Whether they succeed is of no consequence: what is
missing is compiled where it is needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from exl2ray.quality import Numerics
from exl2ray.stopping import at_the_end

PATIENCE = 120  # seconds, for a process that hangs, or whose parent was killed
# Its path first of all: the current directory may be a model's. It ends at once: taking CUDA down takes a third of a second.
BOOT = (
    f"import sys; sys.path[:] = sys.argv[2:]; import signal; signal.alarm({PATIENCE}); "
    "from exl2ray.cuda.compiling import compile_kernels; compile_kernels(sys.argv[1].split()); import os; os._exit(0)"
)
Processes = Sequence["subprocess.Popen[bytes]"]


def begin(numerics: Numerics) -> Processes:
    """The processes, which end with this one; none if there is nothing for them to do, or no GPU."""
    if not has_gpu():
        return ()
    from exl2ray.cuda import compiling  # makes the folder of the cache

    wanted = compiling.needed(numerics.target_correction > 0, numerics.scale_search == "feedback")
    missing = [name for name in wanted if not compiling.cached(name)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return [child for share in compiling.shared_out(missing, cores) if (child := _begun(share)) is not None]


def _begun(names: Sequence[str]) -> subprocess.Popen[bytes] | None:
    with suppress(OSError):
        child = subprocess.Popen(
            [sys.executable, "-c", BOOT, " ".join(names), *(p for p in sys.path if p)], stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        at_the_end(child.kill)  # which does nothing to one that has been waited for
        return child
    return None


def begin_context(name: str) -> Callable[[], None]:
    """`exl2ray.cuda.context.begin`."""
    from exl2ray.cuda import context

    return context.begin(name)


def finish(children: Processes) -> None:
    """Waits for their ends, however they end."""
    last = time.monotonic() + PATIENCE
    for child in children:
        try:
            child.wait(max(0.0, last - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def has_gpu() -> bool:
    """As far as can be told without torch."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path("/dev").glob("nvidia[0-9]*"))
