"""Signals and closed streams in the middle of real conversions: the documented status, a word, the same bytes."""

from __future__ import annotations

import multiprocessing.forkserver
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
from bounded import CLOSED, ROOT, exl2ray
from forks import fork_server
from stopped_runs import Stopped
from workdir_cases import FLAGS, Conversion

STOPPED = 130
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@pytest.fixture(scope="module")
def forked() -> Iterator[ForkServerContext]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as the conversion that results are held against
        patch.delenv("RAY_ADDRESS", raising=False)
        yield fork_server("ray")
        multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


class Job:
    """A conversion that is stopped again and again, and must end with the bytes of the undisturbed one."""

    def __init__(self, forked: ForkServerContext, made: Conversion, root: Path) -> None:
        self._forked, self.made, self.root = forked, made, root
        self.work, self.target = root / "work", root / "target"

    def start(self, *more: str, executor: str = "inline", prepare: Any = None, stop_at: str = "") -> Stopped:
        argv = self.made.arguments(self.work, self.target, "--json", "-b", "4", "--checkpoint-seconds", "0", *more)
        argv[argv.index("inline")] = executor
        return Stopped(self._forked, argv, self.root / "err", prepare, stop_at)

    def was_stopped(self, run: Stopped, begun: bool = True) -> None:
        """begun: whether -o alone goes on with it."""
        assert run.status() == STOPPED, run.err
        assert "Traceback" not in run.err
        hint = f"resume with: exl2ray convert -o {self.work}" if begun else "hint: run the same command again"
        assert run.err.count(hint) == 1, run.err
        assert (self.work / "job.json").exists() == begun
        assert len(run.err.splitlines()) == 2, run.err
        assert not (self.work / "driver.lock").exists()
        assert not run.descendants()

    def ends_the_same(self) -> None:
        run = self.start()
        assert run.status() == 0, run.err
        for kept, now in ((self.made.target, self.target), (self.made.work, self.work)):
            for file in ("output.safetensors", "measurement.json", "config.json"):
                if (kept / file).exists():
                    assert (now / file).read_bytes() == (kept / file).read_bytes(), file


@pytest.fixture
def job(forked: ForkServerContext, made: Conversion, tmp_path: Path) -> Job:
    return Job(forked, made, tmp_path)


@pytest.mark.parametrize("times", [1, 2])
def test_each_signal_in_the_middle(job: Job, times: int) -> None:
    for number in SIGNALS:
        run = job.start(stop_at="item")
        run.until(Stopped.is_stopped)
        for other in (number, SIGNALS[SIGNALS.index(number) - 1])[:times]:  # twice the same might be one
            run.signal(other)
        run.go_on()
        job.was_stopped(run)
    job.ends_the_same()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_signal_before_the_first_module(job: Job, number: int) -> None:
    run = job.start(stop_at="start")
    run.until(Stopped.is_stopped)
    run.signal(number)
    run.go_on()
    job.was_stopped(run, begun=False)
    job.ends_the_same()


def test_a_suspended_conversion_goes_on_and_nobody_takes_its_place(job: Job) -> None:
    """As by Ctrl-Z, by a debugger or a batch system; the time in which it slept is no fault."""
    run = job.start(stop_at="item")
    run.until(Stopped.is_stopped)
    second = exl2ray(*job.made.arguments(job.work, None, "-b", "4"))
    second.ends_with(7, "in use by")
    run.go_on()
    assert run.status() == 0, run.err
    job.ends_the_same()


def test_an_ignored_signal_stays_ignored(job: Job) -> None:
    """As under nohup, and as in the background of a script."""
    run = job.start(prepare=ignore_all, stop_at="item")
    run.until(Stopped.is_stopped)
    run.signal(signal.SIGHUP)
    run.signal(signal.SIGINT)
    run.go_on()
    assert run.status() == 0, run.err
    job.ends_the_same()


def ignore_all() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def first_daemon(run: Stopped) -> bool:
    return run.has("gcs_server")


def last_daemon(run: Stopped) -> bool:
    return run.has("raylet/raylet")


def a_worker(run: Stopped) -> bool:
    return run.has("ray::")


def an_item(run: Stopped) -> bool:
    return bool(run.events("item"))


@pytest.mark.slow
def test_signals_while_ray_starts_and_works(job: Job) -> None:
    moments = (first_daemon, last_daemon, a_worker, an_item)
    for moment, number in zip(moments, (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGTERM), strict=True):
        run = job.start(executor="ray", stop_at="item")  # at the latest; a signal that comes before ends it before
        run.until(moment)
        run.signal(number)
        run.signal(number)
        job.was_stopped(run)
    job.ends_the_same()


# ---- streams --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("errors_too", [False, True])
def test_a_reader_that_goes_away(job: Job, errors_too: bool) -> None:
    run = job.start(prepare=errors_into_output if errors_too else None, stop_at="item")
    run.until(Stopped.is_stopped)
    run.close_output()
    run.go_on()
    if errors_too:
        assert run.status() == STOPPED
        assert not (job.work / "driver.lock").exists()
    else:
        job.was_stopped(run)
        assert "standard output was closed" in (job.root / "err").read_text()
    job.ends_the_same()


def errors_into_output() -> None:
    os.dup2(1, 2)


@pytest.mark.parametrize("streams", [(1,), (0, 1, 2)], ids=["stdout", "all"])
def test_streams_that_are_closed_from_the_start(job: Job, streams: tuple[int, ...]) -> None:
    """No file that is opened later gets their numbers, and lines into it."""
    closing = " ".join(f"{n}>&-" for n in streams)
    argv = job.made.arguments(job.work, job.target, "-b", "4")
    code = "import sys; from exl2ray.cli import main; sys.argv[0] = 'exl2ray'; main()"
    command = ["sh", "-c", f'exec "$@" {closing}', "sh", sys.executable, "-c", code, *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    assert subprocess.run(command, env=env, capture_output=True).returncode == 0
    job.ends_the_same()


COMMANDS = ["plan", "plan --json", "inspect --json", "--help", "convert --help", "calibration"]


@pytest.mark.parametrize("command", COMMANDS)
def test_short_commands_whose_reader_is_gone(made: Conversion, command: str) -> None:
    name, *flags = command.split()
    arguments = {
        "plan": ["-i", str(made.model), "-b", "4", "-c", str(made.text), *FLAGS],
        "inspect": [str(made.target)],
        "calibration": ["-i", str(made.model), "-c", str(made.text), *FLAGS[:8]],
    }
    run = exl2ray(name, *arguments.get(name, []), *flags, output=CLOSED)
    run.ends_with(STOPPED, "standard output was closed")


def test_standard_output_on_a_full_disk(made: Conversion, tmp_path: Path) -> None:
    run = exl2ray(*made.arguments(tmp_path / "work", None), output="/dev/full")
    run.ends_with(7, "cannot write to standard output: No space left on device")
    assert not (tmp_path / "work" / "driver.lock").exists()


ENDS = {
    "threads are left": "threading.Thread(target=time.sleep, args=(60,)).start(); streams.leave_threads(130)",
    "a signal that nobody handles": "stopping.ends_the_program(); os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)",
    "the interpreter ends": "sys.exit(130)",
}


@pytest.mark.parametrize("end", ENDS)
def test_what_is_asked_for_at_the_end_is_done(end: str, tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, threading, time\nfrom exl2ray import stopping\nfrom exl2ray.terminal import streams\n"
        "stopping.at_the_end(lambda: 1 / 0)\n"
        f"stopping.at_the_end(lambda: open({str(tmp_path / 'done')!r}, 'w').close())\n"
    )
    run = subprocess.run([sys.executable, "-c", program + ENDS[end]], cwd=ROOT, capture_output=True, timeout=50)
    assert run.returncode == STOPPED, run.stderr
    assert (tmp_path / "done").exists()
