"""The doctor's look at GPUs: cards, driver, torch, Numba's kernels, and why one of them does not work with the others."""

from __future__ import annotations

import os
import re
from pathlib import Path

from exl2ray.doctor.diagnosis import Finding, Remedies, problem, remedy
from exl2ray.doctor.probes import Probe
from exl2ray.host import nvidia_cards, nvidia_device_files, nvidia_driver_loaded
from exl2ray.wording import plural

DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}  # CUDA of torch -> oldest driver (CUDA release notes, Linux)
CARD_FIXES: Remedies = {
    ("no kernel image",): "this torch was not built for that kind of GPU: install another build",
    ("busy or unavailable",): "another process has it for itself: nvidia-smi -c DEFAULT",
    ("out of memory",): "another process fills it: see nvidia-smi",
}
DRIVER_FIXES: Remedies = {
    ("mismatch",): "the driver was updated while it ran: reboot",
    ("communicate with the NVIDIA driver",):
        "the driver is not loaded: sudo modprobe nvidia; after a kernel update install it again and reboot",
    ("No devices",):
        "the card is not seen: is it seated, powered and passed through to this machine? lspci | grep -i nvidia",
}  # fmt: skip


def gpus(cards: list[str], torch_found: Probe) -> list[Finding]:
    """What the driver shows against what torch can use."""
    found = [Finding(f"GPU {i}", card) for i, card in enumerate(cards)]
    if "error" in torch_found:
        fix = "reinstall torch: pip install --force-reinstall torch"
        return found + problem("torch", f"does not work: {torch_found['error']}", fix)
    usable = torch_found.get("gpus") or []
    if usable:
        text = f"{torch_found.get('cuda') or ''}, uses {plural(len(usable), 'GPU')}: {', '.join(usable)}"
        found.append(Finding("torch CUDA", text))
        for i, error in (torch_found.get("broken") or {}).items():
            fix = remedy(str(error), CARD_FIXES, "look at nvidia-smi and dmesg; a reset or a reboot may do")
            text = f"{usable[int(i)]} does not compute: {error}"
            found += problem(f"GPU {int(i)}", text, f"{fix}; CUDA_VISIBLE_DEVICES can leave it out")
        return found
    return found + (problem("torch CUDA", *_unusable(cards[0], torch_found)) if cards else no_card(Path("/")))


def _unusable(card: str, torch_found: Probe) -> tuple[str, str]:
    """(why torch uses no GPU where `probes.nvidia_smi` shows this card, what to do)."""
    version, built = torch_found.get("version"), torch_found.get("cuda") or ""
    if torch_found.get("hip"):
        return f"torch {version} is a ROCm build", "the GPU path needs NVIDIA's CUDA: install a CUDA build of torch"
    if not built:
        return f"torch {version} is a build without CUDA", "pip install torch from an index with CUDA builds"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs", "unset CUDA_VISIBLE_DEVICES, or name GPUs in it"
    driver, oldest = re.search(r"driver (\d+)\.(\d+)", card), DRIVERS.get(int(built.split(".")[0]))
    have = (int(driver[1]), int(driver[2])) if driver else (0, 0)
    if driver and oldest and have < oldest:
        older = [cuda for cuda, wanted in DRIVERS.items() if have >= wanted]
        other = f", or install a torch built for CUDA {max(older)}" if older else ""
        needs = f"a torch built for CUDA {built}, which needs {oldest[0]}.{oldest[1]} or newer"
        return f"driver {driver[1]}.{driver[2]} is too old for {needs}", f"update the NVIDIA driver{other}"
    fix = f"the driver may be too old for CUDA {built}: update it, or install a torch built for an older CUDA"
    return torch_found.get("reason") or "torch sees no GPU", fix


def no_card(root: Path) -> list[Finding]:
    """Why nvidia-smi shows nothing. ``root``: of the file system that is looked at."""
    if nvidia_driver_loaded(root) and not nvidia_device_files(root):
        fix = "Docker: --gpus all with the NVIDIA Container Toolkit; Kubernetes: resources.limits nvidia.com/gpu: 1"
        return problem("GPUs", "the NVIDIA driver is loaded, but this container was given no GPU", fix)
    if nvidia_device_files(root):
        fix = "put the driver's programs on PATH (WSL: /usr/lib/wsl/lib)"
        return problem("GPUs", "there are device files of an NVIDIA GPU, but no nvidia-smi", fix)
    cards = nvidia_cards(root)
    if cards:
        fix = "install NVIDIA's driver and reboot (Ubuntu: ubuntu-drivers install); the open nouveau driver has no CUDA"
        return problem("GPUs", f"{plural(cards, 'NVIDIA card')} without a driver", fix)
    return [Finding("GPUs", "none (nvidia-smi shows no NVIDIA driver)", "note", "conversion runs on the CPU, slowly")]


def driver_fix(error: str) -> str:
    """What to do about a complaint of nvidia-smi."""
    return remedy(error, DRIVER_FIXES, "repair or update the NVIDIA driver; a reboot may do")


def kernels(has_cards: bool, torch_found: Probe, kernel_found: Probe) -> list[Finding]:
    """Whether Numba compiles and runs a kernel on the GPU."""
    error = str(kernel_found.get("error", ""))
    trap = "row_stack" in error  # gone from numpy 2.5, still imported by numba-cuda 0.30
    if not error:
        text = f"{kernel_found.get('package')}, compiled and ran a kernel"
        if kernel_found.get("built_in"):
            return [Finding("Numba CUDA", text, "warning", 'that target is deprecated: pip install "exl2ray[cuda]"')]
        return [Finding("Numba CUDA", text)]
    if not has_cards:
        return [Finding("Numba CUDA", error, "warning", 'pip install "numpy<2.5"')] if trap else []
    built = str(torch_found.get("cuda") or "").split(".")[0]
    libraries = f'pip install "numba-cuda[cu{built or "12"}]"'
    value, fix = error, 'pip install --upgrade "exl2ray[cuda]"; check the driver'
    if trap:
        fix = 'numba-cuda does not work with this numpy: pip install "numpy<2.5"'
    elif "No module named" in error:
        value, fix = f"numba-cuda is missing ({error})", 'pip install "exl2ray[cuda]"'
    elif any(name in error.lower() for name in ("nvvm", "nvrtc", "nvjitlink")):
        value = f"CUDA's compiler libraries are missing: {error}"
        fix = f"{libraries}, which brings them (nvidia-cuda-nvcc and others)"
    elif "PTX" in error:
        value = f"CUDA's compiler libraries do not fit the driver: {error}"
        fix = f"they are newer than the driver: check the driver above, or {libraries}"
    return problem("Numba CUDA", value, fix)
