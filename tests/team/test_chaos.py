"""Chaos: workers of a full conversion are killed at random every few seconds. Slow.

Two bitrates, three workers, at least twenty kills with SIGKILL from outside, at seeded random times. The result has the
bytes of a quiet run, and nothing that had been committed is computed again: after the event that an item is finished there
is no call on it any more.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import team_helpers
from team_helpers import digests, recipe

import exl2ray.steps.job
from exl2ray.convert import convert
from exl2ray.driver.policy import Limits
from exl2ray.events import Silent
from exl2ray.store.event_log import read_events
from exl2ray.store.open import open_store
from exl2ray.team.messages import Begun
from exl2ray.team.worker import Worker

KILLS = 20
BITS = (4.0, 5.0)
# Kills from outside are nobody's fault, and with so many of them some item is hit three times.
PATIENT = Limits(losses=10**6, grace=2.0, patience=3.0, rest=0.1)


class SlowWorker(Worker):
    """Long enough in every item to be killed there, before the work and after the commit."""

    def run(self, part: Any) -> Any:
        for said in super().run(part):
            if isinstance(said, Begun):
                yield said
                self._sleep(0.5)
            else:
                self._sleep(0.3)
                yield said

    def _sleep(self, seconds: float) -> None:
        if Path(f"{self.setup.work_root}.chaos").exists():  # until there were enough kills
            time.sleep(seconds)


class Killer(threading.Thread):
    """Kills a random worker of ours now and then, until it has killed enough; twice per finished item at most."""

    def __init__(self, work: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.work, self.random, self.killed = work, random.Random(seed), 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while self.killed < KILLS and not self.stopped.wait(self.random.uniform(0.3, 1.2)):
            done = [e for e in read_events(open_store(str(self.work)))[0] if e["name"] == "item"]
            pids = self.pids()
            if pids and self.killed < 2 * (len(done) + 1):
                os.kill(self.random.choice(pids), signal.SIGKILL)
                self.killed += 1
        Path(f"{self.work}.chaos").unlink(missing_ok=True)

    def pids(self) -> list[int]:
        """Workers that have been given something to do and run."""
        found = set()
        for event in read_events(open_store(str(self.work)))[0]:
            if event["name"] == "started":
                found.add(int(event["fields"]["worker"].rpartition(":")[2]))
        return sorted(p for p in found if b"ray::" in _command(p))


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_chaos(seed: int, model: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet, work = tmp_path / "quiet", tmp_path / "work"
    convert(recipe(model, quiet, bits=BITS), Silent())
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(__import__(__name__))
    ray.cloudpickle.register_pickle_by_value(team_helpers)
    monkeypatch.setattr(exl2ray.steps.job, "Worker", SlowWorker)
    monkeypatch.setattr(exl2ray.steps.job, "Limits", lambda: PATIENT)
    Path(f"{work}.chaos").touch()
    killer = Killer(work, seed)
    killer.start()
    start = time.monotonic()
    try:
        convert(recipe(model, work, bits=BITS, gpus=3, ray_address=cluster.address), Silent())
    finally:
        killer.stopped.set()
        killer.join()
    print(f"{killer.killed} kills in {time.monotonic() - start:.0f} s")
    assert killer.killed >= KILLS
    assert digests(work) == digests(quiet)
    assert computed_again(work) == []


def computed_again(work: Path) -> list[str]:
    """Items with a call that computes them after the event that they are finished."""
    out, done = [], set()
    for event in read_events(open_store(str(work)))[0]:
        f = event["fields"]
        if event["name"] == "item":
            done.add((f["stage"], f["key"]))
        elif event["name"] == "started" and f["method"] in ("measure", "chain"):
            stage = "measure" if f["bits"] is None else f"quantize {f['bits']}"
            if (stage, f["key"]) in done:
                out.append(f"{stage}: {f['key']}")
    assert len(done) == 4 + 5 * len(BITS)
    return out
