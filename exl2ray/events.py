"""What a running conversion tells: events with a fixed vocabulary, and the interface of whoever shows them.

Names are start, stage, item, end, note, warning, done, and error where a program ends; ``docs/events.md`` explains their
fields, ``events.schema.json`` has them for programs. `--json` prints each event as one line {"event": name, ...fields}.
Reporters for people also take table (title, columns, rows), which is no part of a conversion.
"""

from __future__ import annotations

from typing import Any, Protocol


class Reporter(Protocol):
    """Receives events as they happen; implementations show them."""

    def event(self, name: str, **fields: Any) -> None: ...

    def close(self) -> None: ...


class Silent:
    """Shows nothing; keeps the events for whoever asks (tests)."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, **fields: Any) -> None:
        self.events.append((name, fields))

    def close(self) -> None:
        pass
