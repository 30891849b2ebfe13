#!/usr/bin/env python3
"""The memory of a command and all its children, watched from outside; beside it what `plan` says of the same conversion.

    python scripts/peak_memory.py [--every 0.1] [--json] -- convert -i MODEL -o WORK -b 4 [flags of convert]

Main memory is the sum of the processes' proportional set sizes (PSS: a page that several share counts once), split into what
is theirs (anonymous), pages of files (libraries, mapped weights: the system takes them back when it needs to) and shared
memory. GPU memory is what nvidia-smi says these processes hold. The peak of each pass goes by the event log of the work
directory. Linux alone has what this reads (/proc/PID/smaps_rollup).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIELDS = {"Pss": "all", "Pss_Anon": "own", "Pss_File": "files", "Pss_Shmem": "shared"}
GPU_EVERY_SECONDS = 1.0
PROGRAM = "import sys; from exl2ray.cli import program; program()"


@dataclass
class Peaks:
    """Bytes at the moment when all together were most, by kind; and of the GPUs at theirs."""

    memory: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FIELDS.values(), 0))
    gpu: int = 0

    def take(self, memory: dict[str, int], gpu: int) -> None:
        self.memory = max(self.memory, memory, key=lambda m: m["all"])
        self.gpu = max(self.gpu, gpu)


def family(root: int) -> Iterator[int]:
    """A process and everything below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    todo = [root]
    while todo:
        process = todo.pop()
        yield process
        todo += children.get(process, ())


def memory_of(processes: list[int]) -> dict[str, int]:
    """Bytes by kind, of all together."""
    out = dict.fromkeys(FIELDS.values(), 0)
    for process in processes:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in FIELDS:
                    out[FIELDS[name]] += 1024 * int(rest.split()[0])
    return out


def gpu_bytes(processes: list[int]) -> int:
    """What they hold on all GPUs; 0 without nvidia-smi."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    found = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    rows = [line.split(",") for line in found.splitlines() if line.count(",") == 1]
    return sum(int(used) << 20 for pid, used in rows if int(pid) in processes and used.strip().isdigit())


def stage_of(events: Path) -> str:
    """The pass that the event log was told of last."""
    with contextlib.suppress(OSError):
        for line in reversed(events.read_text(encoding="utf-8").splitlines()):
            with contextlib.suppress(ValueError):
                event = json.loads(line)
                if event["name"] == "stage":
                    return str(event["fields"]["stage"])
    return "start"


def watch(command: list[str], work: Path, every: float) -> tuple[dict[str, Peaks], int]:
    """Peaks by pass, and "whole"; the status of the command."""
    peaks: dict[str, Peaks] = {}
    process, gpu, looked = subprocess.Popen(command, stdout=sys.stderr), 0, 0.0
    has_gpu = shutil.which("nvidia-smi") is not None
    while process.poll() is None:
        running = list(family(process.pid))
        if has_gpu and time.monotonic() > looked + GPU_EVERY_SECONDS:
            gpu, looked = gpu_bytes(running), time.monotonic()
        memory = memory_of(running)
        for name in (stage_of(work / "events.jsonl"), "whole"):
            peaks.setdefault(name, Peaks()).take(memory, gpu)
        time.sleep(every)
    return peaks, process.returncode


def planned(flags: list[str]) -> list[dict[str, Any]]:
    """What `plan` says of each pass."""
    command = [sys.executable, "-c", PROGRAM, "plan", *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        devices = json.loads(done.stdout.splitlines()[-1])["memory"]
        return [{"device": device["device"], **peak} for device in devices for peak in device["peaks"]]
    except (ValueError, KeyError, IndexError):
        return []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=float, default=0.1, help="seconds between two looks")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("command", nargs="+", help="of exl2ray, after --")
    args = parser.parse_args()
    flags = args.command[1:]
    work = Path(flags[flags.index("-o") + 1]) if "-o" in flags else Path(os.devnull)
    plan = planned(flags)
    peaks, status = watch([sys.executable, "-c", PROGRAM, *args.command], work, args.every)
    if args.json:
        print(json.dumps({"peaks": {n: {**p.memory, "gpu": p.gpu} for n, p in peaks.items()}, "plan": plan}))
    else:
        print("| pass | main memory, GB | own | files | shared | GPU, GB |\n|---|---|---|---|---|---|")
        for name, p in peaks.items():
            cells = [f"{p.memory[kind] / 1e9:.2f}" for kind in FIELDS.values()] + [f"{p.gpu / 1e9:.2f}"]
            print(f"| {name} | {' | '.join(cells)} |")
        for p in plan:
            gpu = "" if p.get("gpu_bytes") is None else f", GPU {p['gpu_bytes'] / 1e9:.2f} GB"
            print(f"plan, {p['device']}: {p['stage']} {p['ram_bytes'] / 1e9:.2f} GB{gpu}")
    raise SystemExit(status)


if __name__ == "__main__":
    main()
