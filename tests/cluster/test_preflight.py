"""What nodes are asked about paths, against directories here and a stand-in for Ray."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster_helpers import FakeClient, FakeRay, cluster

from exl2ray.errors import ClusterError, StoreError
from exl2ray.submit import preflight
from exl2ray.submit import submission as submit
from exl2ray.submit.preflight import NodeView, Problem, Report, Request, SharedPath, examine, look, model_digest


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "SEEN_SECONDS", 0.3)


@pytest.fixture
def paths(tmp_path: Path) -> list[SharedPath]:
    """A model, a calibration file, a work directory and an output that do not exist yet."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"12345678")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    return [
        SharedPath("-i", str(model), "model", True),
        SharedPath("-c", str(tmp_path / "data.parquet"), "file", False),
        SharedPath("-o", str(tmp_path / "a" / "work"), "output", True),
        SharedPath("-cf", str(tmp_path / "a" / "out"), "output", False),
    ]


def messages(report: Report) -> list[str]:
    return [p.message for p in report.problems]


def test_all_is_well(paths: list[SharedPath], tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    report = examine(FakeRay({"n1": None, "n2": None, "dead": None}, gpus=8), Request(tuple(paths)))
    assert messages(report) == []
    assert (report.nodes, report.gpus) == (2, 8)
    assert report.models == {paths[0].path: model_digest(paths[0].path)}
    assert {"exl2ray", "python", "ray", "torch"} <= report.versions.keys()
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind, nothing created


def test_what_is_missing_is_said_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    bad = (
        SharedPath("-i", str(tmp_path / "nothing"), "model", True),
        SharedPath("-i", str(tmp_path / "empty"), "model", True),
        SharedPath("-m", str(tmp_path / "empty"), "file", False),
        SharedPath("-o", str(tmp_path / "file" / "work"), "output", True),
    )
    assert messages(examine(FakeRay({"n1": None, "n2": None}), Request(bad))) == [
        f"-o {tmp_path}/file/work: not writable on the head node: {tmp_path}/file is not a directory",
        f"-i {tmp_path}/nothing: does not exist on the head node",
        f"-i {tmp_path}/empty: has no config.json on the head node",
        f"-m {tmp_path}/empty: not a readable file on the head node",
    ]


def test_a_node_without_the_model(paths: list[SharedPath], tmp_path: Path) -> None:
    def elsewhere(where: str, looked: list[SharedPath], tokens: dict[str, tuple[str, str]]) -> NodeView:
        """As on a node that mounts something else there."""
        moved = [SharedPath(p.flag, p.path.replace("/model", "/other"), p.role, p.workers) for p in looked]
        return look(where, moved, tokens)

    report = examine(FakeRay({"n1": None, "n2": elsewhere}), Request(tuple(paths)))
    assert messages(report) == [f"-i {tmp_path}/other: does not exist on node n2 (6e320000)"]


def test_a_node_with_another_file_system(paths: list[SharedPath], tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()

    def elsewhere(where: str, looked: list[SharedPath], tokens: dict[str, tuple[str, str]]) -> NodeView:
        return look(where, looked, {path: (str(tmp_path / "private"), token) for path, (_, token) in tokens.items()})

    report = examine(FakeRay({"n1": None, "n2": elsewhere}), Request(tuple(paths)))
    (message,) = messages(report)
    assert message.startswith(f"-o {tmp_path}/a/work: node n2 (6e320000) does not see what the head node wrote to ")
    assert "every node mounts" in report.problems[0].hint
    assert list((tmp_path / "private").iterdir()) == []


def test_a_node_that_cannot_write(paths: list[SharedPath], monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(where: str, looked: list[SharedPath], tokens: dict[str, tuple[str, str]]) -> NodeView:
        def refuse(self: Any, rel: str, data: bytes) -> None:
            raise StoreError("read-only file system")

        with monkeypatch.context() as patch:
            patch.setattr("exl2ray.store.local.LocalStore.put", refuse)
            return look(where, looked, tokens)

    (message,) = messages(examine(FakeRay({"n1": None, "n2": read_only}), Request(tuple(paths))))
    assert message.startswith("-o ")
    assert "not writable on node n2 (6e320000): read-only file system" in message


def test_other_software_and_other_files(paths: list[SharedPath], tmp_path: Path) -> None:
    def older(where: str, looked: list[SharedPath], tokens: dict[str, tuple[str, str]]) -> NodeView:
        view = look(where, looked, tokens)
        models = dict.fromkeys(view.models, "0" * 64)
        return NodeView(view.problems, models, {**view.versions, "torch": "2.7.0"})

    first, second = messages(examine(FakeRay({"n1": None, "n2": older}), Request(tuple(paths))))
    assert first.startswith("torch is 2.7.0 on node n2 (6e320000) and ")
    assert second == f"-i {tmp_path}/model: other files on node n2 (6e320000) than on the head node"


def test_nodes_that_fail_or_say_nothing(paths: list[SharedPath]) -> None:
    def broken(*args: Any) -> NodeView:
        raise FakeRay.exceptions.RayError("worker setup failed\nNo module named 'exl2ray'")

    ray = FakeRay({"n1": None, "n2": broken, "n3": None})
    ray.silent.add("n3")
    report = examine(ray, Request(tuple(paths)))
    assert messages(report) == [
        "node n2 (6e320000): No module named 'exl2ray'",
        "node n3 (6e330000) did not answer within 120 s",
    ]
    assert "--working-dir" in report.problems[0].hint


def test_the_submitter_s_file(paths: list[SharedPath], tmp_path: Path) -> None:
    ray = FakeRay({"n1": None})
    (tmp_path / "witness").write_text("")
    assert examine(ray, Request(tuple(paths), str(tmp_path / "witness"))).notes == ()
    (note,) = examine(ray, Request(tuple(paths), str(tmp_path / "not there"))).notes
    assert note.startswith(f"{tmp_path} on the cluster is another directory than here")


def test_model_digest(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    first = model_digest(str(tmp_path))
    (tmp_path / "notes.txt").write_text("does not matter")
    assert model_digest(str(tmp_path)) == first
    (tmp_path / "model.safetensors").write_bytes(b"1")
    assert model_digest(str(tmp_path)) != first


def test_request_and_report_travel_as_text(paths: list[SharedPath]) -> None:
    request = Request(tuple(paths), "/shared/witness")
    assert Request.from_json(request.to_json()) == request
    report = examine(FakeRay({"n1": None}), Request((SharedPath("-i", "/nothing", "model", True),)))
    assert Report.from_log(f"noise\n{report.to_line()}\nnoise\n") == report
    assert Report.from_log("noise") is None


def test_outputs_of_root_are_not_taken_for_shared(tmp_path: Path) -> None:
    """-o /new/work: the nearest existing directory is the root, which no two nodes share."""
    assert preflight.writable_root("/surely-not-there/x") == "/"
    assert preflight.writable_root(f"file://{tmp_path}/x/y") == str(tmp_path)
    assert preflight.writable_root("gs://bucket/x") == "gs://bucket/x"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    boto3 = pytest.importorskip("boto3")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    client = boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"], region_name="us-east-1")
    client.create_bucket(Bucket="preflight")
    yield "s3://preflight"
    server.stop()


def test_object_stores(bucket: str) -> None:
    def asked(url: str) -> Report:
        return examine(FakeRay({"n1": None}), Request((SharedPath("-o", url, "output", True),)))

    assert messages(asked(f"{bucket}/work")) == []
    (message,) = messages(asked("s3://no-such-bucket/work"))
    assert message.startswith("-o s3://no-such-bucket/work: not writable on the head node")


def check(client: FakeClient, paths: list[SharedPath], say: Callable[[str], None] = print) -> Report:
    return submit.check_cluster(cluster(client), paths, {}, say)


def report(**fields: Any) -> str:
    versions = {"exl2ray": submit.__version__, "ray": "2.60.0"}
    line = Report(**{"nodes": 2, "gpus": 16, "versions": versions, **fields}).to_line()
    return f"INFO Runtime env is setting up.\nRunning entrypoint\n{line}\n"


def test_a_good_report(tmp_path: Path) -> None:
    client = FakeClient(report())
    said: list[str] = []
    paths = [SharedPath("-o", str(tmp_path / "new" / "work"), "output", True)]
    check(client, paths, said.append)
    (job,) = client.submitted
    request = Request.from_json(shlex.split(job["entrypoint"])[-1])
    assert request.paths == tuple(paths)
    assert request.witness is not None
    assert os.path.dirname(request.witness) == str(tmp_path)
    assert not os.path.exists(request.witness)  # gone when the check is over
    assert client.deleted == [job["submission_id"]]
    assert said == [f"cluster: 2 nodes, 16 GPUs, exl2ray {submit.__version__}, Ray 2.60.0"]


@pytest.mark.parametrize("path", ["s3://bucket/work", "/no-such-directory-here/work"])
def test_no_witness_where_this_machine_sees_nothing(path: str) -> None:
    client = FakeClient(report())
    check(client, [SharedPath("-o", path, "output", True)])
    assert Request.from_json(shlex.split(client.submitted[0]["entrypoint"])[-1]).witness is None


def test_problems_stop_it(tmp_path: Path) -> None:
    found = (Problem(f"-i {tmp_path}: does not exist on the head node", "share it"), Problem("-o /w: not writable"))
    client = FakeClient(report(problems=found))
    with pytest.raises(ClusterError, match="not writable") as e:
        check(client, [SharedPath("-i", str(tmp_path), "model", True)])
    assert "exists on this machine only" in e.value.hint
    with pytest.raises(ClusterError) as e:
        check(client, [SharedPath("-i", "/elsewhere", "model", True)])
    assert e.value.hint == "share it"


def test_differences_are_told(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    said: list[str] = []
    log = report(notes=("/s is another directory",), versions={"exl2ray": "9.9"}, models={str(tmp_path): "other"})
    check(FakeClient(log), [SharedPath("-i", str(tmp_path), "model", True)], said.append)
    assert said[:3] == [
        "warning: /s is another directory",
        f"warning: exl2ray is 9.9 on the cluster and {submit.__version__} here",
        f"warning: -i {tmp_path} holds other files on the cluster than here",
    ]


@pytest.mark.parametrize(
    ("log", "status", "message", "hint"),
    [
        ("ModuleNotFoundError: No module named 'exl2ray'\n", "FAILED", "No module named 'exl2ray'", "--working-dir"),
        ("/bin/sh: 1: python: not found\n", "FAILED", "python: not found", "install exl2ray"),
        ("Segmentation fault\n", "FAILED", "Segmentation fault", "--logs exl2ray-check-"),
        ("", "PENDING", "did not run a small job", "--no-check"),
    ],
)
def test_no_report(log: str, status: str, message: str, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "CHECK_SECONDS", -1.0)  # over at once
    client = FakeClient(log, status=status)
    with pytest.raises(ClusterError, match=message) as e:
        check(client, [])
    assert hint in e.value.hint
    assert client.deleted == []  # its log stays readable
    assert bool(client.stopped) == (status == "PENDING")
