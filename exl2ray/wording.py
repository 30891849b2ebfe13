"""How messages and tables say sizes, times, counts, names and values. Imports nothing of exl2ray: every room may use it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

LONGEST = 80  # characters of a value


def file_size(size_bytes: float, digits: int = 3) -> str:
    """``812 B``, ``4.7 MB``, ``13.1 GB``: decimal units, as disks and model hubs count."""
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        count = size_bytes / power
        if count >= 0.9995:
            return f"{count:.{digits}g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
    return f"{size_bytes:.0f} B"


def duration(seconds: float) -> str:
    """``0 s``, ``0.04 s``, ``1.4 s``, ``12 s``, ``1 min 02 s``, ``3 h 07 min``."""
    if seconds < 0.0005:
        return "0 s"
    if seconds < 0.1:
        return f"{seconds:.1g} s"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def nats(divergence: float) -> str:
    """``0.2454``, ``0.002718``: four digits of a KL divergence, however small."""
    return f"{divergence:#.4g}".removesuffix(".")


def perplexity(value: float | None) -> str:
    """As messages and tables have it; None: it is no number."""
    return "not finite" if value is None or not math.isfinite(value) else f"{value:.4g}"


def plural(count: int, noun: str) -> str:
    """A count with its noun: ``1 file``, ``3 files``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def some(names: Iterable[str], most: int = 3, longest: int | None = None) -> str:
    """The first names, and how many more there are: ``a, b, c and 4 more``. longest: characters of a name."""
    known = [n if longest is None or len(n) <= longest else n[:longest] + "..." for n in names]
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def some_lines(texts: Sequence[str], most: int) -> list[str]:
    """As `some`, for texts that have a line each."""
    return [*texts[:most], *([f"and {len(texts) - most} more"] if len(texts) > most else [])]


def shown(value: Any) -> str:
    """A value as it may stand in a message: as Python writes it, without control characters, and cut."""
    text = repr(value)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
