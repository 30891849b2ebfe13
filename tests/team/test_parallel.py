"""Many workers give the same bytes as one, with either way of propagation, several bitrates, experts, and any resume."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gcs_server import GcsServer
from team_helpers import BITS, WIDE, WideWorker, digests, recipe

from exl2ray.convert import convert
from exl2ray.errors import Interrupted
from exl2ray.events import Silent
from exl2ray.store.event_log import read_events
from exl2ray.store.open import open_store
from exl2ray.store.status import read_status


class StopAfter(Silent):
    """Stops the conversion when so many modules have been quantised."""

    def __init__(self, modules: int) -> None:
        super().__init__()
        self.modules = modules

    def event(self, name: str, **fields: Any) -> None:
        super().event(name, **fields)
        if name == "item" and fields["stage"].startswith("quantize") and fields["done"] == self.modules:
            raise KeyboardInterrupt


def started(work: Path) -> list[tuple[str, str]]:
    """(method, key) of all calls that were made."""
    events, _ = read_events(open_store(str(work)))
    return [(e["fields"]["method"], e["fields"]["key"]) for e in events if e["name"] == "started"]


@pytest.mark.parametrize(("workers", "propagate"), [(1, "quantized"), (2, "quantized"), (3, "quantized"), (2, "reference")])
def test_the_number_of_workers_changes_no_byte(
    workers: int, propagate: str, model: Path, tmp_path: Path, cluster: Any, quiet: dict[str, dict[str, str]]
) -> None:
    work = tmp_path / "work"
    reporter = Silent()
    convert(recipe(model, work, gpus=workers, ray_address=cluster.address, propagate=propagate), reporter)
    assert digests(work) == quiet[propagate]
    items = [f for name, f in reporter.events if name == "item"]
    assert len({f["worker"] for f in items if f["stage"] == "measure"}) >= min(workers, 2)  # a third may start late
    assert {f["workers"] for f in items} == {workers}
    assert items[0]["queue"] == 3
    assert items[0]["eta_seconds"] is None  # nothing is claimed of a single item
    assert items[1]["eta_seconds"] > 0


@pytest.mark.parametrize(("workers", "quality"), [(2, "reference"), (3, "reference"), (3, "balanced")])
def test_wide_hessians_are_factorised_together(
    workers: int, quality: str, model: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in WIDE.items():
        monkeypatch.setattr(name, value)
    one, many = tmp_path / "one", tmp_path / "many"
    convert(recipe(model, one, quality=quality), Silent())

    monkeypatch.setattr("exl2ray.steps.job.Worker", WideWorker)
    convert(recipe(model, many, gpus=workers, ray_address=cluster.address, quality=quality), Silent())
    assert digests(many) == digests(one)
    together = Path(f"{many}.together").read_text().splitlines()
    assert {line.rsplit(" ", 1)[1] for line in together} == {str(workers)}
    assert {"model.layers.1.mlp (down)", "model.layers.0.self_attn (o)"} <= {line.rsplit(" ", 1)[0] for line in together}


def test_sensitivities_are_shared_out_too(model: Path, tmp_path: Path, cluster: Any) -> None:
    """On CPUs a call for each share of rows, whoever takes it."""
    one, two = tmp_path / "one", tmp_path / "two"
    convert(recipe(model, one, allocation="linear"), Silent())
    reporter = Silent()
    convert(recipe(model, two, gpus=2, ray_address=cluster.address, allocation="linear"), reporter)
    assert digests(one) == digests(two)
    calls = [f for name, f in reporter.events if name == "item" and f["stage"] == "sensitivity"]
    assert len(calls) == len([key for method, key in started(one) if method == "sensitivity"])
    assert len({f["worker"] for f in calls}) == 2


def test_several_bitrates_share_the_workers(model: Path, tmp_path: Path, cluster: Any) -> None:
    bits = (4.0, 5.0, 6.0)
    one, many = tmp_path / "one", tmp_path / "many"
    convert(recipe(model, one, bits=bits), Silent())
    convert(recipe(model, many, bits=bits, gpus=2, ray_address=cluster.address), Silent())
    assert digests(one) == digests(many)
    workers = [set[str](), set[str]()]
    events, _ = read_events(open_store(str(many)))
    for e in events:
        if e["name"] == "started" and e["fields"]["method"] == "chain":
            workers[0].add(e["fields"]["worker"])
    assert len(workers[0]) == 2


@pytest.mark.parametrize("quality", ["reference", "balanced"])
def test_experts_in_a_group(quality: str, moe_model: Path, tmp_path: Path, cluster: Any) -> None:
    """Starved experts borrow Hessians, so all inputs of w1 and w3 must meet on one member."""
    one, two = tmp_path / "one", tmp_path / "two"
    convert(recipe(moe_model, one, quality=quality), Silent())
    convert(recipe(moe_model, two, gpus=2, ray_address=cluster.address, quality=quality), Silent())
    assert digests(one) == digests(two)


@pytest.mark.parametrize("propagate", ["quantized", "reference"])
def test_resume_with_another_number_of_workers(
    propagate: str, model: Path, tmp_path: Path, cluster: Any, quiet: dict[str, dict[str, str]]
) -> None:
    """One worker up to the middle of the quantisation, two from there, states saved after every module."""
    work = tmp_path / "work"
    settings = recipe(model, work, propagate=propagate, checkpoint_seconds=0.0)

    with pytest.raises(Interrupted, match="work directory"):
        convert(settings, StopAfter(2))
    before = started(work)
    convert(dataclasses.replace(settings, gpus=2, executor="ray", ray_address=cluster.address), Silent())
    assert digests(work) == quiet[propagate]
    done = {"model.layers.0.self_attn", "model.layers.0.mlp"}
    after = started(work)[len(before) :]
    assert not [c for c in after if c[0] in ("measure", "chain", "quantize") and c[1] in done]
    assert [c for c in after if c[0] in ("chain", "quantize")]


def test_corrected_targets_whoever_holds_which_rows(model: Path, tmp_path: Path, cluster: Any) -> None:
    """The states of the source model travel with those of the quantised one: into a group, and over a resume."""
    settings = {"quality": "balanced", "checkpoint_seconds": 0.0}
    one, three, resumed = tmp_path / "one", tmp_path / "three", tmp_path / "resumed"
    convert(recipe(model, one, **settings), Silent())
    convert(recipe(model, three, gpus=3, ray_address=cluster.address, **settings), Silent())
    assert digests(three) == digests(one)

    with pytest.raises(Interrupted, match="work directory"):
        convert(recipe(model, resumed, **settings), StopAfter(3))
    convert(recipe(model, resumed, gpus=2, ray_address=cluster.address, **settings), Silent())
    assert digests(resumed) == digests(one)


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on moto's server."""
    boto3 = pytest.importorskip("boto3")
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    for name, value in {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_EC2_METADATA_DISABLED": "true", "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    boto3.client("s3", endpoint_url=url, region_name="us-east-1").create_bucket(Bucket="work")
    yield "s3://work"
    server.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket on a server of ours."""
    server = GcsServer()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.address)
    yield "gs://work"
    server.close()


@pytest.mark.parametrize("propagate", ["quantized", "reference"])
def test_what_workers_send_each_other_is_counted(propagate: str, model: Path, tmp_path: Path, cluster: Any) -> None:
    """Nothing for one worker. For two: states and weights where they run the source model together, Hessians and packed
    tensors where they share each module."""
    moved = {}
    for workers in (1, 2):
        work = tmp_path / str(workers)
        convert(recipe(model, work, gpus=workers, ray_address=cluster.address, propagate=propagate), Silent())
        events, _ = read_events(open_store(str(work)))
        calls = [e["fields"] for e in events if e["name"] == "finished"]
        moved[workers] = {m: sum(c["received"] for c in calls if c["method"] == m) for m in ("sweep", "chain")}
        in_items = sum(e["fields"]["received"] for e in events if e["name"] == "item")
        assert in_items == moved[workers]["chain"]
        assert len([c for c in calls if c["method"] == "measure"]) >= 4
    assert moved[1] == {"sweep": 0, "chain": 0}
    assert moved[2]["sweep"] > 0
    assert (moved[2]["chain"] > 0) == (propagate == "quantized")


@pytest.mark.parametrize("kind", ["s3", "gs"])
def test_work_directory_in_a_bucket(kind: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Records and states in s3:// or gs://, workers of a Ray session: the model is the one of a local work directory.

    Last in this file: a process that had a Ray of its own keeps its token, and the cluster of the other tests has none.
    """
    root = f"{request.getfixturevalue(kind)}/job"
    local = tmp_path / "local"
    convert(recipe(model, local), Silent())
    out = tmp_path / "out"
    settings = recipe(model, root, gpus=2, compile_full=str(out), checkpoint_seconds=0.0)
    convert(settings, Silent())  # a Ray of its own: workers inherit the environment of the driver
    produced = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    expected = {p.name: p.read_bytes() for p in Path(f"{local}-out/{BITS[0]}").iterdir() if p.is_file()}
    assert produced == expected
    store = open_store(root)
    assert store.get("measurement.json") == (local / "measurement.json").read_bytes()
    states = [n for kind in ("measure", "quant/4.0") for n in store.list(f"{kind}/states")]
    assert [n for n in states if n.endswith(".safetensors")]  # which ones depends on how long saving takes
    assert [p.state for p in read_status(root).passes] == ["finished"] * 3
