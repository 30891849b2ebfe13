"""cluster/slurm.sh, run against stand-ins for SLURM's and Ray's programs that write down how they were called."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster" / "slurm.sh"
COMMAND = ["convert", "-i", "/shared/models/a model", "-o", "/shared/jobs", "-cf", "/shared/out/M-{bpw}", "-b", "4.0"]

SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames gpu[07-08]" ]] || exit 9
printf 'gpu07\\ngpu08\\n'
"""
# Runs hostname on the node that is asked for; everything else as one task per node, one after the other.
SRUN = """#!/usr/bin/env bash
record srun "$@"
while [[ $1 == --* ]]; do shift; done
if [[ $1 == hostname ]]; then exec "$@"; fi
code=0
for ((i = 0; i < SLURM_JOB_NUM_NODES; i++)); do
    SLURM_PROCID=$i "$@" || code=$?
done
exit $code
"""
HOSTNAME = """#!/usr/bin/env bash
[[ $* == -I ]] || exit 9
echo "${FAKE_ADDRESSES}"
"""
RAY = """#!/usr/bin/env bash
record ray "$@"
echo "output of task $SLURM_PROCID"
exit "${FAKE_EXIT_CODE:-0}"
"""
RECORD = f"""#!{sys.executable}
import json, os, sys
env = {{n: v for n, v in os.environ.items() if n.startswith("RAY_") or n in ("SLURM_PROCID", "ACTIVATED")}}
entry = dict(program=sys.argv[1], args=sys.argv[2:], env=env)
with open(os.environ["CALLS"], "a") as f:
    f.write(json.dumps(entry) + "\\n")
"""


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """Environment of a job on two nodes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    stand_ins = {"scontrol": SCONTROL, "srun": SRUN, "hostname": HOSTNAME, "ray": RAY, "record": RECORD}
    for name, text in stand_ins.items():
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "FAKE_ADDRESSES": "10.3.0.7 192.168.1.7 fd00::7",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_ID": "4711",
        "SLURM_CPUS_PER_TASK": "64",
    }


def run(env: dict[str, str], directory: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SCRIPT), *command], env=env, cwd=directory, capture_output=True, text=True, timeout=600, check=False
    )


def calls(env: dict[str, str], program: str) -> list[dict[str, Any]]:
    lines = Path(env["CALLS"]).read_text(encoding="utf-8").splitlines()
    return [c for c in map(json.loads, lines) if c["program"] == program]


def test_syntax() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=600)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SCRIPT)], check=True, timeout=600)


def test_starts_ray_on_every_node_and_the_command_behind_it(slurm: dict[str, str], tmp_path: Path) -> None:
    done = run(slurm, tmp_path, *COMMAND)
    assert done.returncode == 0, done.stderr
    ask, step = calls(slurm, "srun")
    assert ask["args"] == ["--nodes=1", "--ntasks=1", "--nodelist=gpu07", "hostname", "-I"]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(step["args"])
    assert {"--no-kill", "--kill-on-bad-exit=0", "--wait=0"} <= set(step["args"])  # a lost node does not end the step
    first, second = calls(slurm, "ray")
    assert first["args"] == second["args"]
    separator = first["args"].index("--")
    assert first["args"][:5] == ["symmetric-run", "--address", "10.3.0.7:6379", "--min-nodes", "2"]
    assert "--num-cpus=64" in first["args"][:separator]
    assert "--temp-dir=/tmp/ray-4711" in first["args"][:separator]
    assert first["args"][separator + 1 :] == ["exl2ray", *COMMAND]  # spaces and braces arrive as they were given


def test_environment_of_the_nodes(slurm: dict[str, str], tmp_path: Path) -> None:
    assert run(slurm, tmp_path, *COMMAND).returncode == 0
    first, second = (c["env"] for c in calls(slurm, "ray"))
    assert first["RAY_ADDRESS"] == "10.3.0.7:6379"
    assert first["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert int(first["RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"]) >= 120
    assert {**first, "SLURM_PROCID": "1"} == second
    Path(slurm["CALLS"]).unlink()
    assert run(slurm, tmp_path, *COMMAND).returncode == 0
    assert calls(slurm, "ray")[0]["env"]["RAY_AUTH_TOKEN"] != first["RAY_AUTH_TOKEN"]


def test_the_head_writes_to_the_job_log_and_others_to_files(slurm: dict[str, str], tmp_path: Path) -> None:
    done = run(slurm, tmp_path, *COMMAND)
    assert "output of task 0" in done.stdout
    assert "output of task 1" not in done.stdout
    assert (tmp_path / "exl2ray-4711-node1.log").read_text() == "output of task 1\n"


def test_options(slurm: dict[str, str], tmp_path: Path) -> None:
    activate = tmp_path / "activate"
    activate.write_text('export ACTIVATED="yes $UNSET_VARIABLE"\n', encoding="utf-8")
    slurm.update(EXL2RAY_HEAD_IP="172.16.0.1", EXL2RAY_PORT="7000", EXL2RAY_ACTIVATE=str(activate))
    done = run(slurm, tmp_path, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert len(calls(slurm, "srun")) == 1  # no need to ask for the address
    ray = calls(slurm, "ray")[0]
    assert ray["args"][2] == "172.16.0.1:7000"
    assert ray["env"]["ACTIVATED"] == "yes "


def test_exit_code_is_the_command_s(slurm: dict[str, str], tmp_path: Path) -> None:
    assert run({**slurm, "FAKE_EXIT_CODE": "7"}, tmp_path, *COMMAND).returncode == 7


def test_complaints(slurm: dict[str, str], tmp_path: Path) -> None:
    without = run(slurm, tmp_path)
    assert without.returncode == 2
    assert "usage: sbatch" in without.stderr
    alone = run({**slurm, "FAKE_ADDRESSES": ""}, tmp_path, *COMMAND)
    assert alone.returncode == 1
    assert "EXL2RAY_HEAD_IP" in alone.stderr
    assert run({**slurm, "SLURM_JOB_NODELIST": "unknown"}, tmp_path, *COMMAND).returncode == 9
    assert not [c for c in calls(slurm, "srun") if "ray" in c["args"]]
