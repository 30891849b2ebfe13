"""The doctor's look at Ray: does a private one start, does the cluster that is named answer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from exl2ray.doctor.diagnosis import OPEN_FILES, Finding, Level, Remedies, problem, remedy
from exl2ray.doctor.probes import Probe
from exl2ray.driver.private import TEMP_PREFIX
from exl2ray.driver.starting import trusted_folder
from exl2ray.wording import duration


def ray_start(found: Probe, gpus: int) -> list[Finding]:
    """Whether a private local Ray starts, which several GPUs need; one device does without."""
    if "error" not in found:
        seconds = duration(float(found.get("seconds", 0)))
        return [Finding("local Ray", f"{found.get('version')}, started and ran a task in {seconds}")]
    error = str(found["error"])
    level: Level = "problem" if gpus > 1 else "warning"
    fix = _ray_fix(error)
    if gpus <= 1:
        fix += "; one device needs no Ray, so this matters for several GPUs and clusters only"
    return [Finding("local Ray", f"does not start: {error}", level, fix)]


def _ray_fix(error: str) -> str:
    """What to do about a Ray that does not start; the complaints are those of Ray 2.54 to 2.60."""
    folder = os.environ.get("RAY_TMPDIR")
    try:
        folder = folder or tempfile.gettempdir()
    except FileNotFoundError:  # none can be written
        folder = os.environ.get("TMPDIR") or "/tmp"
    logs = f"logs: {folder}/{TEMP_PREFIX}*/r/session_latest/logs"
    fixes: Remedies = {
        ("No module named",): "pip install exl2ray again: a package is missing",
        ("AF_UNIX path",): f"{folder} is too long a path for Ray's sockets: export RAY_TMPDIR=/tmp",
        ("Read-only file system", "Permission denied", "No usable temporary directory"):
            f"Ray must write into {folder}: export RAY_TMPDIR to a directory of your own with a short name",
        ("No space left",): f"{folder} is full: make room, or export RAY_TMPDIR to a directory on another disk",
        ("Too many open files", "timed out during startup"):
            f"raise the limit of open files (ulimit -n {OPEN_FILES * 16}); is the machine overloaded? {logs}",
        ("SystemExit", "no answer within"):
            "its processes end or cannot talk to each other: does `getent hosts $(hostname)` answer, is the loopback "
            f"interface up, is memory left? unset http_proxy, https_proxy and grpc_proxy; {logs}",
    }  # fmt: skip
    return remedy(error, fixes, f"{logs}; ray stop --force ends what an earlier run left")


def ray_cluster(address: str) -> list[Finding]:
    """Whether the cluster that a conversion would use answers."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, cwd=trusted_folder())
        answer = "" if ran.returncode == 0 else (ran.stderr or ran.stdout).strip().splitlines()[-1][:200]
    except (OSError, subprocess.TimeoutExpired) as e:
        answer = " ".join(str(e).split())[:200]
    except IndexError:
        answer = "no answer"
    if not answer:
        return [Finding("Ray cluster", f"RAY_ADDRESS={address} answers")]
    fix = "unset RAY_ADDRESS for a private local Ray, or start the cluster"
    return problem("Ray cluster", f"RAY_ADDRESS={address} does not answer: {answer}", fix)
