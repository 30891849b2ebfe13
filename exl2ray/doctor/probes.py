"""Small programs that try out what a conversion relies on, each in a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import Any

from exl2ray.driver.starting import trusted_folder

SECONDS = 90
Probe = dict[str, Any]  # what the program printed; {"error": text} if it failed

TORCH = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    usable = torch.cuda.is_available()
gpus, broken = [], {}
for i in range(torch.cuda.device_count() if usable else 0):
    p = torch.cuda.get_device_properties(i)
    name = f"{p.name} (sm_{p.major}{p.minor}"
    try:
        free, total = torch.cuda.mem_get_info(i)
        name += f", {free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        if torch.ones(64, device=f"cuda:{i}").sum().item() != 64:
            raise RuntimeError("a sum came out wrong")
    except Exception as e:
        broken[str(i)] = (str(e).strip().splitlines() or [type(e).__name__])[0]
    gpus.append(name + ")")
reason = str(caught[-1].message).splitlines()[0] if caught else ""
print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "hip": getattr(torch.version, "hip", None),
                  "gpus": gpus, "broken": broken, "reason": reason}))
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

LAYER = """
import json
import numba
try:
    numba.set_num_threads(1)
except ValueError as e:
    raise SystemExit(" ".join(str(e).split()))
print(json.dumps({"layer": numba.config.THREADING_LAYER}))
"""

RAY = """
import json, time
begin = time.monotonic()
from exl2ray.driver.starting import start_ray, stop_ray
ray = start_ray("local")
answer = ray.get(ray.remote(num_cpus=1)(lambda: 6 * 7).remote(), timeout=60)
if answer != 42:
    raise RuntimeError(f"a task answered {answer!r}")
stop_ray()
print(json.dumps({"version": ray.__version__, "seconds": time.monotonic() - begin}))
"""


def run_probe(program: str, seconds: float = SECONDS) -> Probe:
    """Runs a program that prints one JSON object; {"error": last line of its complaint} if it does not."""
    try:
        ran = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, errors="replace", timeout=seconds, check=False,
            cwd=trusted_folder(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {seconds:g} s"}
    except OSError as e:
        return {"error": str(e)}
    if ran.returncode < 0:
        return {"error": f"killed by signal {-ran.returncode}"}
    if ran.returncode != 0:
        return {"error": _complaint(ran.stderr) or f"exit status {ran.returncode}"}
    try:
        found = json.loads(ran.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return {"error": f"unexpected answer {ran.stdout[-200:]!r}"}
    return found if isinstance(found, dict) else {"error": f"unexpected answer {found!r}"}


def _complaint(text: str) -> str:
    """The last line of a traceback; of an error of our own the line with the message, not the hint after it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    while len(lines) > 1 and lines[-1].startswith("hint: "):
        lines.pop()
    return lines[-1][:400] if lines else ""


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
