"""kill -9 of a real conversion at random points: the same command again, the same bytes, nothing done twice."""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
from convert_helpers import MEASURED, QUANTISED, Quiet, calibration_file, contents, logged
from forks import fork_server

from exl2ray.store.fs import TEMP_PREFIX

KILLS = 12
EVENTS = ("start", "item", "end")


def command(model: Path, root: Path) -> list[str]:
    """`exl2ray convert` as a user starts it; states are saved after every module."""
    return [
        "exl2ray", "convert", "--json", "-i", str(model), "-o", str(root / "work"), "-cf", str(root / "out-{bpw}"),
        "-b", "4", "-b", "5", "-l", "128", "-ml", "128", "--device", "cpu", "--executor", "inline",
        "--evaluate", "never", "--quality", "reference",
        "--checkpoint-seconds", "0", "-c", calibration_file(), "-mr", str(MEASURED), "-r", str(QUANTISED),
    ]  # fmt: skip


def run_cli(argv: list[str], output: Path) -> None:
    """In a process of its own: the program with its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from exl2ray.cli import main

    sys.argv = argv
    main()


@pytest.fixture
def forkserver(monkeypatch: pytest.MonkeyPatch) -> Iterator[ForkServerContext]:
    """Starts processes that have the imports, which take most of the time of these small conversions, behind them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # inherited; the quiet conversion uses one thread, and sums depend on it
    yield fork_server()
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def run_and_kill(context: ForkServerContext, argv: list[str], output: Path, rng: random.Random) -> bool:
    """Starts the conversion and kills it after some of its events and a moment; whether it was still running."""
    process = context.Process(target=run_cli, args=(argv, output))
    output.write_text("")
    process.start()
    wanted = rng.choice([0, 1, 1, 2, 2, 3])
    while process.is_alive() and sum(e in EVENTS for e in reported(output)) < wanted:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.1))
    assert process.pid is not None
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0), output.read_text()
    return process.exitcode != 0


def reported(output: Path) -> list[str]:
    """Names of the events of a run so far, those of complete lines."""
    text = output.read_text()
    return [json.loads(line)["event"] for line in text[: text.rfind("\n") + 1].splitlines() if line.startswith("{")]


def committed(work: Path) -> dict[str, str]:
    """Records of finished modules: who made them, when and what, but not where it lies. Those of saved states come and go."""
    found = {}
    for path in (p for p in work.glob("**/records/*.json") if not p.name.startswith("states-")):
        record = json.loads(path.read_text())["record"]
        for file in record["files"]:
            file.pop("pieces", None)
        found[str(path.relative_to(work))] = json.dumps(record)
    return found


@pytest.mark.slow
def test_a_killed_conversion_goes_on_where_it_was(quiet: Quiet, tmp_path: Path, forkserver: ForkServerContext) -> None:
    rng = random.Random(20240607)
    kills = job = 0
    while kills < KILLS:  # a job that is finished early is followed by another
        job += 1
        root, output = tmp_path / str(job), tmp_path / f"{job}.log"
        before = committed(root / "work")
        running = True
        while running and kills < KILLS:
            running = run_and_kill(forkserver, command(quiet.model, root), output, rng)
            kills += running
            now = committed(root / "work")
            assert before.items() <= now.items(), "a committed record was written again"
            before = now
        final = forkserver.Process(target=run_cli, args=(command(quiet.model, root), output))
        final.start()
        final.join()
        assert final.exitcode == 0, output.read_text()
        assert reported(output)[-1] == "done"
        assert before.items() <= committed(root / "work").items()
        compare_with(quiet, root)


def compare_with(quiet: Quiet, root: Path) -> None:
    for bits, output in quiet.outputs.items():
        assert contents(root / f"out-{bits}") == contents(output)
    assert (root / "work" / "measurement.json").read_bytes() == (quiet.work / "measurement.json").read_bytes()
    for folder in ("quant/4.0/tensors", "quant/5.0/tensors"):
        assert contents(root / "work" / folder) == contents(quiet.work / folder)
    items = Counter((fields["stage"], fields["key"]) for fields in logged(root / "work", "item"))
    assert set(items) <= {(f["stage"], f["key"]) for f in logged(quiet.work, "item")}
    assert max(items.values()) == 1, "an item was computed again after it had been reported as finished"
    assert committed(root / "work").keys() == committed(quiet.work).keys()
    left = [p for p in root.rglob("*") if p.name.startswith(TEMP_PREFIX) or p.name.endswith(".tmp")]
    assert left == []
