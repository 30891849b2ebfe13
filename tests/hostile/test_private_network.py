"""A private Ray talks to nobody who has no token, listens where docs/security.md says, and shows its files to nobody else."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import secrets
import stat
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bounded import ROOT

from exl2ray.driver.private import FIRST_RAY, TEMP_PREFIX, prepare, refuse_old, turns_away
from exl2ray.errors import ClusterError

PROGRAM = """
import json, os, ray, sys
from exl2ray.driver.starting import start_ray, stop_ray

class Worker:
    def environment(self):
        return dict(os.environ)

    def imports(self):
        import exl2ray.team.worker, numpy, safetensors, yaml
        return sys.path

sys.path.remove("")
os.chdir(sys.argv[1])
start_ray(None)
session = ray._private.worker._global_node.get_session_dir_path()
worker = ray.remote(Worker).remote()
environment = ray.get(worker.environment.remote())
print(json.dumps({"gcs": ray.get_runtime_context().gcs_address, "token": os.environ["RAY_AUTH_TOKEN"],
                  "environment": environment, "session": session, "here": os.getcwd(),
                  "imports": ray.get(worker.imports.remote())}), flush=True)
sys.stdin.read()
stop_ray()
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}))
"""
STRANGER = """
import os, sys
import ray
try:
    ray.init(address=sys.argv[1], log_to_driver=False)
    print("CONNECTED", ray.get(ray.remote(lambda: os.environ.get("RAY_AUTH_TOKEN")).remote()))
except Exception as e:
    print("refused:", type(e).__name__)
"""
METHODS = {  # a service of each kind of gRPC server, any method of which will do
    "gcs_server": b"/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "raylet": b"/ray.rpc.NodeManagerService/GetNodeStats",
    "object manager": b"/ray.rpc.ObjectManagerService/Push",
    "agent": b"/ray.rpc.ReporterService/GetTraceback",
    "worker": b"/ray.rpc.CoreWorkerService/PushTask",
}
POSTS = ["/api/jobs/", "/api/job_agent/jobs/", "/get_or_create_runtime_env", "/delete_runtime_env_if_possible", "/log_event"]


USER_SETTINGS = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN_PATH": "/of/a/cluster"}  # which a private Ray must not follow


MODULES = ("exl2ray", "numpy", "torch", "safetensors", "yaml", "psutil", "secrets", "colorama", "sitecustomize")


def downloaded(folder: Path) -> Path:
    """The folder of a model that brings modules with it; whoever imports one leaves a file behind."""
    folder.mkdir()
    for name in MODULES:
        (folder / f"{name}.py").write_text(f"open({str(folder.parent / 'imported')!r}, 'a').write({name!r})\n")
    return folder


class Private:
    """A private Ray of a process that had been told to ask nobody for a token."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        self.home, self.here = home, downloaded(home.with_name("model"))
        env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.env = {**env, "PYTHONPATH": str(ROOT), "HOME": str(home), **USER_SETTINGS}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.here)], env=self.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.facts: dict[str, Any] = json.loads(self.process.stdout.readline())

    def processes(self) -> list[int]:
        found, todo = [self.process.pid], [self.process.pid]
        while todo:
            parent = todo.pop()
            for task in Path(f"/proc/{parent}/task").glob("*/children"):
                with contextlib.suppress(OSError):  # a thread that has ended
                    children = [int(x) for x in task.read_text().split()]
                    todo += children
                    found += children
        return found

    def listening(self) -> list[tuple[str, int]]:
        """(address in hexadecimal as in /proc, port) of all sockets on which one of the processes listens."""
        inodes = set()
        for pid in self.processes():
            for fd in Path(f"/proc/{pid}/fd").glob("*"):
                try:
                    inodes |= set(re.findall(r"socket:\[(\d+)\]", os.readlink(fd)))
                except OSError:
                    continue
        out = set()
        for table in ("tcp", "tcp6"):
            for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == "0A" and fields[9] in inodes:
                    address, _, port = fields[1].partition(":")
                    out.add((address, int(port, 16)))
        return sorted(out)


@pytest.fixture(scope="module")
def private(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Private]:
    made = Private(tmp_path_factory.mktemp("network") / "home")
    yield made
    if made.process.poll() is None:
        made.process.communicate("")


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}  # 127.0.0.1, mapped, ::1


def refusing(listening: list[tuple[str, int]]) -> dict[str, list[int]]:
    """Ports at which a call of each service is turned away."""
    ports = [port for _, port in listening]
    return {name: [p for p in ports if turns_away(f"127.0.0.1:{p}", method)] for name, method in METHODS.items()}


@pytest.mark.slow
def test_everything_listens_on_loopback_and_is_documented(private: Private) -> None:
    wait_until(lambda: all(refusing(private.listening()).values()))  # the agent may be late
    listening = private.listening()
    refused = refusing(listening)
    assert {address for address, _ in listening} <= LOOPBACK
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([a-z_, -]+) \| (gRPC|HTTP) \|", page, re.M)
    assert [kind for _, kind in rows].count("gRPC") == len(METHODS)
    assert all(refused.values()), refused
    others = [p for _, p in listening if not any(p in some for some in refused.values())]
    assert len(others) <= [kind for _, kind in rows].count("HTTP"), others
    for port in others:
        assert accepts_posts(port) == []


@pytest.mark.slow
def test_workers_import_nothing_from_the_current_directory(private: Private) -> None:
    """People go to the folder of a model and say -i . there."""
    assert private.facts["here"] == str(private.here)
    assert str(private.here) not in private.facts["imports"]
    assert not private.here.with_name("imported").exists()


def accepts_posts(port: int) -> list[str]:
    """Paths at which something else than figures answers a POST without a token."""
    found = []
    for path in POSTS:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", b"{}", {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                if not answer.read().startswith(b"# HELP"):  # metrics are shown whatever is asked
                    found.append(path)
        except urllib.error.HTTPError as e:
            if e.code not in (401, 403, 404, 405, 501):
                found.append(f"{path}: {e.code}")
        except (OSError, http.client.HTTPException):
            pass  # not HTTP
    return found


@pytest.mark.slow
def test_strangers_are_turned_away(private: Private, tmp_path: Path) -> None:
    token = private.facts["token"]
    tries = {
        "no token": {},
        "authentication disabled": {"RAY_AUTH_MODE": "disabled"},
        "another token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)},
        "half of the token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token[:32]},
        "the token": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token},
    }
    env = {k: v for k, v in private.env.items() if not k.startswith("RAY_")}
    # Without the last one Ray would look for the cluster at the address of another interface, and prove nothing.
    env |= {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    command = [sys.executable, "-c", STRANGER, private.facts["gcs"]]
    running = {
        name: subprocess.Popen(command, env={**env, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for name, settings in tries.items()
    }
    said = {name: process.communicate() for name, process in running.items()}
    assert said.pop("the token")[0].split() == ["CONNECTED", token], "otherwise the others prove nothing"
    for name, (out, err) in said.items():
        assert out.startswith("refused:"), f"{name}: {out}{err}"


@pytest.mark.slow
def test_the_token_is_where_ray_needs_it_only(private: Private) -> None:
    token = private.facts["token"]
    assert len(token) == 64
    assert [k for k, v in private.facts["environment"].items() if token in v] == ["RAY_AUTH_TOKEN"]
    for pid in private.processes():
        with contextlib.suppress(OSError):  # one that has ended
            assert token.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
    for folder, _, files in os.walk(Path(private.facts["session"]).parents[1]):
        for file in (Path(folder, name) for name in files):
            with contextlib.suppress(FileNotFoundError):  # Ray is at work there
                if file.is_file() and not file.is_symlink():
                    assert token.encode() not in file.read_bytes(), file
    assert list(private.home.iterdir()) == []


@pytest.mark.slow
def test_nobody_else_can_enter_its_folder(private: Private) -> None:
    folder = Path(private.facts["session"]).parents[1]
    assert folder.name.startswith(TEMP_PREFIX)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.slow
def test_it_leaves_nothing(private: Private) -> None:
    """The last test of this Ray: it ends here."""
    processes = private.processes()
    out, _ = private.process.communicate("")
    assert json.loads(out) == USER_SETTINGS
    assert private.process.returncode == 0
    assert not Path(private.facts["session"]).parents[1].exists()
    wait_until(lambda: not any(map(is_alive, processes)))


def wait_until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 300
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


# ---- without a Ray --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.50.0", "2.51.2", "2.53.0", "1.13.0"])
def test_a_ray_that_knows_no_tokens_is_refused(version: str) -> None:
    ray = types.ModuleType("ray")
    ray.__dict__["__version__"] = version
    with pytest.raises(ClusterError, match="lets others run code") as caught:
        refuse_old(ray)
    assert "ray>=2.54" in caught.value.hint


def test_the_lower_bound_is_the_first_that_does() -> None:
    bounds = re.findall(r'"ray(?:\[default\])?>=([0-9.]+),', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert bounds == [".".join(map(str, FIRST_RAY))] * 2


def test_folders_of_killed_processes_are_removed_and_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path.parent / secrets.token_hex(2)  # short: sockets have paths of 107 bytes
    place.mkdir()
    monkeypatch.setattr("exl2ray.driver.private._SOCKET_BYTES", 1000)
    monkeypatch.setenv("RAY_TMPDIR", str(place))
    alive = prepare()
    dead, open_to_all, link = (place / f"{TEMP_PREFIX}{n}" for n in ("dead", "open", "link"))
    for folder in (dead, open_to_all):
        (folder / "r").mkdir(parents=True)
        (folder / "in-use").touch()
    dead.chmod(0o700)
    open_to_all.chmod(0o755)
    link.symlink_to(tmp_path)
    (tmp_path / "in-use").touch()
    other = prepare()
    assert not dead.exists()
    assert alive.folder.exists()
    assert open_to_all.exists()
    assert (tmp_path / "in-use").exists()
    for ray in (other, alive):
        ray.close()
        assert not ray.folder.exists()


def test_a_place_that_is_too_deep_for_sockets_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + "x" * 60)
    with pytest.raises(ClusterError, match="too long a path for Ray's sockets"):
        prepare()
