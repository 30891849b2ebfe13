"""How far the passes of a job are, told from its event log: for running and for dead jobs, on any machine.

Events that are read (the driver writes them; ``fields`` of each):

| name | fields | meaning |
|---|---|---|
| opened | changed | a driver began, perhaps with other settings |
| stage | stage, items, done | it began a pass, or went on with one |
| item | stage, key, done, items, seconds, worker, workers | an item is finished |
| started | method, key, bits, worker | a worker was given something to do |
| written | bits | the shards of a bitrate are complete |

Events of other versions may lack fields or have others: what cannot be used is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from exl2ray.store.event_log import moment, timed
from exl2ray.store.pace import Pace

_MEASURE = "measure"
_MEASURING = (_MEASURE, "sensitivity")  # what --reuse keeps
MOST_ITEMS, MOST_PASSES, MOST_SECONDS = 100_000, 256, 1e9  # that are believed of a log
_ORDER = (*_MEASURING, "quantize", "compile", "tune")  # first words of the names of passes: "quantize 4.0"


@dataclass(frozen=True)
class WorkerStatus:
    """``items``: finished in the pass by this run of the driver. ``doing``: what it was last given, "" if that is done."""

    name: str
    items: int
    seconds_per_item: float | None
    doing: str


@dataclass(frozen=True)
class PassStatus:
    """``state``: "waiting", "running", "stopped" (begun, and no driver is at it), "finished".

    ``items`` is None while it is not known. ``eta_seconds`` is what is left: from now if the pass runs, else as of the
    last sign of it, were it to go on. ``seconds`` is the time spent in the last run that worked on it.
    """

    name: str
    state: str
    done: int
    items: int | None
    queue: int | None
    seconds: float | None = None
    seconds_per_item: float | None = None
    eta_seconds: float | None = None
    workers: tuple[WorkerStatus, ...] = ()


@dataclass
class _Pass:
    pace: Pace
    run: int  # which opening of the directory
    began: float
    last: float
    doing: dict[str, tuple[str, str]] = field(default_factory=dict)  # worker -> method, key


def passes(
    events: Iterable[Mapping[str, Any]],
    wanted: Sequence[str],
    records: Mapping[str, int],
    running: bool,
    now: float,
    complete: Collection[str] = (),
) -> list[PassStatus]:
    """Status of the passes ``wanted`` and of all others in the log, in the order in which a job runs them.

    ``records``: finished modules by pass, where the log says nothing; ``complete``: passes whose result is there.
    ``now``: seconds since 1970.
    """
    found: dict[str, _Pass] = {}
    run, latest, set_since = 0, -math.inf, 0.0
    for when, event in timed(events):
        name, f = event.get("name"), event.get("fields")
        set_since = (moment(event["time"]) or when) - when  # by how much the clock has been set since the driver began
        if not isinstance(f, Mapping):
            continue
        when = latest = when if name == "opened" else max(when, latest)  # a clock that is set back stands still
        if name == "opened":
            run += 1
            if f.get("changed"):  # the measurement stays, everything after it begins anew
                found = {k: p for k, p in found.items() if k in _MEASURING}
        elif name == "stage" and _counts(f) and len(found) < MOST_PASSES:
            found[str(f["stage"])] = _Pass(Pace(f["items"], f["done"], 1, when), run, when, when)
        elif name == "item" and _counts(f) and str(f["stage"]) in found:
            _item(found[str(f["stage"])], f, when)
        elif name == "started" and isinstance(f.get("worker"), str):
            p = found.get(_MEASURE if f.get("bits") is None else f"quantize {f['bits']}")
            if p is not None and p.run == run and p.pace.left:
                p.doing[f["worker"]] = (str(f.get("method")), str(f.get("key")))
        elif name == "written":
            found[f"compile {f.get('bits')}"] = _Pass(Pace(1, 1, 1, when), run, when, when)
    now -= set_since
    complete = {*complete, *(n.replace("compile", "quantize") for n in found if n.startswith("compile"))}
    names = sorted({**dict.fromkeys(wanted), **found}, key=_rank)
    return [
        _status(n, found[n], running and found[n].run == run, now) if n in found else _unseen(n, records, n in complete)
        for n in names
    ]


def _rank(name: str) -> int:
    """Passes of a kind keep the order of their bitrates; unknown ones come last."""
    kind = name.partition(" ")[0]
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)


def _item(p: _Pass, f: Mapping[str, Any], when: float) -> None:
    worker, seconds, workers = f.get("worker"), f.get("seconds"), f.get("workers")
    p.pace.finished(
        f["done"], when,
        worker if isinstance(worker, str) else "",
        float(seconds) if isinstance(seconds, (int, float)) and 0 <= seconds < MOST_SECONDS else 0.0,
        workers if type(workers) is int and 0 < workers <= MOST_ITEMS else 0,
    )  # fmt: skip
    p.last = when
    key = str(f.get("key"))
    p.doing = {w: d for w, d in p.doing.items() if d[1] != key}


def _unseen(name: str, records: Mapping[str, int], complete: bool) -> PassStatus:
    """A pass that the log does not tell of: nothing is done yet, or all was done before the settings changed."""
    count = records.get(name, 0)
    return PassStatus(name, "finished" if complete else "stopped" if count else "waiting", count, None, None)


def _status(name: str, p: _Pass, running: bool, now: float) -> PassStatus:
    pace = p.pace
    state = "finished" if not pace.left else "running" if running else "stopped"
    until = max(now, p.last) if state == "running" else p.last
    return PassStatus(
        name=name,
        state=state,
        done=pace.done,
        items=pace.items,
        queue=pace.left,
        seconds=until - p.began,
        seconds_per_item=pace.seconds_per_item(),
        eta_seconds=pace.eta_seconds(until) if pace.left else None,
        workers=_workers(p, state),
    )


def _workers(p: _Pass, state: str) -> tuple[WorkerStatus, ...]:
    """Those that finished something, and in a running pass those that were given something."""
    done = {w.name: w for w in p.pace.workers()}
    members = {member for name in done for member in name.split(" + ")}
    names = [*done, *(w for w in sorted(p.doing) if state == "running" and w not in members)]
    out = []
    for name in names:
        method, key = next((p.doing[m] for m in name.split(" + ") if m in p.doing), ("", ""))
        doing = f"{method} {key}" if key and state == "running" else ""
        w = done.get(name)
        out.append(WorkerStatus(name, w.items if w else 0, w.seconds_per_item if w else None, doing))
    return tuple(out)


def _counts(f: Mapping[str, Any]) -> bool:
    counts = [f.get(k) for k in ("items", "done")]
    return all(type(n) is int and 0 <= n <= MOST_ITEMS for n in counts) and "stage" in f
