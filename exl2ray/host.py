"""What this machine offers to a process: main memory, shared memory, NVIDIA cards and their driver. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

NCCL_SEGMENT_BYTES = 9_637_888  # of shared memory: what NCCL's own message asks for when a segment cannot be made
SHARED_MEMORY_FIX = "in Docker: docker run --shm-size=1g; in Kubernetes: an emptyDir with medium Memory on /dev/shm"
_NVIDIA, _DISPLAYS = "0x10de", "0x03"  # PCI vendor, class of display controllers
_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def main_memory_bytes() -> int:
    """Main memory of the machine in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container_limit_bytes() -> int | None:
    """Bytes of main memory that a container may use; None without a limit."""
    for name in _LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def usable_memory_bytes() -> int:
    """Bytes of main memory that this process may use: all of it, or as much as its container may."""
    total, limit = main_memory_bytes(), container_limit_bytes()
    return total if limit is None else min(total, limit)


def shared_memory_bytes() -> tuple[int, int] | None:
    """(free, total) bytes of /dev/shm; None where there is none."""
    try:
        stats = os.statvfs("/dev/shm")
    except OSError:
        return None
    return stats.f_bavail * stats.f_frsize, stats.f_blocks * stats.f_frsize


def nccl_bytes(gpus: int) -> int:
    """Bytes of shared memory that NCCL takes between this many GPUs of one machine: two segments for each."""
    return 2 * gpus * NCCL_SEGMENT_BYTES


def nvidia_cards(root: Path = Path("/")) -> int:
    """NVIDIA display controllers on the PCI bus, whether a driver has them or not."""
    found = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        try:
            vendor, kind = ((device / name).read_text().strip() for name in ("vendor", "class"))
        except OSError:
            continue
        found += vendor == _NVIDIA and kind.startswith(_DISPLAYS)
    return found


def nvidia_driver_loaded(root: Path = Path("/")) -> bool:
    """Whether the kernel has NVIDIA's driver. Containers see this of their host, too."""
    return (root / "proc/driver/nvidia/version").exists()


def nvidia_device_files(root: Path) -> bool:
    """Whether this process is given a GPU: /dev/nvidia0 and so on, or WSL's /dev/dxg."""
    return any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev/dxg").exists()
