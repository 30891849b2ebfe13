"""``exl2ray status``: how far the job of a work directory is."""

from __future__ import annotations

from typing import Any

from exl2ray.recipe import JOB_FLAGS
from exl2ray.store.passes import PassStatus
from exl2ray.store.status import WorkStatus
from exl2ray.terminal.console import clean, show_text
from exl2ray.terminal.live import show_table
from exl2ray.wording import duration, file_size, plural, shown

MOST = 1e15  # seconds or bytes; a damaged log may have other numbers


def show(s: WorkStatus) -> None:
    """Prints the state of a job: its settings, the last events, passes and workers."""
    age = "" if s.heartbeat_age_seconds is None else f", last sign of life {duration(s.heartbeat_age_seconds)} ago"
    show_text(f"{s.root}: {s.state}" + (f": {s.holder}{age}" if s.holder else ""))
    if s.job is not None:
        rows = [[label, value] for label, value in _settings(s.job.job)]
        show_table(f"\njob of {s.job.created}", ["setting", "value"], rows)
    have = [("calibration", s.has_calibration), ("measurement", s.has_measurement)]
    print("\n" + ", ".join(f"{name}: {'yes' if there else 'no'}" for name, there in have))
    events = [[e["time"], e["name"], _fields(e["fields"])] for e in s.last_events]
    if events:
        show_table("\nlast events", ["time", "event", "about"], events)
    print()
    show_table("", ["pass", "state", "modules", "each", "in this run", "left"], [_row(p) for p in s.passes])
    workers = [
        [clean(w.name), p.name, str(w.items), _seconds(w.seconds_per_item), clean(w.doing)]
        for p in s.passes
        for w in p.workers
        if p.state != "finished" or s.state != "running"
    ]
    if workers:
        show_table("\nworkers", ["worker", "pass", "modules", "each", "doing"], workers)
    for problem in s.problems:
        show_text(f"problem: {problem}")


def _row(p: PassStatus) -> list[str]:
    """One pass; what is left of a stopped one is what going on would take."""
    count = f"{p.done}/{p.items}" if p.items is not None else str(p.done) if p.done else ""
    left = ""
    if p.queue:
        left = plural(p.queue, "module") + ("" if p.eta_seconds is None else f", {duration(p.eta_seconds)}")
    name = p.name
    if name.startswith(("compile", "tune")):
        count = ""
    return [name, p.state, count, _seconds(p.seconds_per_item), _seconds(p.seconds), left]


def _seconds(value: float | None) -> str:
    return "" if not value else duration(value)


def _settings(job: dict[str, dict[str, Any]]) -> list[tuple[str, str]]:
    out = []
    for section, settings in job.items():
        for name, value in settings.items():
            flag = JOB_FLAGS.get(f"{section}.{name}")
            label = f"{section} {name}" + (f" ({flag})" if flag else "")
            if value is not None:
                out.append((label, _words(value)))
    return out


def _words(value: Any) -> str:
    """A setting: lists and objects without Python's brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {_words(v)}" for k, v in value.items())
    return ", ".join(map(_words, value)) if isinstance(value, list) else str(value)


def _field(name: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    if not abs(value) < MOST:
        return shown(value)
    if name in ("seconds", "eta_seconds"):
        return duration(value)
    if name in ("bytes", "received"):
        return file_size(value)
    return f"{value:.4g}" if isinstance(value, float) and name != "bits" else str(value)


def _fields(fields: dict[str, Any]) -> str:
    """Those of an event that are no lists, with their units."""
    said = [f"{k} {_field(k, v)}" for k, v in fields.items() if isinstance(v, (str, int, float)) and v != ""]
    text = ", ".join(said)
    return text if len(text) <= 100 else text[:97] + "..."
