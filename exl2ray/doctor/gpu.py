"""The doctor's look at GPUs: cards, driver, torch, Numba's kernels, and why one of them does not work with the others."""

from __future__ import annotations

import os
import re
from pathlib import Path

from exl2ray.doctor.findings import Finding
from exl2ray.doctor.probes import Probe
from exl2ray.host import nvidia_cards, nvidia_device_files, nvidia_driver_loaded
from exl2ray.terminal.console import plural

DRIVERS = {11: "450.80", 12: "525.60", 13: "580.65"}  # CUDA of torch -> oldest driver (CUDA release notes, Linux)


def gpus(cards: list[str], torch_found: Probe) -> list[Finding]:
    """What the driver shows against what torch can use."""
    found = [Finding(f"GPU {i}", card) for i, card in enumerate(cards)]
    if "error" in torch_found:
        fix = "reinstall torch: pip install --force-reinstall torch"
        return [*found, Finding("torch", f"does not work: {torch_found['error']}", "problem", fix)]
    built = torch_found.get("cuda") or ""
    usable = torch_found.get("gpus") or []
    if usable:
        found.append(Finding("torch CUDA", f"{built}, uses {plural(len(usable), 'GPU')}: {', '.join(usable)}"))
        return found + [_broken(int(i), usable, str(error)) for i, error in (torch_found.get("broken") or {}).items()]
    if not cards:
        return [*found, *no_card(Path("/"))]
    version = torch_found.get("version")
    if torch_found.get("hip"):
        value, fix = f"torch {version} is a ROCm build", "the GPU path needs NVIDIA's CUDA: install a CUDA build of torch"
        return [*found, Finding("torch CUDA", value, "problem", fix)]
    if not built:
        value = f"torch {version} is a build without CUDA"
        return [*found, Finding("torch CUDA", value, "problem", "pip install torch from an index with CUDA builds")]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        value, fix = f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs", "unset CUDA_VISIBLE_DEVICES, or name GPUs in it"
        return [*found, Finding("torch CUDA", value, "problem", fix)]
    return [*found, _old_driver(cards[0], built) or _unusable(built, torch_found.get("reason"))]


def _old_driver(card: str, built: str) -> Finding | None:
    """The driver of a card, as `probes.nvidia_smi` describes it, against the CUDA that torch was built for."""
    driver = re.search(r"driver (\d+)\.(\d+)", card)
    oldest = DRIVERS.get(int(built.split(".")[0]))
    if driver is None or oldest is None:
        return None
    have = (int(driver[1]), int(driver[2]))
    if have >= _numbers(oldest):
        return None
    value = f"driver {driver[1]}.{driver[2]} is too old for a torch built for CUDA {built}, which needs {oldest} or newer"
    older = [cuda for cuda, wanted in DRIVERS.items() if have >= _numbers(wanted)]
    other = f", or install a torch built for CUDA {max(older)}" if older else ""
    return Finding("torch CUDA", value, "problem", f"update the NVIDIA driver{other}")


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")
    return int(major), int(minor)


def _unusable(built: str, reason: str | None) -> Finding:
    fix = f"the driver may be too old for CUDA {built}: update it, or install a torch built for an older CUDA"
    return Finding("torch CUDA", reason or "torch sees no GPU", "problem", fix)


def _broken(index: int, names: list[str], error: str) -> Finding:
    """A GPU that torch lists and that does not compute."""
    fix = "look at nvidia-smi and dmesg; a reset or a reboot may do"
    if "no kernel image" in error:
        fix = "this torch was not built for that kind of GPU: install another build"
    elif "busy or unavailable" in error:
        fix = "another process has it for itself: nvidia-smi -c DEFAULT"
    elif "out of memory" in error:
        fix = "another process fills it: see nvidia-smi"
    fix += "; CUDA_VISIBLE_DEVICES can leave it out"
    return Finding(f"GPU {index}", f"{names[index]} does not compute: {error}", "problem", fix)


def no_card(root: Path) -> list[Finding]:
    """Why nvidia-smi shows nothing. ``root``: of the file system that is looked at."""
    if nvidia_driver_loaded(root) and not nvidia_device_files(root):
        value = "the NVIDIA driver is loaded, but this container was given no GPU"
        fix = "Docker: --gpus all with the NVIDIA Container Toolkit; Kubernetes: resources.limits nvidia.com/gpu: 1"
        return [Finding("GPUs", value, "problem", fix)]
    if nvidia_device_files(root):
        value = "there are device files of an NVIDIA GPU, but no nvidia-smi"
        return [Finding("GPUs", value, "problem", "put the driver's programs on PATH (WSL: /usr/lib/wsl/lib)")]
    cards = nvidia_cards(root)
    if cards:
        fix = "install NVIDIA's driver and reboot (Ubuntu: ubuntu-drivers install); the open nouveau driver has no CUDA"
        return [Finding("GPUs", f"{plural(cards, 'NVIDIA card')} without a driver", "problem", fix)]
    return [Finding("GPUs", "none (nvidia-smi shows no NVIDIA driver)", "note", "conversion runs on the CPU, slowly")]


def driver_fix(error: str) -> str:
    """What to do about a complaint of nvidia-smi."""
    if "mismatch" in error:
        return "the driver was updated while it ran: reboot"
    if "communicate with the NVIDIA driver" in error:
        return "the driver is not loaded: sudo modprobe nvidia; after a kernel update install it again and reboot"
    if "No devices" in error:
        return "the card is not seen: is it seated, powered and passed through to this machine? lspci | grep -i nvidia"
    return "repair or update the NVIDIA driver; a reboot may do"


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
        return [Finding("Numba CUDA", f"numba-cuda is missing ({error})", "problem", 'pip install "exl2ray[cuda]"')]
    built = str(torch_found.get("cuda") or "").split(".")[0]
    if any(name in error.lower() for name in ("nvvm", "nvrtc", "nvjitlink")):
        fix = f'pip install "numba-cuda[cu{built or "12"}]", which brings them (nvidia-cuda-nvcc and others)'
        return [Finding("Numba CUDA", f"CUDA's compiler libraries are missing: {error}", "problem", fix)]
    if "PTX" in error:
        fix = f'they are newer than the driver: check the driver above, or pip install "numba-cuda[cu{built or "12"}]"'
        return [Finding("Numba CUDA", f"CUDA's compiler libraries do not fit the driver: {error}", "problem", fix)]
    return [Finding("Numba CUDA", error, "problem", 'pip install --upgrade "exl2ray[cuda]"; check the driver')]


def _trap(error: str) -> bool:
    return "row_stack" in error  # gone from numpy 2.5, still imported by numba-cuda 0.30
