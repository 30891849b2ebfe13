"""What the doctor says: one line per thing looked at, and what to do about what is wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "warning", "problem"]
Remedies = Mapping[tuple[str, ...], str]
OPEN_FILES = 4096  # that a process of ours should be allowed, and 16 times as many for Ray


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``fix`` says what to do where ``level`` is not "ok"."""

    topic: str
    value: str
    level: Level = "ok"
    fix: str = ""


def problem(topic: str, value: str, fix: str) -> list[Finding]:
    """What would stop a conversion."""
    return [Finding(topic, value, "problem", fix)]


def remedy(complaint: str, remedies: Remedies, otherwise: str) -> str:
    """The first of ``remedies`` of which a key has words that occur in the complaint of another program."""
    return next((fix for words, fix in remedies.items() if any(word in complaint for word in words)), otherwise)
