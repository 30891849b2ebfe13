"""Figures of a running conversion for Prometheus, through Ray, which exports them on every node under ``ray_...``.

Fed by the event log's own events; does nothing, and imports nothing, while no Ray runs in this process, or only a private
one, which collects none. cluster/grafana-exl2ray.json shows them. A figure never stops a conversion: what Ray refuses is
dropped.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from exl2ray.driver import starting

# name -> (kind of ray.util.metrics, description, tags beside ``conversion``)
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "exl2ray_modules": ("Gauge", "Modules of the pass.", ("stage",)),
    "exl2ray_modules_done": ("Gauge", "Modules of the pass that are finished.", ("stage",)),
    "exl2ray_eta_seconds": ("Gauge", "Seconds until the pass is complete, as the live display has them.", ("stage",)),
    "exl2ray_workers": ("Gauge", "Workers at work.", ("stage",)),
    "exl2ray_module_seconds": ("Histogram", "Seconds that a worker took for a module.", ("stage",)),
    "exl2ray_lost_workers_total": ("Counter", "Workers that were lost at a module.", ()),
    "exl2ray_retries_total": ("Counter", "Modules that were tried again with smaller batches or after a fault.", ()),
    "exl2ray_written_bytes_total": ("Counter", "Bytes of finished models.", ("bits",)),
}
SECONDS = [0.3, 1, 3, 10, 30, 60, 120, 300, 600, 1800]  # upper ends of the histogram


class ClusterMetrics:
    """``hear`` takes the events of a work directory's log. conversion: what tells the figures of several apart."""

    def __init__(self, conversion: str) -> None:
        self.conversion = conversion  # "job" is what Prometheus calls its own
        self._found: dict[str, Any] = {}

    def hear(self, name: str, f: Mapping[str, Any]) -> None:
        """One event with its fields; those that say nothing of METRICS are passed over."""
        if not _ray_runs():
            return
        with suppress(Exception):
            if name in ("stage", "item"):
                stage = str(f["stage"])
                self._set("exl2ray_modules", f["items"], stage=stage)
                self._set("exl2ray_modules_done", f["done"], stage=stage)
            if name == "item":
                self._set("exl2ray_workers", f["workers"], stage=stage)
                self._metric("exl2ray_module_seconds").observe(f["seconds"], self._tags(stage=stage))
                if f["eta_seconds"] is not None:
                    self._set("exl2ray_eta_seconds", f["eta_seconds"], stage=stage)
            elif name in ("lost", "retry"):
                self._metric("exl2ray_lost_workers_total" if name == "lost" else "exl2ray_retries_total").inc(1, self._tags())
            elif name == "written" and f["directory"] is not None:
                nbytes = sum(os.path.getsize(os.path.join(f["directory"], n)) for n in f["files"])
                self._metric("exl2ray_written_bytes_total").inc(nbytes, self._tags(bits=f"{f['bits']:g}"))

    def _set(self, name: str, value: float, **tags: str) -> None:
        self._metric(name).set(value, self._tags(**tags))

    def _tags(self, **tags: str) -> dict[str, str]:
        return {"conversion": self.conversion, **tags}

    def _metric(self, name: str) -> Any:
        if name not in self._found:
            from ray.util import metrics

            kind, description, tags = METRICS[name]
            more = {"boundaries": SECONDS} if kind == "Histogram" else {}
            self._found[name] = getattr(metrics, kind)(name, description, tag_keys=("conversion", *tags), **more)
        return self._found[name]


def _ray_runs() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and starting.is_of_a_cluster() and bool(ray.is_initialized())
