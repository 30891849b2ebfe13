"""What this machine offers to a process: main memory and room on file systems. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path

_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def main_memory_bytes() -> int:
    """Main memory of the machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def container_limit_bytes() -> int | None:
    """What a container may use of it; None without a limit."""
    for name in _LIMITS:
        try:
            text = Path(name).read_text().strip()
        except OSError:
            continue
        if text.isdigit():
            return int(text)
    return None


def usable_memory_bytes() -> int:
    """The smaller of both."""
    total, limit = main_memory_bytes(), container_limit_bytes()
    return total if limit is None else min(total, limit)
