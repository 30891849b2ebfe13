#!/usr/bin/env python3
"""Where a conversion's seconds go from the command to the first module at work, then stops it.

    python scripts/start_timeline.py -i MODEL [--runs 2] [--json] [flags of convert]

Runs `exl2ray convert -i MODEL -o TEMPORARY -b 4` with the flags given, reads the event log of its work directory until the
first module begins, and interrupts it. The first run on a machine compiles kernels and reads files from the disk, the second
does not: both are shown. Seconds count from the start of the process; a step marked + goes on beside the others.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from peak_memory import family

POLL_SECONDS = 0.02


def first_module(events: Path) -> tuple[dict[str, Any], float] | None:
    """The steps, and the seconds after which the first module began; None before it has."""
    if not events.is_file():
        return None
    start = None
    for line in events.read_text(encoding="utf-8").splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # half written
            continue
        if event["name"] == "start":
            start = event
        if event["name"] == "started" and start is not None:
            since = datetime.fromisoformat(event["time"].replace("Z", "+00:00")) - datetime.fromisoformat(
                start["time"].replace("Z", "+00:00")
            )
            return start["fields"], start["fields"]["seconds"] + since.total_seconds()
    return None


def processor_seconds(process: int) -> float:
    """Of a process and all below it: a machine that is shared slows the clock down, not these."""
    ticks = 0
    for pid in family(process):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def timeline(model: Path, flags: list[str], patience: float) -> dict[str, Any]:
    """One run, up to the first module."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        program = "import sys; from exl2ray.cli import program; program()"
        command = [sys.executable, "-c", program, "convert", "-i", str(model), "-o", str(work), "-b", "4", *flags]
        begin = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            while time.monotonic() < begin + patience and process.poll() is None:
                found = first_module(work / "events.jsonl")
                if found is not None:
                    spent = processor_seconds(process.pid)
                    return {**found[0], "first_module": round(found[1], 2), "processor": round(spent, 2)}
                time.sleep(POLL_SECONDS)
        finally:
            for _ in range(2):  # the second does not wait for the module
                process.send_signal(signal.SIGINT)
                time.sleep(0.5)
            process.wait()
    raise SystemExit(f"no module began within {patience:.0f} s; the program ended with status {process.returncode}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-i", "--in-dir", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--patience", type=float, default=300, help="seconds for one run")
    parser.add_argument("--json", action="store_true")
    args, flags = parser.parse_known_args()
    for run in range(args.runs):
        found = timeline(args.in_dir, flags, args.patience)
        if args.json:
            print(json.dumps(found))
            continue
        print(f"run {run + 1}")
        for s in found["steps"]:
            seconds, mark = s["end"] - s["begin"], "+" if s["beside"] else " "
            print(f"  {s['begin']:7.2f} .. {s['end']:6.2f}  {seconds:6.2f} s {mark} {s['step']}")
        words = f"first module at work; {found['processor']:.2f} s of processor time"
        print(f"  {found['first_module']:7.2f} s: {words}", flush=True)


if __name__ == "__main__":
    main()
