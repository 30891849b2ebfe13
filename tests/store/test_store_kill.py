"""kill -9 at any moment: what was acknowledged is there, what is there is whole, the end result is the same bytes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from exl2ray.store.fs import TEMP_PREFIX
from exl2ray.store.open import open_store
from exl2ray.store.records import Records

DRIVER = """
import hashlib, sys, time
from exl2ray.store.lock import LockTiming
from exl2ray.store.records import FileRef, Record, hash_inputs, item_file
from exl2ray.store.workdir import WorkDir

root, items, item_bytes, most = sys.argv[1], *map(int, sys.argv[2:])
job = {"identity": {"model": "m"}, "measure": {}, "quantize": {}, "output": {}}
with WorkDir.create_or_resume(
    root, job, resume=True, versions={}, timing=LockTiming(heartbeat=0.5, stale=60, settle=0.02)
) as work:
    done = work.records.scan("measure")
    assert not work.records.notes, work.records.notes
    for i in range(items):
        key, inputs = f"model.layers.{i}.mlp", hash_inputs(item=i)
        if (key, inputs) in done:
            continue
        data = hashlib.shake_128(key.encode()).digest(item_bytes)
        rel = item_file("measure", "states", key, inputs)
        work.store.put(rel, data)
        ref = FileRef(rel, hashlib.sha256(data).hexdigest(), len(data))
        work.records.commit(Record("measure", key, inputs, {"error": i / 7}, (ref,)))
        print(key, flush=True)
        most -= 1
        if not most:
            time.sleep(3600)  # to be killed
print("finished", flush=True)
"""


def start(root: str, items: int, item_bytes: int, most: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", DRIVER, root, str(items), str(item_bytes), str(most)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run_and_kill(root: str, items: int, item_bytes: int, acks: int, delay_seconds: float, most: int) -> list[str]:
    """Start a driver, kill it some time after its first ``acks`` acknowledgements; all lines it printed.

    After ``most`` items it waits for that: who is to kill it may be kept waiting for the processor.
    """
    driver = start(root, items, item_bytes, most)
    assert driver.stdout is not None
    lines = []
    for _ in range(acks):
        lines.append(driver.stdout.readline())
    time.sleep(delay_seconds)
    driver.send_signal(signal.SIGKILL)
    lines += driver.stdout.readlines()
    driver.wait()
    return [line.strip() for line in lines if line.endswith("\n")]


def contents(root: str) -> dict[str, object]:
    """Bytes of the results: state files, and records without the time and process that made them."""
    store = open_store(root)
    found: dict[str, object] = {n: store.get(n) for n in store.list("measure/states")}
    found |= {key: (r.payload, r.files) for (key, _), r in Records(store).scan("measure").items()}
    return found


def check_whole(root: str, acknowledged: set[str]) -> None:
    store = open_store(root)
    records = Records(store)
    keys = {key for key, inputs_hash in records.scan("measure") if records.find("measure", key, inputs_hash)}
    assert records.notes == []
    assert acknowledged <= keys
    assert not any(TEMP_PREFIX in n for n in store.list())


def test_killed_drivers_lose_nothing_and_end_with_the_same_bytes(tmp_path: Path) -> None:
    items, item_bytes, most = 400, 50_000, 18
    assert run_and_kill(str(tmp_path / "quiet"), items, item_bytes, items + 1, 0, items + 1)[-1] == "finished"
    root = str(tmp_path / "work")
    rng = random.Random(0)
    acknowledged: set[str] = set()
    kills = 0
    while kills < 100:
        lines = run_and_kill(root, items, item_bytes, rng.randrange(0, 12), rng.uniform(0, 0.02), most)
        if "finished" in lines:
            break
        kills += 1
        acknowledged |= set(lines) - {""}
        if os.path.exists(root):
            check_whole(root, acknowledged)
    assert 20 <= kills < 100
    assert contents(root) == contents(str(tmp_path / "quiet"))
    left = [f for _, _, files in os.walk(root) for f in files if f.startswith(".")]
    assert left == []


@pytest.mark.parametrize("kind", ["s3", "gs"])
@pytest.mark.parametrize("item_bytes", [1000, 11 << 20])  # one PUT; an upload in parts
def test_killed_driver_on_an_object_store(kind: str, item_bytes: int, request: pytest.FixtureRequest) -> None:
    root = str(request.getfixturevalue(f"{kind}_root"))
    acknowledged: set[str] = set()
    for acks in (1, 2):
        acknowledged |= set(run_and_kill(root, 100, item_bytes, acks, 0.03, 50))
        check_whole(root, acknowledged)
    assert len(acknowledged) >= 3
