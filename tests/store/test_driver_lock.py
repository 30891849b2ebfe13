"""One driver per work directory: refusal, takeover of stale locks, races."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from store_helpers import FAST

from exl2ray.errors import StoreError
from exl2ray.store.file_names import LOCK_FILE
from exl2ray.store.fs import Store
from exl2ray.store.local import LocalStore
from exl2ray.store.lock import DriverLock, Holder, LockTiming, check_lock, heartbeat_age, read_holder
from exl2ray.store.open import open_store

ELSEWHERE = replace(Holder.here(), host="node-7", boot_id="other")


def dead_driver(kernel: bool = False) -> Holder:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return replace(Holder.here(), pid=child.pid, kernel=kernel)


def wait_until(condition: Callable[[], bool], seconds: float = 300.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition did not become true in time"
        time.sleep(0.01)


def test_second_driver_is_refused_and_told_who_holds_it(store: Store) -> None:
    first, second = DriverLock(store, FAST), DriverLock(store, FAST)
    first.acquire()
    with pytest.raises(StoreError, match=f"in use by process {os.getpid()} on {socket.gethostname()} since 20"):
        second.acquire()
    second.release()  # never had it: must not remove it
    first.check()
    first.release()
    first.release()
    assert store.entries() == []
    second.acquire()
    second.release()


def test_second_driver_process_is_refused(tmp_path: Path) -> None:
    code = """
import sys
from exl2ray.errors import StoreError
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.store.lock import DriverLock
try:
    DriverLock(open_store(sys.argv[1])).acquire()
except StoreError as e:
    print(e)
"""
    lock = DriverLock(LocalStore(str(tmp_path)), FAST)
    lock.acquire()
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert f"in use by process {os.getpid()} on" in done.stdout
    lock.release()


@pytest.mark.parametrize("kernel", [False, True])
def test_lock_of_a_dead_process_is_taken_over_at_once(store: Store, kernel: bool) -> None:
    dead = dead_driver(kernel)
    store.put(LOCK_FILE, dead.to_bytes())
    lock = DriverLock(store, LockTiming(stale=1e6, settle=0.05))
    lock.acquire()
    assert lock.taken_over == dead
    lock.release()
    assert store.entries() == []


def test_other_machine_counts_by_its_heartbeat(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path))
    theirs = replace(ELSEWHERE, since=time.time() - 3600)
    store.put(LOCK_FILE, theirs.to_bytes())
    with pytest.raises(StoreError, match="on node-7 since"):
        DriverLock(store, LockTiming(settle=0.05)).acquire()
    assert read_holder(store) == theirs
    old = time.time() - 61
    os.utime(tmp_path / LOCK_FILE, (old, old))
    lock = DriverLock(store, LockTiming(settle=0.05))
    lock.acquire()
    assert lock.taken_over == theirs
    lock.release()


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_other_machine_on_an_object_store(kind: str, request: pytest.FixtureRequest) -> None:
    store = open_store(str(request.getfixturevalue(f"{kind}_root")))
    store.put(LOCK_FILE, ELSEWHERE.to_bytes())
    with pytest.raises(StoreError, match="node-7"):
        DriverLock(store, LockTiming(settle=0.05)).acquire()
    time.sleep(1.1)
    lock = DriverLock(store, LockTiming(heartbeat=0.1, stale=0.5, settle=0.05))  # S3 stamps have whole seconds
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("text", [b"{", b"[]", b'{"process": {"pid": 1}}', b'{"process": 3, "since": "x"}'])
def test_unreadable_lock_counts_by_its_age(tmp_path: Path, text: bytes) -> None:
    store = LocalStore(str(tmp_path))
    store.put(LOCK_FILE, text)
    with pytest.raises(StoreError, match="another driver"):
        DriverLock(store, FAST).acquire()
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    lock = DriverLock(store, FAST)
    lock.acquire()
    lock.release()


@pytest.mark.parametrize("pid", [0, -1, 2**40, "1", None])
def test_lock_with_an_impossible_process_number_is_unreadable(pid: object) -> None:
    holder = replace(ELSEWHERE, pid=pid)  # type: ignore[arg-type]
    assert Holder.from_bytes(holder.to_bytes()) is None


def test_a_driver_that_lost_its_lock_is_told_and_leaves_the_new_one_alone(store: Store) -> None:
    lock = DriverLock(store, FAST)
    lock.acquire()
    other = ELSEWHERE

    def lost() -> bool:
        store.put(LOCK_FILE, other.to_bytes())  # another machine took over while this process was stopped, and goes on to
        try:  # write its name: this one may be about to write for the last time
            lock.check()
        except StoreError:
            return True
        return False

    wait_until(lost)
    with pytest.raises(StoreError, match=r"taken over by process \d+ on node-7"):
        lock.check()
    lock.release()
    assert read_holder(store) == other


def without_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_flock(*args: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_flock)


@pytest.mark.parametrize("kind", ["local", "s3", "gs"])
def test_without_locks_of_the_kernel_the_name_is_kept_fresh(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    without_flock(monkeypatch)
    store = open_store(str(tmp_path) if kind == "local" else str(request.getfixturevalue(f"{kind}_root")))
    beats: list[int] = []
    lock = DriverLock(store, FAST, on_beat=lambda: beats.append(1))
    lock.acquire()
    if kind == "local":
        os.utime(tmp_path / LOCK_FILE, (1, 1))
    wait_until(lambda: len(beats) >= 2)
    age = heartbeat_age(store)
    assert age is not None
    assert age < 600  # not since 1970
    lock.check()
    with pytest.raises(StoreError, match="in use by process"):
        DriverLock(store, FAST).acquire()
    lock.release()
    assert store.entries() == []


def test_check_after_a_long_sleep_looks_at_the_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    store = LocalStore(str(tmp_path))
    lock = DriverLock(store, LockTiming(heartbeat=1e6, stale=0.0, settle=0.01))
    lock.acquire()
    lock.check()  # silent for longer than the limit, but still ours
    store.delete(LOCK_FILE)
    with pytest.raises(StoreError, match="removed"):
        lock.check()
    lock.release()


def test_takeover_without_flock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_flock(monkeypatch)
    store = LocalStore(str(tmp_path))
    dead = dead_driver()
    store.put(LOCK_FILE, dead.to_bytes())
    lock = DriverLock(store, FAST)
    lock.acquire()
    assert lock.taken_over == dead
    lock.release()


def test_a_name_from_the_future_keeps_nobody_out_unless_it_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock of the storage was ahead when the driver crashed, or still runs, and has been set back."""
    without_flock(monkeypatch)
    store, future = LocalStore(str(tmp_path)), time.time() + 1e8
    elsewhere = replace(Holder.here(), host="another")
    store.put(LOCK_FILE, elsewhere.to_bytes())
    os.utime(tmp_path / LOCK_FILE, (future, future))
    lock = DriverLock(store, FAST)
    lock.acquire()
    assert lock.taken_over == elsewhere
    os.utime(tmp_path / LOCK_FILE, (future, future))  # this one is alive
    with pytest.raises(StoreError, match="in use by process"):
        DriverLock(store, FAST).acquire()
    lock.release()


def test_the_kernel_frees_the_lock_of_a_killed_driver_and_of_none_else(tmp_path: Path) -> None:
    """Its file stays, however new, and keeps nobody out; while it ran, its file's age did not matter."""
    code = """
import sys
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.store.lock import DriverLock
DriverLock(open_store(sys.argv[1])).acquire()
print("held", flush=True)
sys.stdin.read()
"""
    store = LocalStore(str(tmp_path))
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    os.utime(tmp_path / LOCK_FILE, (1, 1))
    assert heartbeat_age(store) is None
    for refused in (lambda: check_lock(store), DriverLock(store, FAST).acquire):
        with pytest.raises(StoreError, match=f"in use by process {child.pid} on"):
            refused()
    child.kill()
    child.wait()
    child.stdin.close()  # type: ignore[union-attr]
    child.stdout.close()
    os.utime(tmp_path / LOCK_FILE)
    check_lock(store)
    lock = DriverLock(store, FAST)
    lock.acquire()
    assert lock.taken_over is not None
    assert lock.taken_over.pid == child.pid
    lock.release()


def test_a_lock_file_that_has_another_name_is_not_written(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    (tmp_path / "letters").write_text("years of work")
    os.link(tmp_path / "letters", tmp_path / "work" / LOCK_FILE)
    lock = DriverLock(store, FAST)
    lock.acquire()
    assert (tmp_path / "letters").read_text() == "years of work"
    assert read_holder(store) is not None
    lock.release()


def test_an_empty_lock_file_is_of_a_driver_that_was_killed_at_once(tmp_path: Path) -> None:
    (tmp_path / LOCK_FILE).touch()
    lock = DriverLock(LocalStore(str(tmp_path)), FAST)
    lock.acquire()
    lock.release()


def test_of_many_drivers_exactly_one_takes_over_a_stale_lock(tmp_path: Path) -> None:
    dead = dead_driver()
    for round_ in range(15):
        store = LocalStore(str(tmp_path / str(round_)))
        store.put(LOCK_FILE, dead.to_bytes())
        locks = [DriverLock(store, FAST) for _ in range(6)]
        barrier = threading.Barrier(len(locks))
        refused = []

        def compete(lock: DriverLock, barrier=barrier, refused=refused) -> None:  # type: ignore[no-untyped-def]
            barrier.wait()
            try:
                lock.acquire()
            except StoreError:
                refused.append(lock)

        threads = [threading.Thread(target=compete, args=(lock,)) for lock in locks]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        winners = [lock for lock in locks if lock not in refused]
        assert len(winners) == 1
        winners[0].check()
        winners[0].release()
        assert store.entries() == []


def test_forked_child_does_not_release(tmp_path: Path) -> None:
    code = """
import os, sys
from exl2ray.store.fs import Store
from exl2ray.store.open import open_store
from exl2ray.store.lock import DriverLock
store = open_store(sys.argv[1])
lock = DriverLock(store)
lock.acquire()
pid = os.fork()
if pid == 0:
    lock.release()
    os._exit(0)
os.waitpid(pid, 0)
print(store.entries())
lock.release()
print(store.entries())
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["['driver.lock']", "[]"]
