"""At most one driver per work directory.

The lock is a file ``driver.lock`` that says who holds it; a daemon thread keeps its time stamp fresh. A lock is stale
when its holder was a process of this machine that no longer runs, or when it is of another machine and its time stamp
is older than a minute by the storage's own clock.

On file systems the lock appears by link(2), which is exclusive. A stale one is replaced by rename(2) under flock(2) on
the stale file itself: who gets the flock later finds another file under the name and gives up.

Object stores offer no exclusive creation through pyarrow. There, and without flock or across machines, a driver writes
the lock, waits, and holds it if its own token is still there. The heartbeat reads before it writes, so of two drivers
that slipped through within that wait one finds a foreign token at its next beat and stops. Both had then written the
same content-addressed records, which is waste but no damage.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone

from exl2ray.beneath import try_flock
from exl2ray.errors import StoreError
from exl2ray.store.faults import MissingFileError, translated
from exl2ray.store.fs import Store
from exl2ray.store.machine import Process, is_alive, same_machine, this_process
from exl2ray.store.records import canonical_json

LOCK_FILE = "driver.lock"
_ATTEMPTS = 20


@dataclass(frozen=True)
class LockTiming:
    """Seconds: between heartbeats; until a silent lock of another machine counts as stale; to settle after a write."""

    heartbeat: float = 10.0
    stale: float = 60.0
    settle: float = 1.0


@dataclass(frozen=True)
class Holder:
    """Content of a lock file: ``since`` in seconds since 1970, ``token`` unique to one acquisition."""

    process: Process
    since: float
    token: str

    def to_bytes(self) -> bytes:
        return canonical_json({"process": self.process._asdict(), "since": self.since, "token": self.token})

    @staticmethod
    def from_bytes(data: bytes) -> Holder | None:
        """None if the text is not that of a lock (cut short, or not written by us)."""
        try:
            stored = json.loads(data)
            process = Process(**stored["process"])
            holder = Holder(process, float(stored["since"]), str(stored["token"]))
            str(holder)  # raises for a time that no calendar has
        except (ValueError, KeyError, TypeError, OverflowError, OSError, RecursionError):
            return None
        return holder if isinstance(process.pid, int) and 0 < process.pid < 2**31 else None

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.since, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.process.pid} on {self.process.host} since {when}"


def read_holder(store: Store) -> Holder | None:
    """Who is named in the lock file; None if there is none or it is unreadable text."""
    try:
        return Holder.from_bytes(store.get(LOCK_FILE))
    except MissingFileError:
        return None


def heartbeat_age(store: Store, clock: Callable[[], float] | None = None) -> float | None:
    """Seconds since the lock was last refreshed, None without a lock; by the storage's clock unless told."""
    try:
        written = store.mtime(LOCK_FILE)
    except MissingFileError:
        return None
    return max(0.0, (clock or store.clock)() - written)


def is_stale(
    store: Store, holder: Holder | None, timing: LockTiming, clock: Callable[[], float] | None = None
) -> bool:
    """Whether the present lock may be taken over. ``holder`` None stands for an unreadable lock file."""
    if holder is not None and same_machine(holder.process, this_process()):
        return not is_alive(holder.process)
    age = heartbeat_age(store, clock)
    return age is not None and age > timing.stale


def check_lock(store: Store, timing: LockTiming | None = None) -> None:
    """StoreError if another driver has the lock now. Writes nothing, so the age of a lock is told by this machine's clock."""
    timing = timing or LockTiming()
    if store.exists(LOCK_FILE):
        holder = read_holder(store)
        if not is_stale(store, holder, timing, time.time) and store.exists(LOCK_FILE):
            raise _in_use(store, holder, timing)


def _in_use(store: Store, holder: Holder | None, timing: LockTiming) -> StoreError:
    return StoreError(
        f"{store.root} is in use by {holder or 'another driver'}",
        "wait for it or stop it; `exl2ray status` shows its progress. "
        f"If that driver is surely gone, wait {timing.stale:.0f} s or delete {LOCK_FILE}",
    )


class DriverLock:
    """Held from ``acquire`` to ``release``. ``on_beat`` is called by the heartbeat thread as well."""

    def __init__(
        self, store: Store, timing: LockTiming | None = None, on_beat: Callable[[], None] | None = None
    ) -> None:
        self.store = store
        self.timing = timing or LockTiming()
        self.taken_over: Holder | None = None  # the dead driver whose lock was replaced
        self._on_beat = on_beat
        self._mine = Holder(this_process(), time.time(), secrets.token_hex(16))
        self._lost = ""
        self._last_beat = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._beating = threading.Lock()

    def acquire(self) -> None:
        """Take the lock or raise StoreError naming the driver that has it."""
        certain = self.store.is_local
        for _ in range(_ATTEMPTS):
            if self.store.put_new(LOCK_FILE, self._mine.to_bytes()):
                break
            holder = read_holder(self.store)
            if holder is None and not self.store.exists(LOCK_FILE):
                continue  # released just now
            if not is_stale(self.store, holder, self.timing):
                raise self._refused(holder)
            replaced, guarded = self._replace_stale(holder)
            if replaced:
                self.taken_over = holder
                certain = guarded and holder is not None and same_machine(holder.process, self._mine.process)
                break
            time.sleep(self.timing.settle / 10)  # another driver is at it: see what comes of it
        else:
            raise self._refused(read_holder(self.store))
        if not certain:
            time.sleep(self.timing.settle)
            holder = read_holder(self.store)
            if holder is None or holder.token != self._mine.token:
                raise self._refused(holder)
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._keep_fresh, name="driver-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StoreError if this process no longer holds the lock: taken over while it was stopped, or removed."""
        if not self._lost and time.monotonic() - self._last_beat > self.timing.stale:
            self._beat()  # the process, or the storage, slept; raises if the storage still does not answer
        if self._lost:
            raise StoreError(f"{self.store.root}: {self._lost}", "see which driver runs, then run the command again")

    def release(self) -> None:
        """Give the lock back if it is still ours; later calls and calls in forked children do nothing."""
        if self._thread is None or os.getpid() != self._mine.process.pid:
            return
        self._stop.set()
        self._thread.join()
        self._thread = None
        holder = read_holder(self.store)
        if holder is not None and holder.token == self._mine.token:
            self.store.delete(LOCK_FILE)

    def _refused(self, holder: Holder | None) -> StoreError:
        return _in_use(self.store, holder, self.timing)

    def _replace_stale(self, stale: Holder | None) -> tuple[bool, bool]:
        """Put our lock in place of the one that was judged stale: (whether we did, whether nobody else can have)."""
        if not self.store.is_local:
            if read_holder(self.store) != stale:
                return False, False
            self.store.put(LOCK_FILE, self._mine.to_bytes())
            return True, False
        with translated("take over", self.store.full_name(LOCK_FILE)), suppress(MissingFileError):
            fd = self.store.descriptor(LOCK_FILE, os.O_RDWR)
            if fd is None:
                return False, False
            try:
                guarded = try_flock(fd)
                unchanged = self._is_lock_file(fd) and read_holder(self.store) == stale
                if unchanged and guarded is not None:
                    self.store.put(LOCK_FILE, self._mine.to_bytes())
                    return True, guarded
            finally:
                os.close(fd)
        return False, False

    def _is_lock_file(self, fd: int) -> bool:
        now = self.store.descriptor(LOCK_FILE)
        if now is None:
            return False
        try:
            return os.path.samestat(os.fstat(fd), os.fstat(now))
        finally:
            os.close(now)

    def _keep_fresh(self) -> None:
        while not self._stop.wait(self.timing.heartbeat):
            try:
                self._beat()
                if self._on_beat is not None:
                    self._on_beat()
            except StoreError:
                continue  # the storage may come back; `check` raises once it has been silent for too long
            if self._lost:
                return

    def _beat(self) -> None:
        with self._beating:
            holder = read_holder(self.store)
            if holder is None or holder.token != self._mine.token:
                self._lost = f"the lock of this driver was {'taken over by ' + str(holder) if holder else 'removed'}"
                return
            fd = self.store.descriptor(LOCK_FILE)
            if fd is None:
                self.store.put(LOCK_FILE, self._mine.to_bytes())
            else:
                try:
                    with translated("refresh", self.store.full_name(LOCK_FILE)):
                        os.utime(fd)
                finally:
                    os.close(fd)
            self._last_beat = time.monotonic()
