"""The work directory of one conversion: opened by one driver, resumed after anything.

``WorkDir.create_or_resume`` makes a directory or finds one, refuses whatever is not safe to go on with, and hands out
the store and the records. Nothing in it is updated in place: see ``file_names.py`` for the names, ``records.py`` for how a
finished item is kept, ``lock.py`` for the one-driver rule.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping
from types import TracebackType
from typing import Any

from exl2ray.errors import StoreError
from exl2ray.store.event_log import event_line, timestamp
from exl2ray.store.faults import MissingFileError
from exl2ray.store.file_names import EVENTS, FOLDERS, LOCK_FILE, MEASUREMENT, is_ours, is_place_of_ours
from exl2ray.store.fs import TEMP_PREFIX, Store
from exl2ray.store.job_file import (
    JOB_FILE,
    Change,
    Job,
    StoredJob,
    compare_jobs,
    decode_job,
    encode_job,
    is_marked,
    mismatch,
    normalise,
    stored_id,
)
from exl2ray.store.lock import DEFAULT_TIMING, DriverLock, LockTiming, check_lock
from exl2ray.store.nonce import write_nonce
from exl2ray.store.open import open_store
from exl2ray.store.records import Records
from exl2ray.wording import some

REUSABLE = frozenset({"quantize", "output"})  # sections whose change leaves the measurement valid
_TOLERATED = frozenset({LOCK_FILE, "lost+found"})  # left by a driver killed before job.json, or by mkfs


class WorkDir:
    """An open work directory; a context manager that releases the lock.

    ``notes`` holds what the user should know about the opening (other versions than the job was started with, a dead driver's
    lock), in words. Workers do not open a WorkDir: they get ``store`` and make their own ``Records`` of it.
    """

    def __init__(self, store: Store, lock: DriverLock, stored: StoredJob, versions: Mapping[str, str]) -> None:
        self.store = store
        self.records = Records(store)
        self.id = stored.id  # what a target's claim names it by
        self.notes: list[str] = []
        self.listener: Callable[[str, Mapping[str, Any]], None] = lambda name, fields: None  # hears the events of the log
        self._versions = dict(versions)
        self._lock = lock
        self._nonces: list[str] = []

    @staticmethod
    def create_or_resume(
        root: str,
        job: Mapping[str, Mapping[str, Any]],
        *,
        resume: bool,
        versions: Mapping[str, str],
        allow_changed: Collection[str] = (),
        flags: Mapping[str, str] | None = None,
        timing: LockTiming = DEFAULT_TIMING,
        begin: Callable[[], None] = lambda: None,
    ) -> WorkDir:
        """Open ``root`` for ``job`` (sections as in ``job.py``).

        A new or empty directory gets a job.json. An existing work directory goes on if its settings are the same (places of
        the model and the data may be others: the new ones are kept); otherwise JobMismatchError lists the changes
        (``flags``: "section.name" -> flag, for the message), unless all of them are in sections ``allow_changed`` (of
        "quantize", "output"): then the old settings are kept as job-<n>.json and the new ones hold.
        ``resume=False`` first deletes what exl2ray made there, and nothing else. StoreError for a directory of somebody
        else, a damaged job.json, a second driver. ``begin`` is called before anything is written.
        """
        wanted = normalise(job)
        if not REUSABLE.issuperset(allow_changed):
            names = ", ".join(sorted(set(allow_changed) - REUSABLE))
            raise StoreError(f"a change of {names} cannot be allowed: everything depends on it")
        store = open_store(root)
        data = _read_job(store)  # refuses a foreign directory before anything is written into it
        if data is not None and resume:
            _changes(store, decode_job(data, store.full_name(JOB_FILE)), wanted, allow_changed, flags or {})
        begin()
        lock = DriverLock(store, timing, on_beat=store.flush)
        lock.acquire()
        try:
            store.sweep(FOLDERS)
            data = _read_job(store)
            _refuse_or_remove_links(store, remove=data is not None and not resume)
            changes: list[str] = []
            if data is not None and resume:
                stored, changes = _continue(store, data, wanted, allow_changed, flags or {})
            else:
                if data is not None:
                    _clear(store)
                stored = _write_job(store, wanted, versions, "" if data is None else stored_id(data))
            work = WorkDir(store, lock, stored, versions)
            mode = "resumed" if data is not None and resume else "created"
            work._note_differences(stored.versions)
            work.event("opened", mode=mode, changed=changes, versions=work._versions, notes=work.notes)
            return work
        except BaseException:
            lock.release()
            raise

    @staticmethod
    def check_opening(
        root: str,
        job: Mapping[str, Mapping[str, Any]],
        *,
        resume: bool,
        allow_changed: Collection[str] = (),
        flags: Mapping[str, str] | None = None,
    ) -> None:
        """Raises what ``create_or_resume`` would, as far as that can be known without writing anything."""
        store = open_store(root)
        data = _read_job(store)
        check_lock(store)
        if data is None or not resume:
            return
        _refuse_or_remove_links(store, remove=False)
        _changes(store, decode_job(data, store.full_name(JOB_FILE)), normalise(job), allow_changed, flags or {})

    @staticmethod
    def read_job(root: str) -> StoredJob | None:
        """The settings a directory was made with (a resume needs only -o); None if it is new or empty."""
        store = open_store(root)
        data = _read_job(store)
        return None if data is None else decode_job(data, store.full_name(JOB_FILE))

    def _note_differences(self, before: Mapping[str, str]) -> None:
        for name, version in self._versions.items():
            if before.get(name, version) != version:
                self.notes.append(f"the job was started with {name} {before[name]}, now it is {version}")
        if self._lock.taken_over is not None:
            self.notes.append(f"took over from a driver that ended without notice: {self._lock.taken_over}")

    def check(self) -> None:
        """Raise StoreError if another driver took this directory over (this process had been stopped for long)."""
        self._lock.check()

    def event(self, name: str, **fields: Any) -> None:
        """Append to the event log: {"time", "host", "pid", "name", "fields"}, see ``event_log.py``. Checks the lock."""
        self.check()
        self.store.append_line(EVENTS, event_line(name, fields))
        self.listener(name, fields)

    def nonce_check(self) -> tuple[str, str]:
        """Write a nonce for the workers' ``verify_nonce(store, rel, token, versions)``: (rel, token)."""
        rel, token = write_nonce(self.store, self._versions)
        self._nonces.append(rel)
        return rel, token

    def close(self) -> None:
        """Write out events, remove nonces, release the lock. Twice is once."""
        try:
            while self._nonces:
                self.store.delete(self._nonces.pop())
            self.store.flush()
        finally:
            self._lock.release()

    def __enter__(self) -> WorkDir:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def work_id(root: str) -> str:
    """Identity of the work directory at ``root``; "" if it is yet to be made, or unusable."""
    if not root:
        return ""
    try:
        return stored_id(open_store(root).get(JOB_FILE))
    except StoreError:
        return ""


def _read_job(store: Store) -> bytes | None:
    """Bytes of our job.json, None for a new or empty directory; StoreError if the directory is somebody else's."""
    try:
        data = store.get(JOB_FILE)
    except MissingFileError:
        data = None
    if data is not None:
        if not is_marked(data):
            raise StoreError(
                f"{store.full_name(JOB_FILE)} was not written by exl2ray, or its beginning is damaged",
                "give another directory with -o, or empty this one yourself (-nr deletes nothing here)",
            )
        return data
    foreign = [e for e in store.entries() if e not in _TOLERATED and not e.startswith(TEMP_PREFIX)]
    if foreign:
        raise StoreError(
            f"{store.root} is not empty and not a work directory of exl2ray: it has {some(foreign, 5)}",
            "give a new or empty directory with -o",
        )
    return None


def _refuse_or_remove_links(store: Store, remove: bool) -> None:
    """Links, pipes, sockets and devices in the places of our files and folders: StoreError, or removed themselves."""
    found = [n for n in store.irregular(FOLDERS) if is_place_of_ours(n)]
    if remove:
        for name in found:
            store.delete(name)
    elif found:
        names = some(map(store.full_name, found), 1)
        raise StoreError(
            f"{names}: a link, pipe, socket or device where a file or folder of exl2ray belongs",
            "look who put it there, then remove it (-nr removes it and all else that exl2ray made); "
            "to use another disk, let -o lead there",
        )


def _write_job(store: Store, job: Job, versions: Mapping[str, str], identity: str) -> StoredJob:
    stored = StoredJob(job, dict(versions), timestamp(), identity or secrets.token_hex(16))
    store.put(JOB_FILE, encode_job(stored))
    return stored


def _continue(
    store: Store, data: bytes, wanted: Job, allow_changed: Collection[str], flags: Mapping[str, str]
) -> tuple[StoredJob, list[str]]:
    """The job to go on with and the names of the settings that were changed (none, or all in ``allow_changed``)."""
    stored = decode_job(data, store.full_name(JOB_FILE))
    changes = _changes(store, stored, wanted, allow_changed, flags)
    if not changes:
        return (stored if stored.job == wanted and stored.id else _replace(store, stored, wanted)), []
    _archive(store, data)
    return _replace(store, stored, wanted), [f"{c.section}.{c.name}" for c in changes]


def _changes(
    store: Store, stored: StoredJob, wanted: Job, allow_changed: Collection[str], flags: Mapping[str, str]
) -> list[Change]:
    """What is to be changed; JobMismatchError if that is not allowed."""
    changes = compare_jobs(stored.job, wanted)
    if not {c.section for c in changes} <= set(allow_changed):
        raise mismatch(store.root, changes, flags, store.exists(MEASUREMENT))
    return changes


def _replace(store: Store, stored: StoredJob, wanted: Job) -> StoredJob:
    """Other settings, or other places of the same things, for the same job."""
    replaced = StoredJob(wanted, stored.versions, stored.created, stored.id or secrets.token_hex(16))
    store.put(JOB_FILE, encode_job(replaced))
    return replaced


def _archive(store: Store, data: bytes) -> None:
    """Keep an earlier job.json as job-<n>.json; once, also if the driver was killed before the new one was written."""
    n = 1
    while store.exists(f"job-{n}.json"):
        if store.get(f"job-{n}.json") == data:
            return
        n += 1
    store.put(f"job-{n}.json", data)


def _clear(store: Store) -> None:
    """Delete what exl2ray made in a directory of ours. job.json stays (it marks the directory) until replaced."""
    names = [n for n in store.entries() if is_ours(n) and store.exists(n)]
    for folder in FOLDERS:
        names += [n for n in store.list(folder) if is_ours(n)]
    for name in names:
        if name != JOB_FILE:
            store.delete(name)
    store.prune(FOLDERS)
