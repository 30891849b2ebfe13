"""Figures for Prometheus: what becomes of the events, the dashboard that shows them, and a Ray that exports them."""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from exl2ray.commands.submit import progress
from exl2ray.driver import prometheus
from exl2ray.driver.prometheus import METRICS, ClusterMetrics

DASHBOARD = Path(__file__).resolve().parents[2] / "cluster" / "grafana-exl2ray.json"
ITEM: dict[str, Any] = {
    "stage": "measure", "key": "model.layers.0", "done": 3, "items": 8, "seconds": 4.5, "worker": "gpu1:7", "workers": 2,
    "queue": 5, "eta_seconds": 60.0,
}  # fmt: skip


class Kept:
    """A metric of Ray, as far as this project calls it; keeps what it is told. Refuses tags that were not declared."""

    all: dict[str, list[tuple[Any, ...]]]

    def __init__(self, name: str, description: str = "", tag_keys: tuple[str, ...] = (), boundaries: Any = None) -> None:
        self.name, self.tags = name, set(tag_keys)
        assert description

    def _say(self, verb: str, value: float, tags: dict[str, str]) -> None:
        assert set(tags) == self.tags
        Kept.all.setdefault(self.name, []).append((verb, value, tags))

    def set(self, value: float, tags: dict[str, str]) -> None:
        self._say("set", value, tags)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0
        self._say("inc", value, tags)

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self._say("observe", value, tags)


@pytest.fixture
def ray_of_a_cluster(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[Any, ...]]]:
    ray, util, found = ModuleType("ray"), ModuleType("ray.util"), ModuleType("ray.util.metrics")
    ray.is_initialized = lambda: True  # type: ignore[attr-defined]
    found.Gauge = found.Counter = found.Histogram = Kept  # type: ignore[attr-defined]
    util.metrics = found  # type: ignore[attr-defined]
    for module in (ray, util, found):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    Kept.all = {}
    return Kept.all


def test_events_become_figures(ray_of_a_cluster: dict[str, list[tuple[Any, ...]]], tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(bytes(1000))
    hear = ClusterMetrics("M").hear
    hear("opened", {"changed": []})
    hear("stage", {"stage": "measure", "items": 8, "done": 2})
    hear("item", ITEM)
    hear("item", {**ITEM, "done": 4, "eta_seconds": None})
    hear("lost", {"key": "x", "reason": "killed"})
    hear("retry", {"key": "x", "reason": "out of memory"})
    hear("written", {"bits": 4.0, "directory": str(tmp_path), "files": ["a.safetensors"]})
    hear("written", {"bits": 3.0, "directory": None, "files": []})
    hear("written", {"bits": 3.0, "directory": str(tmp_path / "gone"), "files": ["x"]})  # never an error
    hear("item", {"stage": "measure"})  # of another version
    tags = {"conversion": "M", "stage": "measure"}
    found = ray_of_a_cluster
    assert set(found) == set(METRICS)
    assert [v for _, v, _ in found["exl2ray_modules_done"]] == [2, 3, 4]
    assert found["exl2ray_eta_seconds"] == [("set", 60.0, tags)]
    assert found["exl2ray_workers"] == [("set", 2, tags)] * 2
    assert found["exl2ray_module_seconds"] == [("observe", 4.5, tags)] * 2
    assert found["exl2ray_lost_workers_total"] == [("inc", 1, {"conversion": "M"})]
    assert found["exl2ray_written_bytes_total"] == [("inc", 1000, {"conversion": "M", "bits": "4"})]


def test_nothing_happens_without_a_cluster(
    ray_of_a_cluster: dict[str, list[tuple[Any, ...]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prometheus.starting, "_private", object())  # a Ray of this process alone
    ClusterMetrics("M").hear("item", ITEM)
    monkeypatch.setattr(prometheus.starting, "_private", None)
    monkeypatch.delitem(sys.modules, "ray")
    ClusterMetrics("M").hear("item", ITEM)
    assert "ray" not in sys.modules
    assert ray_of_a_cluster == {}


def test_the_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    exported = {f"ray_{name}" + ("_bucket" if kind == "Histogram" else "") for name, (kind, *_) in METRICS.items()}
    queries = [t["expr"] for p in dashboard["panels"] for t in p["targets"]]
    queries += [v["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    asked = {name for q in queries for name in re.findall(r"\bray_\w+", q)}
    assert asked - exported == {"ray_node_gram_used"}  # Ray's own, in MiB
    assert exported - asked == set()
    labels = {label for name in METRICS for label in ("conversion", *METRICS[name][2])} | {"le"}
    for query in queries:
        for by in re.findall(r"by \(([^)]*)\)", query):
            assert set(by.replace(" ", "").split(",")) <= labels
        assert query.count("(") == query.count(")")
    ids = [p["id"] for p in dashboard["panels"]]
    assert len(set(ids)) == len(ids) >= 6
    for p in dashboard["panels"]:
        assert p["gridPos"]["x"] + p["gridPos"]["w"] <= 24
        assert all(set(re.findall(r"\{\{(\w+)\}\}", t["legendFormat"])) <= labels for t in p["targets"])


def test_progress_of_a_submitted_job() -> None:
    line = "[measure] 10/65  model.layers.4.mlp  4.1 s  19 options  ETA 4 min"
    assert progress(f"note: x\n[measure] 65 items\n{line}\nnote: y\n") == line
    event = json.dumps({"event": "item", **ITEM})
    printed = f'{{"event": "start"}}\n{event}\n{{"event": "note"}}\n'
    assert progress(printed) == "[measure] 3/8  model.layers.0  ETA 1 min 00 s"
    assert progress('nothing yet\n{"event": "item" broken\n') == ""


@pytest.mark.cluster
def test_a_cluster_exports_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private.test_utils import wait_for_condition

    port = 18097
    ray.init(num_cpus=1, include_dashboard=False, _metrics_export_port=port)
    try:
        monkeypatch.setattr(prometheus.starting, "_private", None)
        ClusterMetrics("M").hear("item", ITEM)

        def exported() -> bool:
            ClusterMetrics("M").hear("lost", {"key": "x", "reason": "x"})
            with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=5) as answer:
                text = answer.read().decode()
            wanted = ("ray_exl2ray_eta_seconds{", "ray_exl2ray_module_seconds_bucket{", "ray_exl2ray_lost_workers_total{")
            return all(w in text for w in wanted)

        wait_for_condition(exported, timeout=90, retry_interval_ms=1000)
    finally:
        ray.shutdown()
