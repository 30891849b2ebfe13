"""The program in a process that ends itself with SIGKILL before the n-th thing that it does to a file of a directory.

Python reports what it is about to do to files (audit events), so every step is met, whatever the speed of the machine.
"""

from __future__ import annotations

import os
import signal
import sys
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

from forks import fork_server

RENAMES = ("os.rename", "os.link")
REMOVALS = ("os.remove", "os.rmdir", "os.mkdir")


@cache
def _context() -> ForkServerContext:
    """Starts processes that have the imports behind them, and no threads."""
    os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on it
    return fork_server("kill_steps")


def start(arguments: list[str], output: Path, target: Path | None = None, n: int = 0) -> ForkServerProcess:
    process = _context().Process(target=_run, args=(["exl2ray", *arguments], str(output), str(target or ""), n))
    process.start()
    return process


def killed_at(n: int, arguments: list[str], output: Path, target: Path) -> bool:
    """Whether it came to the n-th step."""
    process = start(arguments, output, target, n)
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL), output.read_text()
    return process.exitcode != 0


def _run(argv: list[str], output: str, target: str, n: int) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    if target:
        sys.addaudithook(_Steps(target, n))
    from exl2ray.cli import main

    sys.argv = argv
    main()


class _Steps:
    def __init__(self, target: str, left: int) -> None:
        self.inside, self.left = os.path.realpath(target), left

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._is_step(event, arguments):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def _is_step(self, event: str, arguments: tuple[Any, ...]) -> bool:
        if event == "open":
            name, _, flags = arguments
            if not isinstance(name, (str, bytes, os.PathLike)) or not flags & (os.O_WRONLY | os.O_RDWR):
                return False
            path = os.fsdecode(name)  # its dir_fd is not told: temporary names like these are those of the target
            return path.startswith(self.inside) or (path.startswith(".") and path.endswith(".tmp"))
        if event not in (*RENAMES, *REMOVALS):
            return False
        path, handle = os.fsdecode(arguments[0]), arguments[-1]
        if not path.startswith("/") and isinstance(handle, int) and handle >= 0:
            path = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), path)
        return path.startswith(self.inside)
