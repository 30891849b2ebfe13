"""At most one driver per work directory.

The file ``driver.lock`` says who works there. Locally it is locked by the kernel (flock) from start to end: whatever ends the
process frees it at once, so nothing has to be kept fresh and nothing goes stale.

Object stores have no locks, nor have some network mounts. There the file's time counts: a driver writes its name, waits a
moment, holds the directory if its token is still there, and writes it again every few seconds. A name counts as gone when it
was not written for a minute, or when its process ran on this machine and does no more. Of two drivers that slipped through
within that moment one finds a foreign token when it writes next, and stops. Both had then written the same content-addressed
records, which is waste but no damage. The same rule decides about the lock files of versions that knew no other.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from exl2ray.beneath import closing, open_locked, try_flock
from exl2ray.errors import StoreError
from exl2ray.store.faults import MissingFileError, translated
from exl2ray.store.file_names import LOCK_FILE
from exl2ray.store.fs import Store
from exl2ray.store.records import canonical_json

_ATTEMPTS = 20


@dataclass(frozen=True)
class LockTiming:
    """Seconds: between two writings; until a silent name counts as gone; to wait after a write, or for one who only looks."""

    heartbeat: float = 10.0
    stale: float = 60.0
    settle: float = 1.0


DEFAULT_TIMING = LockTiming()


@dataclass(frozen=True)
class Holder:
    """Content of a lock file: ``since`` in seconds since 1970, ``token`` unique to one acquisition, ``kernel``: whether the
    kernel's lock is held on the file, so that its time says nothing. ``boot_id``, ``pid_namespace``: tell machines and
    containers of one name apart, as process numbers can be compared within one alone.
    """

    host: str
    pid: int
    boot_id: str
    pid_namespace: str
    since: float
    token: str
    kernel: bool = False

    @staticmethod
    def here() -> Holder:
        """This process."""
        namespace = ""
        with suppress(OSError):
            namespace = os.readlink("/proc/self/ns/pid")
        boot = _text("/proc/sys/kernel/random/boot_id").strip()
        return Holder(socket.gethostname(), os.getpid(), boot, namespace, time.time(), secrets.token_hex(16))

    def to_bytes(self) -> bytes:
        process = {"host": self.host, "pid": self.pid, "boot_id": self.boot_id, "pid_namespace": self.pid_namespace}
        return canonical_json({"process": process, "since": self.since, "token": self.token, "kernel": self.kernel})

    @staticmethod
    def from_bytes(data: bytes) -> Holder | None:
        """None if the text is not that of a lock (cut short, or not written by us)."""
        try:
            stored = json.loads(data)
            process = {key: stored["process"][key] for key in ("host", "pid", "boot_id", "pid_namespace")}
            since, token = float(stored["since"]), str(stored["token"])
            found = Holder(**process, since=since, token=token, kernel=stored.get("kernel") is True)
            str(found)  # raises for a time that no calendar has
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, OSError, RecursionError):
            return None
        return found if isinstance(found.pid, int) and 0 < found.pid < 2**31 else None

    def __str__(self) -> str:
        when = datetime.fromtimestamp(self.since, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"process {self.pid} on {self.host} since {when}"

    def ended_here(self) -> bool:
        """Whether it was a process of this machine that runs no more. A zombie does not run."""
        here = Holder.here()
        if (self.host, self.boot_id, self.pid_namespace) != (here.host, here.boot_id, here.pid_namespace):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass  # somebody else's, but there
        return _text(f"/proc/{self.pid}/stat").rpartition(")")[2].split()[:1] in (["Z"], ["X"])


def _text(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def read_holder(store: Store) -> Holder | None:
    """Who is named in the lock file; None if there is none or it is unreadable text."""
    try:
        return Holder.from_bytes(store.get(LOCK_FILE))
    except MissingFileError:
        return None


def heartbeat_age(store: Store, clock: Callable[[], float] = time.time) -> float | None:
    """Seconds since the lock was last written; None without one, and for one of the kernel, which is not written again."""
    try:
        holder, written = read_holder(store), store.mtime(LOCK_FILE)
    except MissingFileError:
        return None
    return None if holder is not None and holder.kernel else max(0.0, clock() - written)


def is_held(store: Store) -> bool:
    """Whether a driver is at work. Writes nothing, so the age of a lock is told by this machine's clock."""
    if not store.exists(LOCK_FILE):
        return False
    with suppress(MissingFileError):
        handle = store.descriptor(LOCK_FILE)
        if handle is not None:
            with closing(handle):
                if try_flock(handle, shared=True) is None:
                    return True
    try:
        age = heartbeat_age(store) if _may_be_fresh(store.get(LOCK_FILE)) else None
        return age is not None and age <= DEFAULT_TIMING.stale
    except MissingFileError:
        return False


def _may_be_fresh(data: bytes) -> bool:
    """Whether the content of a lock file that the kernel does not lock may be of somebody who is alive."""
    holder = Holder.from_bytes(data)
    return bool(data) and (holder is None or not (holder.kernel or holder.ended_here()))


def _is_fresh(store: Store, data: bytes, timing: LockTiming) -> bool:
    """Whether the content of a lock file that the kernel does not lock keeps others out, by the clock of the storage. That
    may have been set back since the file was written: then whoever is alive writes it again, which is waited for."""
    if not _may_be_fresh(data):
        return False
    try:
        written = store.mtime(LOCK_FILE)
        age = store.clock() - written
        if age >= -timing.stale:
            return age <= timing.stale
        time.sleep(2 * timing.heartbeat)
        return store.mtime(LOCK_FILE) != written
    except MissingFileError:
        return False


def check_lock(store: Store) -> None:
    """StoreError if another driver has the lock now, as `is_held` tells."""
    if is_held(store):
        raise _in_use(store, read_holder(store), DEFAULT_TIMING)


def _in_use(store: Store, holder: Holder | None, timing: LockTiming) -> StoreError:
    kernel = holder is not None and holder.kernel
    gone = "" if kernel else f". If that driver is surely gone, wait {timing.stale:.0f} s or delete {LOCK_FILE}"
    return StoreError(
        f"{store.root} is in use by {holder or 'another driver'}",
        f"wait for it or stop it; `exl2ray status` shows its progress{gone}",
    )


class DriverLock:
    """Held from ``acquire`` to ``release``. ``on_beat`` is called where the lock has to be written again, each time."""

    def __init__(
        self, store: Store, timing: LockTiming = DEFAULT_TIMING, on_beat: Callable[[], None] = lambda: None
    ) -> None:
        self.store = store
        self.timing = timing
        self.taken_over: Holder | None = None  # the dead driver whose lock was replaced
        self._on_beat = on_beat
        self._mine = Holder.here()
        self._handle: int | None = None  # of the file, where the kernel locks it
        self._lost = ""
        self._last_beat = 0.0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._beating = threading.Lock()

    def acquire(self) -> None:
        """Take the lock or raise StoreError naming the driver that has it."""
        if not (self.store.is_local and self._lock_file()):
            self._claim()

    def _lock_file(self) -> bool:
        """Takes the kernel's lock; False if this file system has none."""
        for _ in range(_ATTEMPTS):
            with translated("write", self.store.full_name(LOCK_FILE)):
                os.close(self._opened(os.O_RDWR | os.O_CREAT))
                handle, got = open_locked(self._opened)
                try:
                    if got is False:
                        return False
                    if got and self._is_lock_file(handle) and self._written(handle):
                        self._handle, handle = handle, -1
                        return True
                finally:
                    if handle >= 0:
                        os.close(handle)
            if got is None:
                time.sleep(self.timing.settle / 40)  # somebody who only looks, or one who is just going
        raise _in_use(self.store, read_holder(self.store), self.timing)

    def _written(self, handle: int) -> bool:
        """Writes who holds the locked file; False if it has another name elsewhere, where nothing may be written."""
        if os.fstat(handle).st_nlink > 1:
            self.store.delete(LOCK_FILE)
            return False
        data = os.pread(handle, 1 << 16, 0)
        if _is_fresh(self.store, data, self.timing):
            raise _in_use(self.store, Holder.from_bytes(data), self.timing)
        self._mine, self.taken_over = replace(self._mine, kernel=True), Holder.from_bytes(data)
        with closing(self._opened(os.O_RDWR)) as writable:
            try:
                if not os.path.samestat(os.fstat(handle), os.fstat(writable)):
                    return False
                os.ftruncate(writable, 0)
                os.pwrite(writable, self._mine.to_bytes(), 0)
            except OSError:
                self.store.delete(LOCK_FILE)
                raise
        return True

    def _opened(self, flags: int) -> int:
        handle = self.store.descriptor(LOCK_FILE, flags)
        assert handle is not None  # of a local store
        return handle

    def _claim(self) -> None:
        """Writes our name where there is no lock of the kernel, and goes on writing it."""
        with suppress(MissingFileError):
            data = self.store.get(LOCK_FILE)
            if _is_fresh(self.store, data, self.timing):
                raise _in_use(self.store, Holder.from_bytes(data), self.timing)
            self.taken_over = Holder.from_bytes(data)
        self.store.put(LOCK_FILE, self._mine.to_bytes())
        time.sleep(self.timing.settle)
        holder = read_holder(self.store)
        if holder != self._mine:
            raise _in_use(self.store, holder, self.timing)
        self._last_beat = time.monotonic()
        self._thread = threading.Thread(target=self._keep_fresh, name="driver-lock", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise StoreError if this process no longer holds the lock: taken over while it was stopped, or removed."""
        if self._handle is not None:
            if not self._is_lock_file(self._handle):
                self._lose(read_holder(self.store))
        elif not self._lost and time.monotonic() - self._last_beat > self.timing.stale:
            self._beat()  # the process, or the storage, slept; raises if the storage still does not answer
        if self._lost:
            raise StoreError(f"{self.store.root}: {self._lost}", "see which driver runs, then run the command again")

    def release(self) -> None:
        """Give the lock back if it is still ours; later calls and calls in forked children do nothing."""
        if os.getpid() != self._mine.pid:
            return
        handle, self._handle = self._handle, None
        if handle is not None:
            with closing(handle):
                if self._is_lock_file(handle):  # removed while it is locked: who opened it meanwhile sees that it is gone
                    self.store.delete(LOCK_FILE)
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            if read_holder(self.store) == self._mine:
                self.store.delete(LOCK_FILE)

    def _is_lock_file(self, handle: int) -> bool:
        try:
            with closing(self._opened(os.O_RDONLY)) as now:
                return os.path.samestat(os.fstat(handle), os.fstat(now))
        except MissingFileError:
            return False

    def _lose(self, holder: Holder | None) -> None:
        self._lost = f"the lock of this driver was {f'taken over by {holder}' if holder else 'removed'}"

    def _keep_fresh(self) -> None:
        while not self._lost and not self._stop.wait(self.timing.heartbeat):
            with suppress(StoreError):  # the storage may come back; `check` raises once it has been silent for too long
                self._beat()
                self._on_beat()

    def _beat(self) -> None:
        with self._beating:
            holder = read_holder(self.store)
            if holder != self._mine:
                self._lose(holder)
                return
            self.store.put(LOCK_FILE, self._mine.to_bytes())
            self._last_beat = time.monotonic()
