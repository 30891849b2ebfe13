"""Small programs that try out what a conversion relies on, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

SECONDS = 90
Probe = dict[str, Any]  # what the program printed; {"error": text} if it failed

TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    usable = torch.cuda.is_available()
gpus = []
for i in range(torch.cuda.device_count() if usable else 0):
    p = torch.cuda.get_device_properties(i)
    free, total = torch.cuda.mem_get_info(i)
    gpus.append(f"{p.name} (sm_{p.major}{p.minor}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free)")
reason = str(caught[-1].message).splitlines()[0] if caught else ""
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "gpus": gpus, "reason": reason}))
"""

KERNEL = """
import json
from importlib import metadata
import numpy as np
from numba import cuda
try:
    package, built_in = "numba-cuda " + metadata.version("numba-cuda"), False
except metadata.PackageNotFoundError:
    package, built_in = "CUDA target of numba " + metadata.version("numba"), True
@cuda.jit
def double(x):
    i = cuda.grid(1)
    if i < x.size:
        x[i] *= 2
x = cuda.to_device(np.arange(64, dtype=np.float32))
double[2, 32](x)
if not np.array_equal(x.copy_to_host(), 2 * np.arange(64, dtype=np.float32)):
    raise RuntimeError("a kernel gave wrong numbers")
print(json.dumps({"package": package, "built_in": built_in}))
"""


def run_probe(program: str, seconds: float = SECONDS) -> Probe:
    """Runs a program that prints one JSON object; {"error": last line of its complaint} if it does not."""
    try:
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, errors="replace", timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} s"}
    except OSError as e:
        return {"error": str(e)}
    if ran.returncode < 0:
        return {"error": f"killed by signal {-ran.returncode}"}
    lines = [line for line in ran.stderr.splitlines() if line.strip()]
    if ran.returncode != 0:
        return {"error": lines[-1].strip()[:300] if lines else f"exit status {ran.returncode}"}
    try:
        found = json.loads(ran.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"unexpected answer {ran.stdout[-200:]!r}"}
    return found if isinstance(found, dict) else {"error": f"unexpected answer {found!r}"}


def nvidia_smi() -> tuple[list[str], str]:
    """(one text per GPU that the driver shows: name, memory, driver version; what went wrong, "" if nothing)."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    fields = "name,memory.used,memory.total,driver_version"
    command = [program, f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired) as e:
        return [], f"nvidia-smi: {e}"
    if ran.returncode != 0:
        return [], f"nvidia-smi: {(ran.stdout or ran.stderr).strip()[:200] or f'exit status {ran.returncode}'}"
    cards = []
    for line in ran.stdout.splitlines():
        parts = [p.strip() for p in line.split(",")]
        if len(parts) == 4:
            cards.append(f"{parts[0]}, {parts[1]} used of {parts[2]}, driver {parts[3]}")
    return cards, ""
