"""A tiny model, and Ray clusters with fake GPUs whose workers compute on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import team_helpers
import torch
from team_helpers import digests, recipe
from tiny_models import write_model

from exl2ray.convert import convert
from exl2ray.events import Silent

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """As workers get theirs from the driver, sums are made in one order everywhere."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "llama", "Llama")


@pytest.fixture(scope="session")
def moe_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "mixtral", "Mixtral", num_hidden_layers=1)


@pytest.fixture(scope="module")
def quiet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Digests of undisturbed conversions by one worker in this process."""
    out = {}
    for propagate in ("quantized", "reference"):
        work = tmp_path_factory.mktemp("quiet") / "work"
        convert(recipe(model, work, propagate=propagate), Silent())
        out[propagate] = digests(work)
    return out


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One node with three fake GPUs; ``ray_address`` of a recipe is ``cluster.address``."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4, "num_gpus": 3, "include_dashboard": False, "object_store_memory": 100 << 20,
        },
    )  # fmt: skip
    yield made
    made.shutdown()


@pytest.fixture(autouse=True)
def fake_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU workers that claim a (fake) GPU each; helpers travel to them by value."""
    import ray.cloudpickle

    import exl2ray.steps.job
    from exl2ray.driver.actors import RayWorkers
    from exl2ray.driver.workers import InlineWorkers

    ray.cloudpickle.register_pickle_by_value(team_helpers)

    def opened(setup: Any, make: Any, executor: str, workers: Any = None, address: Any = None) -> Any:
        if executor == "inline":
            return InlineWorkers(setup, make)
        claim = {"num_gpus": 1, "num_cpus": 0} if address else {"num_cpus": 0.5}  # a Ray of its own has no fake GPUs
        return RayWorkers(setup, make, workers, address, claim=claim)

    monkeypatch.setattr(exl2ray.steps.job, "open_workers", opened)
