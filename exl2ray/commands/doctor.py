"""``exl2ray doctor``: what this machine offers, and what would stop or slow a conversion, each with its remedy.

Everything that may crash or hang (drivers, CUDA libraries, broken installations) is tried in child processes, so that
the doctor survives its patients.
"""

from __future__ import annotations

import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from exl2ray.commands.probes import KERNEL, TORCH, Probe, nvidia_smi, run_probe
from exl2ray.console import clean, file_size, plural, show_table

Level = Literal["ok", "note", "warning", "problem"]
PACKAGES = ("torch", "numpy", "numba", "numba-cuda", "ray", "safetensors", "tokenizers", "pyarrow", "click", "rich")
OPTIONAL = ("numba-cuda", "huggingface-hub")
STORE_BYTES = 256 << 20  # that a local Ray of ours asks of /dev/shm
STORE_LEAST_BYTES = 80 << 20  # below this Ray does not start
OPEN_FILES = 4096
WORK_BYTES = 10 << 30


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says what to do where ``level`` is not "ok"."""

    topic: str
    value: str
    level: Level = "ok"
    fix: str = ""


def examine(out_dir: str) -> list[Finding]:
    """All findings, in order of topics. Never raises: a check that fails is itself a finding."""
    with ThreadPoolExecutor(2) as pool:
        torch_probe, kernel_probe = pool.submit(run_probe, TORCH), pool.submit(run_probe, KERNEL)
        found = _guarded("versions", versions)
        cards, driver_error = nvidia_smi()
        torch_found, kernel_found = torch_probe.result(), kernel_probe.result()
    if driver_error:
        found.append(Finding("GPU driver", driver_error, "problem", "repair or update the NVIDIA driver; a reboot may do"))
    found += _guarded("GPUs", lambda: gpus(cards, torch_found))
    found += _guarded("kernels", lambda: kernels(bool(cards), torch_found, kernel_found))
    found += _guarded("memory", memory)
    found += _guarded("/dev/shm", shared_memory)
    found += _guarded("disk", lambda: disks(out_dir))
    found += _guarded("Ray", ray_settings)
    return found


def show(findings: list[Finding]) -> None:
    show_table("", ["topic", "found", ""], [[f.topic, f.value, "" if f.level == "ok" else f.level] for f in findings])
    wrong = [f for f in findings if f.fix]
    if wrong:
        print()
    for f in wrong:
        print(clean(f"{f.level}: {f.topic}: {f.value}\n  {f.fix}"))
    problems = sum(f.level == "problem" for f in findings)
    print("\n" + (f"{plural(problems, 'problem')}: a conversion would stop or fail" if problems else "ready to convert"))


def _guarded(topic: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except Exception as e:  # a report with a hole is of more use than none
        return [Finding(topic, f"cannot be examined: {type(e).__name__}: {e}", "note", "report this as a defect")]


def versions() -> list[Finding]:
    """exl2ray, Python and the packages, compared with what exl2ray asks for."""
    from exl2ray import __version__

    python = f"{platform.python_version()} ({sys.executable})"
    found = [Finding("exl2ray", __version__), _python(python)]
    wanted = _requirements()
    for name in (*PACKAGES, "huggingface-hub"):
        needed = wanted.get(name, "")
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in OPTIONAL:
                found.append(Finding(name, "missing", "problem", f'pip install "{name}{needed}"'))
            continue
        if needed and not _satisfied(version, needed):
            fix = f'pip install "{name}{needed}"'
            found.append(Finding(name, f"{version}, but exl2ray needs {needed}", "problem", fix))
        else:
            found.append(Finding(name, version))
    return found


def _python(text: str) -> Finding:
    if (3, 10) <= sys.version_info[:2] < (3, 14):
        return Finding("Python", text)
    return Finding("Python", text, "warning", "exl2ray is tested with Python 3.10 to 3.13")


def _requirements() -> dict[str, str]:
    """Package -> version specifier, as exl2ray's own metadata has it; empty if it is not installed."""
    from packaging.requirements import Requirement  # Ray depends on it

    try:
        lines = metadata.requires("exl2ray") or []
    except metadata.PackageNotFoundError:
        return {}
    return {r.name: str(r.specifier) for r in map(Requirement, lines)}


def _satisfied(version: str, specifier: str) -> bool:
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(specifier).contains(version, prereleases=True)


def gpus(cards: list[str], torch_found: Probe) -> list[Finding]:
    """What the driver shows against what torch can use."""
    found = [Finding(f"GPU {i}", card) for i, card in enumerate(cards)]
    if "error" in torch_found:
        fix = "reinstall torch: pip install --force-reinstall torch"
        return [*found, Finding("torch", f"does not work: {torch_found['error']}", "problem", fix)]
    built = torch_found.get("cuda") or ""
    usable = torch_found.get("gpus") or []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if usable:
        return [*found, Finding("torch CUDA", f"{built}, uses {plural(len(usable), 'GPU')}: {', '.join(usable)}")]
    if not cards:
        return [Finding("GPUs", "none (nvidia-smi shows no NVIDIA driver)", "note", "conversion runs on the CPU, slowly")]
    if not built:
        value = f"torch {torch_found.get('version')} is a build without CUDA"
        return [*found, Finding("torch CUDA", value, "problem", "pip install torch from an index with CUDA builds")]
    if visible is not None:
        value, fix = f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs", "unset CUDA_VISIBLE_DEVICES, or name GPUs in it"
        return [*found, Finding("torch CUDA", value, "problem", fix)]
    reason = torch_found.get("reason") or "torch sees no GPU"
    fix = f"the driver may be too old for CUDA {built}: update it, or install a torch built for an older CUDA"
    return [*found, Finding("torch CUDA", str(reason), "problem", fix)]


def kernels(has_cards: bool, torch_found: Probe, kernel_found: Probe) -> list[Finding]:
    """Whether Numba compiles and runs a kernel on the GPU."""
    error = str(kernel_found.get("error", ""))
    if not error:
        text = f"{kernel_found.get('package')}, compiled and ran a kernel"
        if kernel_found.get("built_in"):
            return [Finding("Numba CUDA", text, "warning", 'that target is deprecated: pip install "exl2ray[cuda]"')]
        return [Finding("Numba CUDA", text)]
    if not has_cards:
        if not _trap(error):
            return []
        return [Finding("Numba CUDA", error, "warning", 'pip install "numpy<2.5"')]
    if _trap(error):
        return [Finding("Numba CUDA", error, "problem", 'numba-cuda does not work with this numpy: pip install "numpy<2.5"')]
    if "No module named" in error:
        return [Finding("Numba CUDA", error, "problem", 'pip install "exl2ray[cuda]"')]
    if "nvvm" in error.lower() or "libnvrtc" in error.lower():
        return [Finding("Numba CUDA", error, "problem", "CUDA's compiler is missing: pip install nvidia-cuda-nvcc-cu12")]
    return [Finding("Numba CUDA", error, "problem", 'pip install --upgrade "exl2ray[cuda]"; check the driver')]


def _trap(error: str) -> bool:
    return "row_stack" in error  # gone from numpy 2.5, still imported by numba-cuda 0.30


def memory() -> list[Finding]:
    """Main memory and CPU cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _container_limit()
    text = f"{file_size(total)}, {cores} CPU cores"
    if limit is not None and limit < total:
        text += f"; this container may use {file_size(limit)}"
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = [Finding("memory", text)]
    if 0 <= files < OPEN_FILES:
        fix = f"Ray opens many: ulimit -n {OPEN_FILES * 16}"
        found.append(Finding("open files", f"at most {files}", "warning", fix))
    return found


def _container_limit() -> int | None:
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def shared_memory() -> list[Finding]:
    """/dev/shm against the object store of a local Ray."""
    try:
        usage = shutil.disk_usage("/dev/shm")
    except OSError:
        return [Finding("/dev/shm", "missing", "warning", "Ray will keep its objects in files, slowly")]
    text = f"{file_size(usage.free)} free of {file_size(usage.total)}; Ray wants {file_size(STORE_BYTES)}"
    fix = "in Docker: docker run --shm-size=1g; in Kubernetes: an emptyDir with medium Memory on /dev/shm"
    if usage.free * 0.8 >= STORE_BYTES:
        return [Finding("/dev/shm", text)]
    return [Finding("/dev/shm", text, "warning" if usage.free * 0.8 >= STORE_LEAST_BYTES else "problem", fix)]


def disks(out_dir: str) -> list[Finding]:
    """Room for the work directory and for the temporary files of Ray."""
    found = []
    for topic, path in (("work directory", out_dir), ("temporary files", tempfile.gettempdir())):
        if "://" in path:
            found.append(Finding(topic, f"{path}: an object store, not examined"))
            continue
        place = Path(path).absolute()
        while not place.exists():
            place = place.parent
        usage = shutil.disk_usage(place)
        text = f"{file_size(usage.free)} free of {file_size(usage.total)} at {place}"
        if not os.access(place, os.W_OK):
            found.append(Finding(topic, f"{place} cannot be written", "problem", "choose another directory with -o"))
        elif topic == "work directory" and usage.free < WORK_BYTES:
            found.append(Finding(topic, text, "warning", "a 7B model needs about 15 GB for work files and output"))
        elif usage.free < usage.total * 0.05:
            found.append(Finding(topic, text, "warning", "Ray warns and may fail above 95 %: free space, or set TMPDIR"))
        else:
            found.append(Finding(topic, text))
    return found


def ray_settings() -> list[Finding]:
    """The Ray that a conversion would use."""
    address = os.environ.get("RAY_ADDRESS")
    if address is None:
        return [Finding("Ray cluster", "none named: a conversion starts a private local one")]
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        answer = "" if ran.returncode == 0 else (ran.stderr or ran.stdout).strip().splitlines()[-1][:200]
    except (OSError, subprocess.TimeoutExpired) as e:
        answer = str(e)[:200]
    except IndexError:
        answer = "no answer"
    if not answer:
        return [Finding("Ray cluster", f"RAY_ADDRESS={address} answers")]
    fix = "unset RAY_ADDRESS for a private local Ray, or start the cluster"
    return [Finding("Ray cluster", f"RAY_ADDRESS={address} does not answer: {answer}", "problem", fix)]
