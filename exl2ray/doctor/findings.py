"""What the doctor says: one line per thing looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "problem"]
OPEN_FILES = 4096  # that a process of ours should be allowed, and 16 times as many for Ray


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says what to do where ``level`` is not "ok"."""

    topic: str
    value: str
    level: Level = "ok"
    fix: str = ""
