"""What a work directory says about its job, read by anybody, from any machine, while it runs or after."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from exl2ray.errors import StoreError
from exl2ray.store.apart import no_work_directory
from exl2ray.store.event_log import read_events
from exl2ray.store.faults import MissingFileError
from exl2ray.store.file_names import CALIBRATION, LOCK_FILE, MEASUREMENT, NOT_MODULES, REFERENCE_KIND
from exl2ray.store.fs import Store
from exl2ray.store.job_file import JOB_FILE, StoredJob, decode_job
from exl2ray.store.lock import heartbeat_age, is_held, read_holder
from exl2ray.store.open import open_store
from exl2ray.store.passes import PassStatus, passes

_LAST_EVENTS = 20


@dataclass(frozen=True)
class WorkStatus:
    """``state``: "running" (a driver holds a live lock), "crashed" (a dead driver's lock), without a lock "finished" (all
    passes are) or "stopped".

    ``passes``: how far each pass of the job is, what its workers do, and what is left. ``records`` counts finished modules
    (distinct keys) per kind ("measure", "quant/4.0"). ``holder`` describes the driver in words. ``heartbeat_age_seconds``
    compares the storage's time stamp with this machine's clock; None where the kernel holds the lock. ``problems`` lists what
    is damaged; reading a status never raises for damage inside the directory, and never writes.
    """

    root: str
    state: str
    job: StoredJob | None
    holder: str
    heartbeat_age_seconds: float | None
    passes: tuple[PassStatus, ...]
    records: dict[str, int]
    has_calibration: bool
    has_measurement: bool
    last_events: tuple[dict[str, Any], ...]
    problems: tuple[str, ...]


def _job(store: Store, problems: list[str]) -> StoredJob | None:
    """The job; None and a problem if it is damaged, or cannot be read on this machine. Raises StoreError where there is none,
    and for an object store that gives nothing: everything else would wait for it, too."""
    try:
        data = store.get(JOB_FILE)
    except MissingFileError as e:
        raise no_work_directory(store.root, "check the path") from e
    except StoreError as e:
        if not store.is_local:
            raise
        problems.append(e.message)
        return None
    try:
        return decode_job(data, store.full_name(JOB_FILE))
    except StoreError as e:
        problems.append(e.message)
        return None


def read_status(root: str) -> WorkStatus:
    """Status of the directory at ``root``; StoreError if there is no work directory or it cannot be read."""
    if os.path.isfile(root):
        raise no_work_directory(root, "give the folder of a job")
    store = open_store(root)
    problems: list[str] = []
    job = _job(store, problems)
    events, skipped = read_events(store)
    if skipped:
        problems.append(f"{skipped} unreadable lines in the event log")
    holder = read_holder(store)
    state = "stopped"
    if store.exists(LOCK_FILE):
        state = "running" if is_held(store) else "crashed"
        if not store.exists(LOCK_FILE):
            state = "stopped"  # meanwhile
    names = store.list("measure") + store.list("quant")
    records = _count_records(names)
    has_measurement = store.exists(MEASUREMENT)
    complete = {"measure"} if has_measurement else set()
    if has_measurement and any(n.startswith("measure/records/sensitivity-") for n in names):
        complete.add("sensitivity")
    found = passes(events, _wanted(job), _by_pass(records), state == "running", time.time(), complete)
    if state == "stopped" and found and all(p.state == "finished" for p in found):
        state = "finished"
    return WorkStatus(
        root=store.root,
        state=state,
        job=job,
        holder=str(holder or ""),
        heartbeat_age_seconds=heartbeat_age(store),
        passes=tuple(found),
        records=records,
        has_calibration=store.exists(CALIBRATION),
        has_measurement=has_measurement,
        last_events=tuple(events[-_LAST_EVENTS:]),
        problems=tuple(problems),
    )


def _wanted(stored: StoredJob | None) -> list[str]:
    """Names of the passes that the job consists of, in order."""
    job = stored.job if stored is not None else {}
    measure, quantize, output = (job.get(section, {}) for section in ("measure", "quantize", "output"))
    names = [] if measure.get("measurement") else ["measure"]
    if names and quantize.get("allocates") == "linear":
        names.append("sensitivity")
    if not output.get("measure_only"):
        found = quantize.get("bits")  # the job may be anybody's
        bits = [float(b) for b in found if type(b) in (int, float)] if isinstance(found, list) else []
        steps = ("quantize", "compile", "tune") if output.get("tune") else ("quantize", "compile")
        names += [f"{step} {b}" for step in steps for b in bits]
    return names


def _by_pass(records: dict[str, int]) -> dict[str, int]:
    return {kind.replace("quant/", "quantize ", 1): count for kind, count in records.items()}


def _count_records(names: Iterable[str]) -> dict[str, int]:
    """Distinct modules by kind; not the records of calibration rows, saved states, perplexities and written models."""
    items = set()
    for name in names:
        kind, _, file = name.rpartition("/records/")
        key = file.removesuffix(".json").rpartition(".")[0]
        if kind and file.endswith(".json") and not NOT_MODULES.fullmatch(key) and kind != REFERENCE_KIND:
            items.add((kind, key))
    return dict(sorted(Counter(kind for kind, _ in items).items()))
