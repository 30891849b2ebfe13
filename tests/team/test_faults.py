"""One fault at a time in a conversion on three fake GPUs: the model has the bytes of a quiet run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from team_helpers import FaultyWorker, digests, faults, left, recipe

import exl2ray.steps.job
from exl2ray.convert import convert
from exl2ray.driver.policy import Limits
from exl2ray.driver.supervise import POLL_SECONDS
from exl2ray.errors import ClusterError, Exl2RayError, StoreError
from exl2ray.events import Silent
from exl2ray.store.event_log import read_events
from exl2ray.store.open import open_store
from exl2ray.team.messages import Begun

ROOT = Path(__file__).resolve().parents[2]
QUICK = Limits(grace=3.0, patience=6.0, rest=0.1)


@pytest.fixture(autouse=True)
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exl2ray.steps.job, "Worker", FaultyWorker)
    monkeypatch.setattr(exl2ray.steps.job, "Limits", lambda: QUICK)


def events(work: Path, name: str) -> list[dict[str, Any]]:
    return [e["fields"] for e in read_events(open_store(str(work)))[0] if e["name"] == name]


def test_killed_in_every_kind_of_item(
    model: Path, tmp_path: Path, cluster: Any, quiet: dict[str, dict[str, str]]
) -> None:
    work = tmp_path / "work"
    faults(
        work, "measure 1 kill", "measure 2 kill", "measure 3 commit", "join 1 kill", "chain 2 kill", "chain 4 commit",
        "chain 6 kill",
    )  # fmt: skip
    reporter = Silent()
    convert(recipe(model, work, gpus=2, ray_address=cluster.address), reporter)
    assert digests(work) == quiet["quantized"]
    assert not left(work)
    assert len(events(work, "lost")) >= 7
    assert {f["key"] for f in events(work, "found")} >= {"model.layers.1.self_attn"}
    assert any("worker was lost" in f["message"] for name, f in reporter.events if name == "warning")


def test_failures_of_what_all_workers_do_together(
    model: Path, tmp_path: Path, cluster: Any, quiet: dict[str, dict[str, str]]
) -> None:
    """Running the source model to where each begins, in both passes: the work goes on without, and the bytes are the same."""
    work = tmp_path / "work"
    faults(work, "sweep -1 kill", "sweep -1 gpu", "perplexity 0 kill", "perplexity 0 commit")
    convert(recipe(model, work, gpus=2, ray_address=cluster.address, propagate="reference"), Silent())
    assert not left(work)
    assert digests(work) == quiet["reference"]
    assert {f["method"] for f in events(work, "lost")} >= {"sweep", "perplexity"}


def test_memory_and_devices(model: Path, tmp_path: Path, cluster: Any, quiet: dict[str, dict[str, str]]) -> None:
    """Out of host memory, out of GPU memory, a CUDA error, a full disk on one machine, a group that breaks for nothing.

    Smaller batches change the order of sums, so here the model need not have the same bytes; it must be complete.
    """
    work = tmp_path / "work"
    faults(
        work, "measure 2 memory", "measure 3 gpu", "measure 4 cuda", "measure 1 full", "chain 1 cuda", "chain 2 gpu",
        "chain 3 full", "chain 4 broken",
    )  # fmt: skip
    convert(recipe(model, work, gpus=2, ray_address=cluster.address), Silent())
    assert not left(work)
    assert digests(work).keys() == quiet["quantized"].keys()
    retried = {f["key"] for f in events(work, "retry")}
    assert retried == {"model.layers.0.mlp", "model.layers.1.self_attn"}
    assert "cuda" in json.dumps(events(work, "lost")).lower()


def test_reference_states_and_lost_workers(
    model: Path, tmp_path: Path, cluster: Any, quiet: dict[str, dict[str, str]]
) -> None:
    work = tmp_path / "work"
    faults(work, "quantize 1 kill", "quantize 2 commit", "quantize 3 commit", "quantize 6 kill")
    convert(recipe(model, work, gpus=2, ray_address=cluster.address, propagate="reference"), Silent())
    assert not left(work)
    assert digests(work) == quiet["reference"]


@pytest.mark.parametrize("method", ["measure", "chain"])
def test_a_stopped_worker_is_replaced(
    method: str,
    model: Path,
    tmp_path: Path,
    cluster: Any,
    quiet: dict[str, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGSTOP: Ray never reports it. The deadline, from what other modules took, does."""
    limits = Limits(grace=3.0, patience=6.0, floor=20.0, factor=3.0)
    monkeypatch.setattr(exl2ray.steps.job, "Limits", lambda: limits)
    work = tmp_path / "work"
    faults(work, f"{method} 4 stop")
    convert(recipe(model, work, gpus=2, ray_address=cluster.address), Silent())
    assert digests(work) == quiet["quantized"]
    assert "no answer" in events(work, "lost")[0]["reason"]


def test_poison(model: Path, tmp_path: Path, cluster: Any) -> None:
    work = tmp_path / "work"
    faults(work, *["measure 2 kill"] * 5)
    with pytest.raises(ClusterError, match=r"model\.layers\.0\.mlp .* lost its workers 3 times") as error:
        convert(recipe(model, work, gpus=2, ray_address=cluster.address), Silent())
    assert "logs" in error.value.hint
    assert len(left(work)) == 2


def test_a_defect_is_not_tried_again(model: Path, tmp_path: Path, cluster: Any) -> None:
    work = tmp_path / "work"
    faults(work, *["measure 2 value"] * 3)
    with pytest.raises(ValueError, match="a defect"):
        convert(recipe(model, work, gpus=2, ray_address=cluster.address), Silent())
    assert len(left(work)) == 2
    logs = list((work / "logs").glob("*.log"))
    assert "ValueError: a defect" in logs[0].read_text()


def test_a_node_with_other_versions_or_files_is_refused(
    model: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Elsewhere(FaultyWorker):
        def __init__(self, setup: Any) -> None:
            import dataclasses

            super().__init__(dataclasses.replace(setup, versions={**setup.versions, "torch": "1.0"}))

    monkeypatch.setattr(exl2ray.steps.job, "Worker", Elsewhere)
    with pytest.raises(StoreError, match="versions differ"):
        convert(recipe(model, tmp_path / "work", gpus=2, ray_address=cluster.address), Silent())


class Gated(FaultyWorker):
    """Goes on to the second module that is measured when there are two workers, and to the fourth of a chain when a machine
    was taken away."""

    def __init__(self, setup: Any) -> None:
        super().__init__(setup)
        Path(f"{setup.work_root}.workers").mkdir(exist_ok=True)
        Path(f"{setup.work_root}.workers/{os.getpid()}").touch()

    def run(self, part: Any) -> Any:
        measured = 0
        for said in super().run(part):
            yield said
            root = self.setup.work_root
            method = getattr(said, "method", "")
            measured += method == "measure"
            while measured > 1 and len(list(Path(f"{root}.workers").iterdir())) < 2:
                time.sleep(0.1)
            while isinstance(said, Begun) and method == "chain" and said.index == 4 and not Path(f"{root}.removed").exists():
                time.sleep(0.1)


def test_nodes_come_and_go(
    model: Path, tmp_path: Path, quiet: dict[str, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two workers wanted, one GPU there: a node joins while modules are measured and gets some of them; then it is lost with
    all it held."""
    from ray.cluster_utils import Cluster

    import_by_value()
    monkeypatch.setattr(exl2ray.steps.job, "Worker", Gated)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "num_gpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    work = tmp_path / "work"
    node: list[Any] = []

    class ComeAndGo(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "item" and fields["stage"] == "measure" and fields["done"] == 1 and not node:
                node.append(cluster.add_node(num_cpus=1, num_gpus=1, object_store_memory=100 << 20))
            if name == "item" and fields["stage"] == "quantize 4.0" and fields["done"] == 2:
                cluster.remove_node(node[0], allow_graceful=False)
                wait_for_death(Path(f"{work}.workers"))  # a worker lives on for a moment, in which the chain may end
                Path(f"{work}.removed").touch()

    try:
        reporter = ComeAndGo()
        convert(recipe(model, work, gpus=2, ray_address=cluster.address, bits=(4.0,)), reporter)
        assert digests(work) == quiet["quantized"]
        assert len({f["worker"] for f in events(work, "started") if f["method"] == "measure"}) == 2
        assert events(work, "lost")
    finally:
        cluster.shutdown()


def wait_for_death(workers: Path, seconds: float = 60) -> None:
    """Until one of the processes that left their numbers as names of files is gone."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and all(Path(f"/proc/{file.name}").exists() for file in workers.iterdir()):
        time.sleep(0.1)


def import_by_value() -> None:
    """Classes of this file travel to workers."""
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])


DRIVER = """
import sys
sys.path[:0] = {paths!r}
import ray.cloudpickle, torch
import team_helpers, exl2ray.steps.job
from exl2ray.driver.actors import RayWorkers
torch.set_num_threads(1)
ray.cloudpickle.register_pickle_by_value(team_helpers)
exl2ray.steps.job.Worker = team_helpers.HeldWorker
exl2ray.steps.job.open_workers = lambda setup, make, executor, workers=None, address=None: RayWorkers(
    setup, make, workers, address, claim={{"num_cpus": 1}})
from exl2ray.convert import convert
from exl2ray.events import Silent

class Tell(Silent):
    def event(self, name, **fields):
        print(name, fields.get("stage", ""), fields.get("done", ""), flush=True)

convert(team_helpers.recipe({model!r}, {work!r}, gpus=2, ray_address={address!r}), Tell())
"""


def driver(model: Path, work: Path, address: str | None, **environment: str) -> subprocess.Popen[str]:
    """A conversion in a process of its own."""
    paths = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "team")]
    code = DRIVER.format(paths=paths, model=str(model), work=str(work), address=address)
    env = {**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
    )


def wait_for(process: subprocess.Popen[str], text: str) -> str:
    """Reads the driver's output up to a line with ``text``."""
    seen = ""
    assert process.stdout is not None
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    pytest.fail(f"the driver ended before {text!r}:\n{seen[-3000:]}")


def test_a_killed_driver_resumes_and_a_second_is_refused(
    model: Path, tmp_path: Path, quiet: dict[str, dict[str, str]]
) -> None:
    work, held = tmp_path / "work", tmp_path / "work.held"
    held.write_text("measure")
    first = driver(model, work, None)
    wait_for(first, "item measure 2")
    with pytest.raises(StoreError, match="in use by"):
        convert(recipe(model, work), Silent())
    first.send_signal(signal.SIGKILL)
    first.wait(30)
    done = {f["key"] for f in events(work, "item")}
    before = len(events(work, "started"))
    held.write_text("chain")
    second = driver(model, work, None)
    wait_for(second, "item quantize 4.0 3")
    second.send_signal(signal.SIGINT)  # waits for what is in hand
    wait_for(second, "note")  # that it is stopping
    time.sleep(2 * POLL_SECONDS)  # within which its loop has told the workers
    held.unlink()
    output, _ = second.communicate(timeout=60)
    assert "resume with: exl2ray convert -o" in output
    convert(recipe(model, work), Silent())
    assert digests(work) == quiet["quantized"]
    again = [f["key"] for f in events(work, "started")[before:] if f["method"] == "measure"]
    assert not done & set(again)


def test_a_lost_head_ends_the_driver_and_nothing_else(
    model: Path, tmp_path: Path, quiet: dict[str, dict[str, str]]
) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 100 << 20},
    )
    work = tmp_path / "work"
    Path(f"{work}.held").write_text("measure")
    try:
        process = driver(
            model, work, cluster.address,
            RAY_gcs_rpc_server_reconnect_timeout_s="3", RAY_gcs_server_request_timeout_seconds="3",
        )  # fmt: skip
        wait_for(process, "item measure 2")
        cluster.head_node.kill_gcs_server(check_alive=False)
        cluster.remove_node(cluster.head_node, allow_graceful=False)
        timer = threading.Timer(90, process.kill)
        timer.start()
        process.communicate()
        assert timer.is_alive(), "the driver did not notice that its cluster is gone"
        timer.cancel()
        assert process.returncode != 0
    finally:
        cluster.shutdown()
    _convert_when_unlocked(model, work)
    assert digests(work) == quiet["quantized"]


def _convert_when_unlocked(model: Path, work: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            return void(convert(recipe(model, work), Silent()))
        except Exl2RayError as e:
            if "in use" not in str(e) or time.monotonic() > deadline:
                raise
            time.sleep(1)


def void(value: object) -> None:
    return None
