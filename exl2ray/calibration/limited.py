"""A child process with limits on memory and time, for what runs code or pipelines of a model's author.

Chat templates are programs, and a ``tokenizer.json`` can describe normalisers whose output grows without bound. Both run in
a process of their own (`exl2ray.calibration.limited_child`), so that what they do to it they do not do to the conversion.
It gets no secrets of the environment, may not write files, and ends when its memory or its time is used up, which is told
as a reason in words.

Time is processor time, so a busy machine does not make a difference. It is an account: each request adds what it may take,
so that a thousand small requests cannot take a thousand times the patience that one needs.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
POLL_SECONDS = 0.02
WAITING_SECONDS, WAITING = 120.0, 10.0  # for the clock: a machine may have ten times as much to do as it has cores
MAX_HEAD_BYTES = 64 * MIB
THREADS = 16  # of the tokenizers library; the stacks of a hundred would not fit into the limit
# What Python and its libraries need to start; tokens and passwords are not among it.
ENVIRONMENT = ("PATH", "HOME", "TMPDIR", "LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "TZ")
BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from exl2ray.calibration.limited_child import main; main(sys.argv[2])"
)


class ChildError(Exception):
    """The child could not do what it was asked; the text says why, for people. ``ended``: and it is no longer there."""

    def __init__(self, reason: str, ended: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.ended = reason, ended


class LimitedProcess:
    """One child that serves ``kind``, a table of `limited_child`. Starts at once; 0.1 s until it answers.

    Once it has ended, every further request raises the same reason. ``close`` ends it; so do the garbage collector and the
    end of this process.
    """

    def __init__(self, kind: str) -> None:
        paths = [p for p in sys.path if p]  # the current directory, "", may be a downloaded one
        package = str(Path(__file__).resolve().parents[2])
        if package not in paths:
            paths.append(package)
        threads = str(max(1, min(THREADS, os.cpu_count() or 1)))
        env = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
        env |= {"RAYON_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", BOOT, json.dumps(paths), kind], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=env, bufsize=0,
        )  # fmt: skip
        self._reason = ""  # why it ended
        self._cpu_seconds = 1.0  # that it may have used so far; starting takes a tenth of it
        self._end = weakref.finalize(self, _end, self._process, os.getpid())

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(
        self,
        request: Mapping[str, Any],  # JSON, with "op"
        blobs: Sequence[bytes] = (),
        *,
        cpu_seconds: float,  # added to what it may have used
        memory_bytes: int,  # that it may hold while it works on this
        answer_bytes: int = MAX_HEAD_BYTES,  # the most that its answer can have
    ) -> tuple[dict[str, Any], list[bytes]]:
        """Its answer. Raises ChildError with a reason: the one it gave, or the limit that ended it."""
        if self._reason:
            raise ChildError(self._reason, ended=True)
        self._cpu_seconds += cpu_seconds
        limits = {"memory": memory_bytes, "cpu": math.ceil(self._cpu_seconds) + 1}  # the clock of the system is coarse
        exchange = _Exchange(self._process, memory_bytes, self._cpu_seconds)
        try:
            answer, data = exchange.run({**request, "limits": limits, "blobs": [len(b) for b in blobs]}, blobs, answer_bytes)
        except ChildError as e:
            self._reason = e.reason
            self.close()
            raise
        except BaseException:  # interrupted: an answer that nobody reads may be on its way
            self._reason = "interrupted"
            self.close()
            raise
        if "error" in answer:
            raise ChildError(str(answer["error"]))
        return answer, data

    def close(self) -> None:
        self._reason = self._reason or "closed"
        self._end()


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # a fork of the owner
        return
    with contextlib.suppress(OSError):
        process.kill()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()
    process.wait()


class _Exchange:
    """One request and its answer, watched: the limits of the operating system are set by the child, and not every system has
    them all.
    """

    def __init__(self, process: subprocess.Popen[bytes], memory_bytes: int, cpu_seconds: float) -> None:
        self.process, self.memory_bytes, self.cpu_seconds = process, memory_bytes, cpu_seconds
        self.deadline = time.monotonic() + WAITING_SECONDS + WAITING * cpu_seconds

    def run(
        self, request: Mapping[str, Any], blobs: Sequence[bytes], answer_bytes: int
    ) -> tuple[dict[str, Any], list[bytes]]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        head = json.dumps(request).encode()
        try:
            for part in (struct.pack("<Q", len(head)), head, *blobs):
                self._write(self.process.stdin.fileno(), part)
        except OSError as e:
            raise self._ended() from e
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            size = struct.unpack("<Q", self._read(selector, 8))[0]
            self._check_size(size, MAX_HEAD_BYTES)
            try:
                answer = json.loads(self._read(selector, size))
                sizes = [int(n) for n in answer.get("blobs", [])]
            except (ValueError, AttributeError, TypeError, RecursionError) as e:
                raise ChildError("gave an answer that cannot be read", ended=True) from e
            self._check_size(sum(sizes), answer_bytes)
            return answer, [self._read(selector, n) for n in sizes]

    def _write(self, fd: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view[: 1 << 20]) :]

    def _check_size(self, size: int, most: int) -> None:
        if not 0 <= size <= most:
            raise ChildError(f"gave an answer of {size >> 20} MB", ended=True)

    def _read(self, selector: selectors.BaseSelector, size: int) -> bytes:
        assert self.process.stdout is not None
        out = bytearray()
        while len(out) < size:
            if not selector.select(POLL_SECONDS):
                self._watch()
                continue
            part = os.read(self.process.stdout.fileno(), min(size - len(out), MIB))
            if not part:
                raise self._ended()
            out += part
        return bytes(out)

    def _watch(self) -> None:
        held, used = _usage(self.process.pid)
        if held > self.memory_bytes:
            raise ChildError(_memory_reason(self.memory_bytes), ended=True)
        if used > self.cpu_seconds:
            raise ChildError(f"did not finish within {self.cpu_seconds:.0f} s of processor time", ended=True)
        if time.monotonic() > self.deadline:
            raise ChildError("did not finish in the time it was given", ended=True)

    def _ended(self) -> ChildError:
        """Why it is gone: signals of the limits that it has set for itself, and what libraries do at their limit."""
        try:
            status = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            return ChildError("closed its answer", ended=True)
        if status == -signal.SIGXCPU:
            return ChildError(f"did not finish within {self.cpu_seconds:.0f} s of processor time", ended=True)
        if status in (-signal.SIGABRT, -signal.SIGKILL):  # allocation failed in compiled code; the system ran out
            return ChildError(_memory_reason(self.memory_bytes), ended=True)
        what = f"crashed ({signal.Signals(-status).name})" if status < 0 else f"ended with status {status}"
        return ChildError(what, ended=True)


def _memory_reason(limit: int) -> str:
    return f"used more than {limit >> 20} MB of memory"


def _usage(pid: int) -> tuple[int, float]:
    """Resident bytes and processor seconds of a process; zeros where the system does not tell, or it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[21]) * os.sysconf("SC_PAGE_SIZE"), (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0, 0.0
