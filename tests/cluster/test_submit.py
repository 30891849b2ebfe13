"""Submitting without a cluster: what is refused before anything is sent, errors of the job server, following, stopping."""

from __future__ import annotations

import http.server
import importlib.resources
import json
import os
import shlex
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from cluster_helpers import ADDRESS, FakeClient, cluster
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import Server, running

from exl2ray.cli import cli
from exl2ray.errors import ClusterError, Interrupted, UsageError
from exl2ray.submit import jobs
from exl2ray.submit import submission as submit
from exl2ray.submit.jobs import Cluster

JOB = "exl2ray-0123456789ab"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)


def program(*words: str) -> int:
    """Exit code of ``exl2ray submit`` with these words."""
    with pytest.raises(SystemExit) as e:
        cli.main(["submit", *words])
    return int(e.value.code or 0)


# ---- what is refused here -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["-i", "model", "-o", "/s/w"], "-i model: a relative path is another place on the cluster"),
        (["-i", "/s/m", "-o", "work"], "-o work: a relative path"),
        (["-i", "/s/m", "-o", "/s/w", "-cf", "out"], "-cf out: a relative path"),
        (["-i", "/s/m", "-o", "/s/w", "-c", "data.parquet"], "-c data.parquet: a relative path"),
        (["-i", "/s/m", "-o", "/s/w", "-m", "m.json"], "-m m.json: a relative path"),
        (["-i", "/s/m", "-o", "file://w"], "-o file://w: a relative path"),
        (["-i", "/s/m", "-o", "/s/w", "-m", "s3://bucket/m.json"], "-m s3://bucket/m.json: "),
        (["-i", "/s/m", "-o", "s3://bucket/w", "-cf", "gs://bucket/out"], "-cf gs://bucket/out: an address"),
        (["-i", "/s/m", "-o", "/s/w", "--ray-address", "h:6379"], "--ray-address has no place"),
        (["-i", "/s/m", "-o", "/s/w", "-b", "99"], "-b 99: bits per weight lie between"),
        (["-i", "/s/m", "-o", "/s/w", "--nonsense"], "No such option"),
        (["-i", "/s/m"], "Missing option '-o'"),
    ],
)
def test_refused_before_anything_is_sent(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--address", "http://127.0.0.1:1", "--", "convert", *words) == UsageError.exit_code
    assert part in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "submit does one thing at a time"),
        (["--status", "a", "--stop", "b"], "submit does one thing at a time"),
        (["--status", "a", "--", "convert", "-o", "/w"], "submit does one thing at a time"),
        (["--", "solve", "-i", "/m", "-m", "/m.json"], "solve cannot be submitted"),
        (["--", "nonsense"], "nonsense cannot be submitted"),
        (["--working-dir", "/nowhere", "--", "convert", "-i", "/s/m", "-o", "/s/w"], "/nowhere: is not a checkout"),
    ],
)
def test_wrong_use(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--address", "http://127.0.0.1:1", *words) == UsageError.exit_code
    assert part in capsys.readouterr().err


def test_address_is_needed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    assert program("--", "convert", "-i", "/s/m", "-o", "/s/w") == UsageError.exit_code
    assert "--address is missing" in capsys.readouterr().err


def test_paths_of_a_command() -> None:
    paths = submit.shared_paths(
        {"in_dir": "/s/m", "out_dir": "s3://b/w", "compile_full": "/s/out/{bpw}", "cal_dataset": "/s/c.parquet", "seed": 0}
    )
    assert [(p.flag, p.path, p.role, p.workers) for p in paths] == [
        ("-i", "/s/m", "model", True),
        ("-o", "s3://b/w", "output", True),
        ("-cf", "/s/out/bpw", "output", False),
        ("-c", "/s/c.parquet", "data", False),
    ]


@settings(max_examples=50)
@given(st.lists(st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\0"), max_size=12), max_size=5))
def test_arguments_survive_the_job_s_shell(arguments: list[str]) -> None:
    words = shlex.split(submit.entrypoint(["convert", *arguments]))
    assert words == ["python", "-m", "exl2ray.cli", "convert", *arguments]


def test_a_shipped_checkout(tmp_path: Path) -> None:
    """What Ray packs of a checkout: the package, with a folder of its own that is called like one that stays behind."""
    from ray._private.runtime_env.packaging import create_package

    root = tmp_path / "checkout"
    for name in ("exl2ray/__init__.py", "exl2ray/tests/data", "pyproject.toml", "tests/test_x.py", "docs/x.md", ".git/HEAD"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("content")
    env = submit.runtime_env(str(root))
    create_package(env["working_dir"], tmp_path / "packed.zip", include_gitignore=True, excludes=env["excludes"])
    with zipfile.ZipFile(tmp_path / "packed.zip") as packed:
        files = {n for n in packed.namelist() if not n.endswith("/")}
    assert files == {"exl2ray/__init__.py", "exl2ray/tests/data", "pyproject.toml"}
    assert "working_dir" not in submit.runtime_env(None)
    assert int(env["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > 3  # Ray's default, too short for a commit


# ---- job servers that cannot be used --------------------------------------------------------------------------------


@contextmanager
def server(code: int, body: str) -> Iterator[str]:
    """URL of an HTTP server that always answers the same."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with running(Server(Handler)) as url:
        yield url


@pytest.mark.parametrize(
    ("code", "body", "hint"),
    [
        (401, "Unauthorized: Missing authentication token", "RAY_AUTH_MODE=token"),
        (403, "Forbidden: Invalid authentication token", "RAY_AUTH_MODE=token"),
        (200, json.dumps({"ray_version": "1.8.0", "version": "1", "ray_commit": ""}), "Ray 2.54 or newer"),
        (200, "<html>some other program</html>", "not the dashboard of a Ray cluster"),
        (200, "{}", "not the dashboard of a Ray cluster"),
        (404, "not here", "not the dashboard of a Ray cluster"),
    ],
)
def test_answers_that_are_no_job_server(code: int, body: str, hint: str) -> None:
    with server(code, body) as url, pytest.raises(ClusterError) as e:
        Cluster(url)
    assert url in e.value.message
    assert hint in e.value.hint
    assert "\n" not in e.value.message


def test_nobody_there() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
        with pytest.raises(ClusterError, match="cannot be reached") as e:
            Cluster(f"127.0.0.1:{port}")
    assert "dashboard" in e.value.hint


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "CONNECT_SECONDS", 0.2)
    with socket.socket() as s:  # accepts connections, says nothing
        s.bind(("127.0.0.1", 0))
        s.listen()
        with pytest.raises(ClusterError, match="cannot be reached"):
            Cluster(f"http://127.0.0.1:{s.getsockname()[1]}")


def test_job_client_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray.dashboard.modules.job.sdk as sdk

    monkeypatch.setattr(sdk, "requests", None)
    with server(200, json.dumps({"ray_version": "2.60.0"})) as url, pytest.raises(ClusterError) as e:
        Cluster(url)
    assert "exl2ray[cluster]" in e.value.hint


def test_address_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's client would rather listen to $RAY_ADDRESS."""
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    with server(200, json.dumps({"ray_version": "2.60.0"})) as url:
        assert Cluster(f"{url}/").address == url
    assert os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


@pytest.mark.parametrize("address", ["ray://head:10001", "ftp://head", "http://"])
def test_other_kinds_of_address(address: str) -> None:
    with pytest.raises(ClusterError, match="dashboard of the head node"):
        Cluster(address)


# ---- following and stopping -----------------------------------------------------------------------------------------

LOG = "".join(f"[measure] {i}/40  model.layers.{i}  \N{GREEK SMALL LETTER MU}\n" for i in range(40))


def test_follow_to_the_end() -> None:
    seen: list[str] = []
    state = submit.follow_job(cluster(FakeClient(LOG)), JOB, seen.append)
    assert "".join(seen) == LOG
    assert (state.status, submit.exit_code(state)) == ("SUCCEEDED", 0)


@pytest.mark.usefixtures("no_pauses")
@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, len(LOG)), max_size=4), st.integers(1, 50))
def test_broken_connections_neither_lose_nor_repeat_output(breaks: list[int], chunk: int) -> None:
    client = FakeClient(LOG)
    client.chunk = chunk
    client.breaks = [(at, RuntimeError("WebSocket connection closed")) for at in breaks]
    seen: list[str] = []
    cluster(client).follow(JOB, seen.append)
    assert "".join(seen) == LOG
    assert client.connections == len(breaks) + 1


def test_give_up_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(jobs.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(jobs.time, "sleep", lambda s: clock.__setitem__(0, clock[0] + 10 * s))
    client = FakeClient(LOG)
    client.breaks = [(10, ConnectionResetError("gone"))] * 1000
    with pytest.raises(ClusterError, match="lost the connection") as e:
        cluster(client).follow(JOB, lambda text: None)
    assert f"exl2ray submit --address {ADDRESS} --logs {JOB}" in e.value.hint
    assert 10 < client.connections < 100


def test_a_closed_pipe_is_not_a_broken_connection() -> None:
    def write(text: str) -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        cluster(FakeClient(LOG)).follow(JOB, write)


def test_interrupting_leaves_the_job_alone() -> None:
    client = FakeClient(LOG, status="RUNNING")

    def write(text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as e:
        submit.follow_job(cluster(client), JOB, write)
    assert JOB in e.value.message
    assert f"--logs {JOB}" in e.value.hint
    assert f"--stop {JOB}" in e.value.hint
    assert client.stopped == []


def test_unknown_job() -> None:
    with pytest.raises(ClusterError, match="does not exist") as e:
        submit.follow_job(cluster(FakeClient()), "other", print)
    assert "ray job list" in e.value.hint


@pytest.mark.parametrize(
    ("status", "code", "expected"), [("SUCCEEDED", 0, 0), ("FAILED", 7, 7), ("FAILED", None, 9), ("STOPPED", None, 130)]
)
def test_exit_code_is_the_job_s(status: str, code: int | None, expected: int) -> None:
    assert submit.exit_code(cluster(FakeClient(status=status, exit_code=code)).state(JOB)) == expected


@pytest.mark.usefixtures("no_pauses")
def test_a_cluster_that_has_only_just_started() -> None:
    client = FakeClient()
    client.refusals = ["No available agent to submit job, please try again later."] * 3
    job_id = submit.submit_job(cluster(client), ["convert", "-o", "/s/w"], {})
    assert [job["submission_id"] for job in client.submitted] == [job_id]
    client.refusals = ["something else", "something else"]
    with pytest.raises(ClusterError, match="something else"):
        submit.submit_job(cluster(client), ["convert", "-o", "/s/w"], {})
    assert client.refusals == ["something else"]


def test_stop() -> None:
    client = FakeClient(status="RUNNING", exit_code=None)
    assert submit.stop_job(cluster(client), JOB).status == "STOPPED"
    assert client.stopped == [JOB]


# ---- what is shown --------------------------------------------------------------------------------------------------


@pytest.fixture
def one_cluster(monkeypatch: pytest.MonkeyPatch) -> FakeClient:
    """The cluster behind every address."""
    client = FakeClient('INFO Runtime env is setting up.\n{"event": "start", "bits": [4.0]}\n{"event": broken\nplain text\n')
    monkeypatch.setattr("exl2ray.commands.submit.Cluster", lambda address: Cluster(address, client))
    return client


def test_submit_shows_where_the_job_is(one_cluster: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--address", ADDRESS, "--no-check", "--", "convert", "-i", "/s/m", "-o", "/s/w") == 0
    shown = capsys.readouterr()
    assert shown.out == one_cluster.text
    (job,) = one_cluster.submitted
    for flag in ("--status", "--logs", "--stop"):
        assert f"exl2ray submit --address {ADDRESS} {flag} {job['submission_id']}" in shown.err
    assert f"{job['submission_id']} succeeded" in shown.err
    assert job["entrypoint"] == "python -m exl2ray.cli convert -i /s/m -o /s/w"


def test_json_is_nothing_but_events(one_cluster: FakeClient, capfd: pytest.CaptureFixture[str]) -> None:
    one_cluster.exit_code, one_cluster.status = 3, "FAILED"
    words = ["--json", "--address", ADDRESS, "--no-check", "--", "convert", "-i", "/s/m", "-o", "/s/w"]
    assert program(*words) == 3
    events = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["submitted", "start", "job"]
    assert events[-1]["exit_code"] == 3
    schema = json.loads(importlib.resources.files("exl2ray").joinpath("events.schema.json").read_text())
    for event in (events[0], events[-1]):  # the one between is the job's
        jsonschema.validate(event, schema)
    assert one_cluster.submitted[0]["entrypoint"].endswith(" --json")  # the job speaks JSON, too


def test_status_and_output_of_a_job(one_cluster: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    assert program("--address", ADDRESS, "--status", JOB) == 0
    shown = capsys.readouterr().out
    for part in (JOB, "SUCCEEDED", "exl2ray convert -o /w", "2.5 s"):
        assert part in shown
    assert program("--address", ADDRESS, "--logs", JOB, "--no-wait") == 0
    assert capsys.readouterr().out == one_cluster.text
    assert one_cluster.connections == 0
    assert program("--address", ADDRESS, "--logs", JOB) == 0
    assert capsys.readouterr().out == one_cluster.text


def test_progress_of_a_running_job(one_cluster: FakeClient, capsys: pytest.CaptureFixture[str]) -> None:
    one_cluster.status, one_cluster.text = "RUNNING", "[measure] 2/9  model.layers.1.mlp  4.1 s  ETA 29 s\nnote: something\n"
    assert program("--address", ADDRESS, "--status", JOB) == 0
    assert "progress   [measure] 2/9  model.layers.1.mlp  4.1 s  ETA 29 s" in capsys.readouterr().out
    assert program("--json", "--address", ADDRESS, "--status", JOB) == 0
    event = json.loads(capsys.readouterr().out)
    assert event["progress"].endswith("ETA 29 s")
    jsonschema.validate(event, json.loads(importlib.resources.files("exl2ray").joinpath("events.schema.json").read_text()))
