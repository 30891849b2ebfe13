"""Submissions to a real Ray cluster of two nodes on this machine, through the Jobs API, with tokens on."""

from __future__ import annotations

import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tiny_models import write_model

from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.verify import verify_directory

pytestmark = pytest.mark.slow

START_SECONDS = 60
SHORT = ["-b", "5", "-l", "128", "-ml", "128", "--device", "cpu", "--gpus", "2"]


@dataclass(frozen=True)
class TwoNodes:
    url: str
    env: dict[str, str]

    def command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "exl2ray.cli", "submit", "--address", self.url, *words]

    def submit(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*words), env={**self.env, **env}, capture_output=True, text=True, timeout=240, check=False
        )

    def state(self, job_id: str) -> dict[str, Any]:
        return json.loads(self.submit("--json", "--status", job_id).stdout)


@pytest.fixture(scope="module")
def cluster() -> Iterator[TwoNodes]:
    env = {
        **{k: v for k, v in os.environ.items() if not k.startswith("RAY_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # jobs say "python"
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }
    directory = tempfile.mkdtemp(prefix="x2r", dir="/tmp")
    program = Path(__file__).with_name("two_nodes.py")
    running = subprocess.Popen(
        [sys.executable, str(program), directory],
        env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert running.stdin is not None
    assert running.stdout is not None
    try:
        ready, _, _ = select.select([running.stdout], [], [], START_SECONDS)
        line = running.stdout.readline() if ready else ""
        if not line:
            pytest.skip(f"a Ray cluster with a job server did not start within {START_SECONDS} s here")
        yield TwoNodes(json.loads(line)["dashboard"], env)
    finally:
        running.stdin.close()
        try:
            running.wait(30)
        except subprocess.TimeoutExpired:
            running.kill()
            running.wait()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("source") / "model"))


def test_a_conversion(cluster: TwoNodes, model: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = cluster.submit("--", "convert", "-i", model, "-o", str(tmp_path / "work"), "-cf", str(out), *SHORT)
    assert done.returncode == 0, done.stderr + done.stdout
    assert "cluster: 2 nodes, 0 GPUs" in done.stderr
    assert "warning" not in done.stderr
    for part in ("[measure] 5/5", "[quantize 5.0] 5/5", "2 workers"):
        assert part in done.stdout
    assert verify_directory(out) == []
    assert len(Exl2Model(out).keys()) == 2 * 7 + 1
    job = re.search(r"submitted as (exl2ray-[0-9a-f]{12})", done.stderr)
    assert job is not None
    state = cluster.state(job[1])
    assert (state["status"], state["exit_code"]) == ("SUCCEEDED", 0)
    assert f"-i {model}" in state["command"]
    again = cluster.submit("--logs", job[1], "--no-wait")
    assert again.stdout == done.stdout


def test_paths_that_the_cluster_does_not_have(cluster: TwoNodes, tmp_path: Path) -> None:
    done = cluster.submit("--", "convert", "-i", str(tmp_path / "none"), "-o", "/proc/work", *SHORT)
    assert done.returncode == 9
    assert f"-i {tmp_path}/none: does not exist on the head node" in done.stderr
    assert "-o /proc/work: not writable on the head node" in done.stderr
    assert "submitted" not in done.stderr


def test_without_the_token(cluster: TwoNodes) -> None:
    done = cluster.submit("--status", "exl2ray-0", RAY_AUTH_MODE="disabled")
    assert done.returncode == 9
    assert "RAY_AUTH_MODE=token" in done.stderr


def test_detach_and_stop(cluster: TwoNodes, model: str, tmp_path: Path) -> None:
    """Ctrl-C ends the submitting program only; --stop ends the job, which leaves the work directory ready to resume."""
    work = str(tmp_path / "work")
    many = [word for tenths in range(30, 81, 2) for word in ("-b", str(tenths / 10))]  # it must not end before --stop
    outputs = ["-cf", str(tmp_path / "{bpw}")]
    words = ["--no-check", "--", "convert", "-i", model, "-o", work, *outputs, *many, "-l", "128", "-ml", "128"]
    running = subprocess.Popen(
        cluster.command(*words), env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert running.stdout is not None
    while "[measure]" not in running.stdout.readline():
        assert running.poll() is None
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=30)
    assert running.returncode == 130
    job = re.search(r"detached from (exl2ray-[0-9a-f]{12}), which goes on running", told)
    assert job is not None, told
    assert f"--logs {job[1]}" in told
    stopped = cluster.submit("--stop", job[1])
    assert stopped.returncode == 0, stopped.stderr
    state = cluster.state(job[1])
    assert state["status"] == "STOPPED", cluster.submit("--logs", job[1], "--no-wait").stdout
    assert time.time() - state["ended"] < 60
    assert not (Path(work) / "driver.lock").exists() or _released(Path(work))


def _released(work: Path) -> bool:
    """Whether the next driver may start at once."""
    from exl2ray.store.status import read_status

    return read_status(str(work)).state != "running"
