"""Running ``exl2ray`` within limits of time and memory that are set and watched from outside.

    run = exl2ray("plan", "-i", folder, "-b", "3")
    assert run.status == 3 and "GGUF" in run.text

Starting a Python that imports torch takes seconds, a fork of one that has it milliseconds: a server process imports the
program once and forks for every run. A run is a session of its own; its processes are watched together (resident memory,
summed) and killed together. What hostile input does to a run, it cannot do to the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from ordinary_user import give_up_privileges

ROOT = Path(__file__).resolve().parents[1]
SECONDS, MEMORY = 10.0, 2 << 30  # of a command that only looks: plan, --dry-run, inspect, verify, solve
WAITING = 30.0  # times the limit that a run may wait where other processes have the machine
POLL_SECONDS = 0.02
CLOSED = "closed"


@dataclass(frozen=True)
class Run:
    """What a run of the program left."""

    status: int  # of the exit; minus the signal that ended it
    out: str
    err: str
    seconds: float
    cpu_seconds: float  # of all its processes that it waited for
    peak_bytes: int  # resident, of all its processes
    stopped: str  # "", or the limit that ended it: "memory", "time"

    @property
    def text(self) -> str:
        """Both streams, white space folded: messages are wrapped to the terminal."""
        return " ".join((self.out + " " + self.err).split())

    def __str__(self) -> str:
        facts = f"status {self.status}, {self.seconds:.1f} s, {self.peak_bytes / 2**20:.0f} MiB {self.stopped}"
        return f"{facts}\n--- out\n{self.out[-3000:]}\n--- err\n{self.err[-3000:]}"

    def ends_with(self, status: int, *words: str) -> None:
        """Asserts the exit status, that no limit was met, no traceback shown, and that the messages have ``words``."""
        assert not self.stopped, str(self)
        assert self.status == status, str(self)
        assert "Traceback" not in self.text, str(self)
        for word in words:
            assert word in self.text, f"{word!r} is missing\n{self}"


def exl2ray(
    *arguments: str | Path,
    seconds: float = SECONDS,
    memory: int = MEMORY,  # bytes
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,  # in addition to this process's
    output: str = "",  # a file to write to in place of what the Run keeps; CLOSED: a pipe that nobody reads any more
    ordinary: bool = False,  # permissions count, even if this is root
) -> Run:
    """Runs the command line with ``arguments`` in a process of its own.

    A run is ended when it holds more than ``memory``, or has taken ``seconds``. Where other processes keep the machine busy,
    time is only held against a run that has also used that much of the processor, or has waited thirty times as long.
    """
    server = _server()
    request = {"arguments": [str(a) for a in arguments], "seconds": seconds, "memory": memory,
               "cwd": str(cwd or os.getcwd()), "env": dict(env or {}), "output": output, "ordinary": ordinary}  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    answer = server.stdout.readline()
    if not answer:
        raise RuntimeError("the server that forks runs has ended")
    return Run(**json.loads(answer))


# ---- the server ---------------------------------------------------------------------------------------------------------


@cache
def _server() -> subprocess.Popen[str]:
    path = os.pathsep.join(p for p in (str(ROOT), os.environ.get("PYTHONPATH")) if p)
    # A file, not a pipe, for what the server itself says: nobody would read the pipe.
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).resolve()), "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    atexit.register(process.kill)
    return process


def _serve() -> None:
    for name in ("preloaded", "exl2ray.report.page", "matplotlib.backends.backend_svg"):
        import_module(name)

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a stray print must not look like an answer
    for line in sys.stdin:
        answers.write(json.dumps(asdict(_watched(json.loads(line)))) + "\n")
        answers.flush()


def _watched(request: dict[str, Any]) -> Run:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()
        pid = os.fork()
        if pid == 0:
            _child(request, out.fileno(), err.fileno())
        peak, stopped, handle = 0, "", os.pidfd_open(pid)
        while not stopped and not select.select([handle], [], [], POLL_SECONDS)[0]:
            held, used = _session(pid)
            peak = max(peak, held)
            waited = time.monotonic() - start
            if held > request["memory"]:
                stopped = "memory"
            elif waited > request["seconds"] and (used > request["seconds"] or waited > WAITING * request["seconds"]):
                stopped = "time"
        if stopped:
            _kill_session(pid)
        _, status, usage = os.wait4(pid, 0)
        os.close(handle)
        seconds = time.monotonic() - start
        _kill_session(pid)  # what it left running
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode(errors="replace"))
        cpu = usage.ru_utime + usage.ru_stime
        return Run(os.waitstatus_to_exitcode(status), *texts, seconds, cpu, max(peak, usage.ru_maxrss << 10), stopped)


def _child(request: dict[str, Any], out: int, err: int) -> NoReturn:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(_output(request["output"], out), 1)
    os.dup2(err, 2)
    code: Any = 70
    try:
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        if request["ordinary"]:
            give_up_privileges()
        sys.argv = ["exl2ray", *request["arguments"]]
        from exl2ray.cli import main

        main()
        code = 0
    except SystemExit as e:
        code = e.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()  # as the interpreter does
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def _output(wanted: str, kept: int) -> int:
    if wanted == CLOSED:
        reader, writer = os.pipe()
        os.close(reader)
        return writer
    return os.open(wanted, os.O_WRONLY) if wanted else kept


def _session(leader: int) -> tuple[int, float]:
    """Resident bytes and processor seconds of all processes of a session."""
    held, ticks = 0, 0
    for pid in _members(leader):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            held += int(fields[21]) * resource.getpagesize()
    return held, ticks / os.sysconf("SC_CLK_TCK")


def _members(leader: int) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.getsid(int(entry)) == leader:
                    found.append(int(entry))
    return found


def _kill_session(leader: int) -> None:
    for pid in _members(leader):
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
