"""Real conversions in processes of their own, with pipes for streams, that tests send signals to."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

SECONDS = 600.0  # for one run, on a machine that is busy with other things


def _stop_at(event: str) -> None:
    """This process stops itself when it has told of the first event of this name."""
    from exl2ray.terminal import console

    say = console.say

    def say_and_stop(stream: TextIO, line: str) -> None:
        say(stream, line)
        if line.startswith(f'{{"event": "{event}"'):
            console.say = say
            os.kill(os.getpid(), signal.SIGSTOP)

    console.say = say_and_stop


def _child(argv: Sequence[str], out: Any, err: str, prepare: Callable[[], None] | None, stop_at: str) -> None:
    os.setsid()
    os.dup2(out.fileno(), 1)
    out.close()
    file = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 2)
    os.close(file)
    if prepare is not None:
        prepare()
    sys.stdout, sys.stderr = open(1, "w"), open(2, "w")  # the old ones believe that they are files
    if stop_at:
        _stop_at(stop_at)
    sys.argv = ["exl2ray", *argv]
    from exl2ray.cli import main

    main()


class Stopped:
    """A run of the command line whose standard output is a pipe.

    With ``stop_at`` it stops itself (SIGSTOP) as soon as it has told of an event of this name, so that what is done to it
    then is done in the middle, however busy the machine is; then `go_on`.
    """

    def __init__(
        self, made: ForkServerContext, argv: Sequence[str], err: Path, prepare: Any = None, stop_at: str = ""
    ) -> None:
        self.reader, writer = made.Pipe(duplex=False)
        self._err = err
        self.process: BaseProcess = made.Process(target=_child, args=(list(argv), writer, str(err), prepare, stop_at))
        self.process.start()
        writer.close()
        self._text = ""
        self._deadline = time.monotonic() + SECONDS

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def err(self) -> str:
        return self._err.read_text() if self._err.exists() else ""

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def go_on(self) -> None:
        self.signal(signal.SIGCONT)

    def is_stopped(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"

    def until(self, seen: Callable[[Stopped], bool]) -> None:
        """Reads on until ``seen``; fails if the run ends before, or takes too long."""
        while not seen(self):
            goes_on = self._read() and time.monotonic() < self._deadline
            assert goes_on, f"{self._text[-2000:]}\n{self.err[-2000:]}"

    def events(self, name: str) -> list[dict[str, Any]]:
        whole = self._text[: self._text.rfind("\n") + 1]
        return [e for e in (json.loads(x) for x in whole.splitlines() if x.startswith("{")) if e["event"] == name]

    def items(self, count: int) -> Callable[[Stopped], bool]:
        return lambda run: len(run.events("item")) >= count

    def _read(self) -> bool:
        """What there is within some milliseconds; whether there may be more."""
        if not select.select([self.reader.fileno()], [], [], 0.005)[0]:
            return True
        data = os.read(self.reader.fileno(), 1 << 16)
        self._text += data.decode()
        return bool(data)

    def close_output(self) -> None:
        self.reader.close()

    def status(self) -> int:
        """Reads to the end, and lets it go there; minus the signal that ended it."""
        while not self.reader.closed and self._read():
            self.go_on()
            assert time.monotonic() < self._deadline, self.err[-2000:]
        self.process.join(max(0.1, self._deadline - time.monotonic()))
        assert self.process.exitcode is not None, f"does not end\n{self.err[-2000:]}"
        return self.process.exitcode

    def processes(self) -> dict[int, str]:
        """Command lines of all processes below it, by their numbers."""
        parents: dict[int, int] = {}
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError, ValueError, IndexError):
                    parents[int(entry)] = int(Path(f"/proc/{entry}/stat").read_text().rpartition(")")[2].split()[1])
        found: dict[int, str] = {}
        todo = [self.pid]
        while todo:
            parent = todo.pop()
            children = [pid for pid, above in parents.items() if above == parent]
            todo += children
            for pid in children:
                with contextlib.suppress(OSError):
                    found[pid] = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        return found

    def descendants(self) -> list[str]:
        return list(self.processes().values())

    def has(self, word: str) -> bool:
        return any(word in line for line in self.descendants())
