"""What a running conversion tells: events with a fixed vocabulary, and the interface of whoever shows them.

Events (name: fields). `--json` prints each as one line {"event": name, ...fields}:

| name | fields | meaning |
|---|---|---|
| start | model, architecture, modules, bits, device, workers, resumed | the job as understood |
| stage | stage, items, done | a pass begins: "measure", "quantize 4.0", "compile 4.0", ... |
| item | stage, key, done, items, seconds, detail | one item of the pass is finished and stored |
| note | message | something the user should know |
| warning | message | something that may spoil the result |
| table | title, columns, rows | a small table for people (the allocation, the summary) |
| end | stage, seconds | the pass is complete |
| done | outputs, seconds | everything is complete |
| error | message, hint, code | the run stops |
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
