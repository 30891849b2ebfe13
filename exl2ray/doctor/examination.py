"""``exl2ray doctor``: what this machine offers, and what would stop or slow a conversion, each with its remedy.

Everything that may crash or hang (drivers, CUDA libraries, broken installations) is tried in child processes, so that
the doctor survives its patients.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from exl2ray.beneath import existing_parent, resolved
from exl2ray.doctor.diagnosis import OPEN_FILES, Finding, Level, problem
from exl2ray.doctor.gpu_checks import driver_fix, gpus, kernels
from exl2ray.doctor.probes import KERNEL, LAYER, RAY, TORCH, nvidia_smi, run_probe
from exl2ray.doctor.ray_start import ray_cluster, ray_start
from exl2ray.driver.starting import OBJECT_STORE_BYTES
from exl2ray.environment import check_environment, slow_variables
from exl2ray.errors import StoreError, UsageError
from exl2ray.formats.regular import file_kind
from exl2ray.host import SHARED_MEMORY_FIX, container_limit_bytes, main_memory_bytes, nccl_bytes, shared_memory_bytes
from exl2ray.store.open import local_path
from exl2ray.terminal.console import is_terminal, show_text
from exl2ray.terminal.live import show_table
from exl2ray.wording import file_size, plural

PACKAGES = ("torch", "numpy", "numba", "numba-cuda", "ray", "safetensors", "tokenizers", "pyarrow", "click", "rich")
OPTIONAL = ("numba-cuda", "huggingface-hub")
WORK_BYTES = 10 << 30  # of a disk; less is too little for a 7B model at 8 bits and some room
ANOTHER = "choose another directory with -o"


def examine(out_dir: str) -> list[Finding]:
    """All findings, in order of topics. Never raises: a check that fails is itself a finding."""
    if is_terminal(sys.stderr):
        print("trying out torch, a kernel and Ray: this may take a minute", file=sys.stderr)
    with ThreadPoolExecutor(3) as pool:
        named = os.environ.get("RAY_ADDRESS")
        torch_probe, kernel_probe = pool.submit(run_probe, TORCH), pool.submit(run_probe, KERNEL)
        ray_probe = None if named else pool.submit(run_probe, RAY)
        found = _guarded("versions", versions)
        cards, driver_error = nvidia_smi()
        torch_found, kernel_found = torch_probe.result(), kernel_probe.result()
        ray_found = {} if ray_probe is None else ray_probe.result()
    found += _guarded("environment", environment)
    usable = len(torch_found.get("gpus") or [])
    if driver_error:
        found += problem("GPU driver", driver_error, driver_fix(driver_error))
    found += _guarded("GPUs", lambda: gpus(cards, torch_found))
    found += _guarded("kernels", lambda: kernels(bool(cards), torch_found, kernel_found))
    found += _guarded("memory", memory)
    found += _guarded("/dev/shm", lambda: shared_memory(usable))
    found += _guarded("disk", lambda: disks(out_dir))
    found += _guarded("Ray", lambda: ray_cluster(named) if named else ray_start(ray_found, usable))
    return found


def show(findings: list[Finding]) -> None:
    """Prints what was found, then what is wrong with its remedies."""
    show_table("", ["topic", "found", ""], [[f.topic, f.value, "" if f.level == "ok" else f.level] for f in findings])
    wrong = [f for f in findings if f.fix]
    if wrong:
        print()
    for f in wrong:
        show_text(f"{f.level}: {f.topic}: {f.value}")
        show_text(f.fix, "  ")
    problems = sum(f.level == "problem" for f in findings)
    print("\n" + (f"{plural(problems, 'problem')}: a conversion would stop or fail" if problems else "ready to convert"))


def _guarded(topic: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as e:  # a report with a hole is of more use than none
        return [Finding(topic, f"cannot be examined: {type(e).__name__}: {e}", "note", "report this as a defect")]


def versions() -> list[Finding]:
    """exl2ray, Python and the packages, compared with what exl2ray asks for."""
    from packaging.specifiers import SpecifierSet  # Ray depends on it

    from exl2ray import __version__

    tested, text = (3, 10) <= sys.version_info[:2] < (3, 14), f"{platform.python_version()} ({sys.executable})"
    doubt: tuple[Level, str] = ("warning", "exl2ray is tested with Python 3.10 to 3.13")
    found = [Finding("exl2ray", __version__), Finding("Python", text) if tested else Finding("Python", text, *doubt)]
    wanted = _requirements()
    for name in (*PACKAGES, "huggingface-hub"):
        needed = wanted.get(name, "")
        fix = f'pip install "{name}{needed}"'
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            found += [] if name in OPTIONAL else problem(name, "missing", fix)
            continue
        if SpecifierSet(needed).contains(version, prereleases=True):
            found.append(Finding(name, version))
        else:
            found += problem(name, f"{version}, but exl2ray needs {needed}", fix)
    return found


def environment() -> list[Finding]:
    """Variables that would end the first kernel, or leave it uncompiled."""
    topic = "environment"
    try:
        check_environment()
    except UsageError as e:
        return problem(topic, e.message, e.hint)
    found = [Finding(topic, text, "warning", f"unset {name}") for name, text in slow_variables().items()]
    layer = os.environ.get("NUMBA_THREADING_LAYER", "").strip()
    error = str(run_probe(LAYER).get("error", "")) if layer else ""  # it may not be installed
    if error:
        found += problem(topic, f"NUMBA_THREADING_LAYER={layer}: {error}", "unset NUMBA_THREADING_LAYER")
    return found


def _requirements() -> dict[str, str]:
    """Package -> version specifier, as exl2ray's own metadata has it; empty if it is not installed."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("exl2ray") or []
    except metadata.PackageNotFoundError:
        return {}
    return {r.name: str(r.specifier) for r in map(Requirement, lines)}


def memory() -> list[Finding]:
    """Main memory and CPU cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total, limit = main_memory_bytes(), container_limit_bytes()
    text = f"{file_size(total)}, {cores} CPU cores"
    if limit is not None and limit < total:
        text += f"; this container may use {file_size(limit)}"
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [Finding("memory", text)]
    if 0 <= files < OPEN_FILES:
        fix = f"Ray opens many: ulimit -n {OPEN_FILES * 16}"
        found.append(Finding("open files", f"at most {files}", "warning", fix))
    return found


def shared_memory(gpus: int) -> list[Finding]:
    """/dev/shm against the object store of a local Ray, and NCCL where several GPUs work together."""
    usage = shared_memory_bytes()
    needed = nccl_bytes(gpus) if gpus > 1 else 0
    if usage is None:
        level: Level = "problem" if needed else "warning"
        return [Finding("/dev/shm", "missing: Ray keeps its objects in files, slowly", level, SHARED_MEMORY_FIX)]
    free, total = usage
    text = f"{file_size(free)} free of {file_size(total)}"
    if free < needed:
        text += f": too small for {gpus} GPUs that work together, which need {file_size(needed)}"
        return problem("/dev/shm", text, SHARED_MEMORY_FIX)
    if free < OBJECT_STORE_BYTES:
        text += f"; Ray wants {file_size(OBJECT_STORE_BYTES)}, and keeps its objects in files otherwise, slowly"
        return [Finding("/dev/shm", text, "warning", SHARED_MEMORY_FIX)]
    return [Finding("/dev/shm", f"{text}; Ray wants {file_size(OBJECT_STORE_BYTES)}")]


def disks(out_dir: str) -> list[Finding]:
    """Room for the work directory and for the temporary files of Ray."""
    topic = "work directory"
    try:
        path = local_path(out_dir)
        if path is None:
            work = [Finding(topic, f"{out_dir}: an object store, not examined")]
        else:
            work = _disk(topic, resolved(path), ANOTHER)
    except StoreError as e:
        work = problem(topic, e.message, e.hint)
    except OSError as e:
        work = problem(topic, f"{out_dir}: {e.strerror or e}", ANOTHER)
    topic, otherwise = "temporary files", "set TMPDIR to another directory"
    try:
        return work + _disk(topic, tempfile.gettempdir(), otherwise)
    except FileNotFoundError:  # Python tries several
        text = "no folder for them can be written; models that are elsewhere need one, and so does Ray"
        return [*work, Finding(topic, text, "warning", otherwise)]


def _disk(topic: str, path: str, otherwise: str) -> list[Finding]:
    """What there is at a path, or above it where there is nothing yet."""
    place = existing_parent(Path(path))
    if not place.is_dir():
        mode = place.stat().st_mode
        kind = "a file" if stat.S_ISREG(mode) else file_kind(mode)
        return problem(topic, f"{place} is {kind}, not a directory", otherwise)
    if not os.access(place, os.W_OK):
        return problem(topic, f"{place} cannot be written", otherwise)
    usage = shutil.disk_usage(place)
    text = f"{file_size(usage.free)} free of {file_size(usage.total)} at {place}"
    if topic == "work directory" and usage.free < WORK_BYTES:
        needed = "a 7B model needs 4 GB at 4 bits and 8 GB at 8, work files and output together"
        return [Finding(topic, text, "warning", needed)]
    if usage.free < usage.total * 0.05:
        return [Finding(topic, text, "warning", "Ray warns and may fail above 95 %: free space, or set TMPDIR")]
    return [Finding(topic, text)]


