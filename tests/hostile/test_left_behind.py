"""What a conversion leaves to others: permissions under any umask, processes after kill -9 of the driver."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from bounded import ROOT
from forks import fork_server
from stopped_runs import Stopped
from workdir_cases import Conversion, contents

AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")  # wait a minute for a raylet that is gone, or the next start
GONE_SECONDS = 300.0  # on a machine that is busy with other things


# ---- permissions --------------------------------------------------------------------------------------------------------


def modes(*roots: Path) -> dict[str, int]:
    found = {}
    for root in roots:
        for folder, _, files in os.walk(root):
            for path in (Path(folder), *(Path(folder, name) for name in files)):
                found[str(path)] = stat.S_IMODE(path.lstat().st_mode)
    return found


def test_nobody_else_can_write_to_what_is_made(made: Conversion, tmp_path: Path) -> None:
    new = tmp_path / "new"  # with folders above that are made, too
    work, target, report = new / "a" / "work", new / "b" / "target", new / "report.html"
    caches = {"TMPDIR": str(tmp_path), "XDG_CACHE_HOME": str(new / "cache")}
    runs = [made.arguments(work, None, "-om", str(new / "c" / "m.json")), made.arguments(work, target, "-b", "4"),
            ["report", str(work), "--output", str(report)]]  # fmt: skip
    for i, arguments in enumerate(runs):
        run = Stopped(fork_server("ray"), arguments, tmp_path / f"err{i}", partial(surrounded, 0, caches))
        assert run.status() == 0, run.err
    found = modes(new)
    assert {*map(str, (work / "job.json", target / "config.json", report, new / "c" / "m.json"))} <= {*found}
    assert not {path: oct(mode) for path, mode in found.items() if mode & stat.S_IWOTH}
    assert contents(target) == contents(made.target)


def test_a_strict_umask_is_kept(made: Conversion, tmp_path: Path) -> None:
    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "b" / "target"
    arguments = made.arguments(work, target, "-b", "4")
    run = Stopped(fork_server("ray"), arguments, tmp_path / "err", partial(surrounded, 0o077, {}))
    assert run.status() == 0, run.err
    assert not {path: oct(mode) for path, mode in modes(target.parent).items() if mode & 0o077}
    assert contents(target) == contents(made.target)


def surrounded(umask: int, env: dict[str, str]) -> None:
    os.umask(umask)
    os.environ.update(env)


def test_caches_of_models_read_from_elsewhere(tmp_path: Path) -> None:
    from exl2ray.remote.block_cache import Blocks

    before = os.umask(0)
    try:
        root = tmp_path / "cache" / "exl2ray"
        blocks = Blocks(root, 1 << 20)
        blocks.read(memoryview(bytearray(1 << 15)), 0, 1 << 15, "key", lambda into, at: None)
    finally:
        os.umask(before)
    assert len(found := modes(tmp_path / "cache")) > 2
    assert not [path for path, mode in found.items() if mode & stat.S_IWOTH]


# ---- processes ----------------------------------------------------------------------------------------------------------


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until(true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + GONE_SECONDS
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


ENDLESS = {  # requests that keep a child busy until its limit on time, which is long here
    "template": ([{"op": "compile", "special_tokens": {}}, b"{% for i in range(99999) %}{% for j in range(99999) %}"
                  b"{% endfor %}{% endfor %}"], [{"op": "render", "messages": [["user", "x"]], "reply": False,
                                                   "characters": 100}, b""]),
    "idle": (),
}  # fmt: skip
PARENT = """
import json, os, sys
from exl2ray.calibration.limited import LimitedProcess
child = LimitedProcess("template")
print(child.pid, flush=True)
for request, blob in json.loads(sys.argv[1]):
    child.ask(request, [blob.encode()], cpu_seconds=1000, memory_bytes=1 << 28)
    print("done", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("doing", ENDLESS)
def test_a_child_that_runs_a_template_ends_with_its_parent(doing: str) -> None:
    requests = json.dumps([[request, blob.decode()] for request, blob in ENDLESS[doing]])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, requests], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if doing != "idle":
        assert parent.stdout.readline() == "done\n"  # compiled; it renders now, or is about to
        wait_until(lambda: processor_ticks(child) > 50, "does not render")
    assert alive(child)
    parent.kill()
    parent.communicate()
    wait_until(lambda: not alive(child), "the child goes on")


def processor_ticks(pid: int) -> int:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder whose name leaves room for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="x", dir="/tmp") as folder:
        yield Path(folder)


@pytest.mark.slow
def test_ray_ends_with_a_driver_that_is_killed(made: Conversion, short: Path, tmp_path: Path) -> None:
    work, target = tmp_path / "work", tmp_path / "target"
    arguments = [*made.arguments(work, target), "--json", "-b", "4"]
    arguments[arguments.index("inline")] = "ray"
    prepare = partial(surrounded, 0o022, {"RAY_TMPDIR": str(short)})
    run = Stopped(fork_server("ray"), arguments, tmp_path / "err", prepare, stop_at="item")
    run.until(Stopped.is_stopped)
    left = run.processes()
    assert any("raylet" in line for line in left.values())
    run.signal(signal.SIGKILL)
    run.process.join()
    others = [pid for pid, line in left.items() if not any(agent in line for agent in AGENTS)]
    wait_until(lambda: not any(map(alive, others)), "workers or daemons of Ray go on")
    again = Stopped(fork_server("ray"), arguments, tmp_path / "err2", prepare)
    assert again.status() == 0, again.err
    wait_until(lambda: not any(map(alive, left)), "what waited for its raylet does not end with the next start")
    assert contents(target) == contents(made.target)
    assert not list(short.glob("exl2ray-ray-*"))
