"""The event log of a work directory: what happened, one JSON object per line.

| field | content |
|---|---|
| time | ISO 8601, UTC, milliseconds: "2025-03-01T12:00:00.123Z" |
| host, pid | the process that wrote the line |
| clock | seconds of that process's monotonic clock, which nobody sets; absent in logs of earlier versions |
| name | what happened: "opened", "module_measured", "error", ... |
| fields | a mapping of JSON values that belong to the name |

The log is for people and progress displays; nothing is ever resumed from it. It is not fsynced, and a line may be cut
short by a crash: readers skip what is not JSON. One process, the driver, writes it.
"""

from __future__ import annotations

import json
import math
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from exl2ray.formats.json_file import as_number
from exl2ray.store.file_names import EVENTS
from exl2ray.store.fs import Store

LONGEST_SECONDS = 1e9  # that a machine is up


def timestamp() -> str:
    """Now, as events write it."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def moment(text: Any) -> float | None:
    """The time of an event in seconds since 1970; None if it is none."""
    try:
        return datetime.fromisoformat(str(text).replace("Z", "+00:00")).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def timed(events: Iterable[Mapping[str, Any]]) -> Iterator[tuple[float, Mapping[str, Any]]]:
    """Events with the time of each, seconds since 1970: as the first one of a run says, and from there on by the monotonic
    clock of its process, so that setting the clock while a job runs moves nothing. Those without a time are left out."""
    writer: tuple[Any, Any] | None = None
    ahead = 0.0  # of the monotonic clock
    for event in events:
        when, clock = moment(event.get("time")), as_number(event.get("clock"))
        if when is None:
            continue
        if clock is not None and 0 <= clock <= LONGEST_SECONDS:
            if event.get("name") == "opened" or writer != (event.get("host"), event.get("pid")):
                writer, ahead = (event.get("host"), event.get("pid")), when - clock
            when = clock + ahead
        yield when, event


def event_line(name: str, fields: Mapping[str, Any]) -> str:
    """One line of the log. Unlike records, events take any value: NaN and infinity as text, objects by str()."""
    event = {
        "time": timestamp(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "clock": round(time.monotonic(), 3),
        "name": name,
        "fields": _printable(fields),
    }
    return json.dumps(event, allow_nan=False)


def read_events(store: Store) -> tuple[list[dict[str, Any]], int]:
    """All events, oldest first, and the number of unreadable lines that were skipped."""
    lines = [line for line in store.read_lines(EVENTS) if line]
    events = []
    for line in lines:
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_event(event):
            events.append(event)
    return events, len(lines) - len(events)


def _is_event(value: Any) -> bool:
    if not isinstance(value, dict) or not {"time", "host", "pid", "name", "fields"} <= value.keys():
        return False
    return isinstance(value["fields"], dict) and all(isinstance(value[name], str) for name in ("time", "host", "name"))


def _printable(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Mapping):
        return {str(k): _printable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_printable(v) for v in value]
    return str(value)
