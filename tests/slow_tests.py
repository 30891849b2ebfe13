"""The list of slow tests, beside this file."""

from __future__ import annotations

from pathlib import Path


def slow_tests() -> dict[str, float]:
    """Test -> seconds of processor time that all of its cases took when they were recorded."""
    lines = Path(__file__).with_name("slow.txt").read_text(encoding="utf-8").splitlines()
    return {name: float(seconds) for seconds, name in (line.split() for line in lines if not line.startswith("#"))}
