"""What a conversion needs of a cluster, looked at on its nodes before anything starts: paths and versions.

``exl2ray submit`` runs ``main`` as a small job of its own. The job's driver runs where the conversion's driver will (on
the head node) and looks at every path of the command; a task on each node looks at those that workers use. The driver
writes a file with a random name beside the work directory, and every node must see it: a directory that exists everywhere
but is another one on some node shows before hours of work go into it. Nodes that an autoscaler adds later are checked by
their workers.

`exl2ray plan` in place of this job was weighed: it reads headers, weights and text, which the submitted command does first
thing anyway, and sees the head node alone; nodes are asked by the same `look` as the head, so it would save next to nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from exl2ray.calibration.data.sources import is_there, split_column
from exl2ray.errors import Exl2RayError, StoreError
from exl2ray.store.fs import temp_name
from exl2ray.store.open import open_store
from exl2ray.store.versions import versions

MARKER = "exl2ray-preflight: "  # begins the line of the job's log that holds the report
NODE_SECONDS = 120.0
SEEN_SECONDS = 15.0  # network file systems may show a new file late
SHARED_HINT = "use a file system that every node mounts under this path, or s3:// or gs:// for -o"


@dataclass(frozen=True)
class SharedPath:
    """One path of the command. ``workers``: every node uses it, not the driver alone."""

    flag: str
    path: str
    role: Literal["model", "file", "data", "output"]
    workers: bool


@dataclass(frozen=True)
class Request:
    """``witness``: path of a file that the submitting machine wrote beside the work directory; None if it cannot."""

    paths: tuple[SharedPath, ...]
    witness: str | None = None

    @staticmethod
    def from_json(text: str) -> Request:
        value = json.loads(text)
        return Request(tuple(SharedPath(**p) for p in value["paths"]), value["witness"])

    def to_json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(frozen=True)
class Problem:
    message: str
    hint: str = ""


@dataclass(frozen=True)
class NodeView:
    """What one node sees. ``models``: path -> digest of the files there."""

    problems: tuple[Problem, ...]
    models: Mapping[str, str]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """``problems`` would stop the conversion; ``notes`` may surprise its user."""

    problems: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    nodes: int = 0
    gpus: int = 0
    versions: Mapping[str, str] = field(default_factory=dict)
    models: Mapping[str, str] = field(default_factory=dict)

    @staticmethod
    def from_log(log: str) -> Report | None:
        """The report in a job's log; None if there is none."""
        for line in log.splitlines():
            if line.startswith(MARKER):
                value = json.loads(line.removeprefix(MARKER))
                problems = tuple(Problem(**p) for p in value.pop("problems"))
                return Report(problems=problems, notes=tuple(value.pop("notes")), **value)
        return None

    def to_line(self) -> str:
        return MARKER + json.dumps(asdict(self))


# ---- on every node --------------------------------------------------------------------------------------------------


def look(where: str, paths: Sequence[SharedPath], tokens: Mapping[str, tuple[str, str]]) -> NodeView:
    """What the node called ``where`` sees of ``paths``. ``tokens``: output path -> (store root, name of a file in it)."""
    problems: list[Problem] = []
    models: dict[str, str] = {}
    for p in paths:
        if p.role == "model":
            if os.path.isfile(os.path.join(p.path, "config.json")):
                models[p.path] = model_digest(p.path)
            else:
                what = "has no config.json" if os.path.isdir(p.path) else "does not exist"
                problems.append(Problem(f"{p.flag} {p.path}: {what} on {where}", SHARED_HINT))
        elif p.role == "file":
            if not os.path.isfile(p.path) or not os.access(p.path, os.R_OK):
                problems.append(Problem(f"{p.flag} {p.path}: not a readable file on {where}", SHARED_HINT))
        elif p.role == "data":  # a file, a folder or a pattern, perhaps with a column
            if not is_there(split_column(p.path)[0]):
                problems.append(Problem(f"{p.flag} {p.path}: does not exist on {where}", SHARED_HINT))
        elif p.path in tokens:
            problems += _joined(p, where, *tokens[p.path])
    return NodeView(tuple(problems), models, versions())


def _joined(p: SharedPath, where: str, root: str, token: str) -> list[Problem]:
    """Whether the file ``token`` under ``root`` is seen here, and another one can be written beside it."""
    try:
        store = open_store(root)
        deadline = time.monotonic() + SEEN_SECONDS
        while not store.exists(token):
            if time.monotonic() > deadline:
                message = f"{p.flag} {p.path}: {where} does not see what the head node wrote to {root}"
                return [Problem(message, SHARED_HINT)]
            time.sleep(0.2)
        probe = temp_name()
        store.put(probe, b"")
        store.delete(probe)
    except StoreError as e:
        return [Problem(f"{p.flag} {p.path}: not writable on {where}: {e.message}", e.hint)]
    return []


def model_digest(path: str) -> str:
    """Identifies the files of a model directory by names and sizes; enough to tell two models apart, and cheap."""
    digest = hashlib.sha256()
    for entry in sorted(Path(path).iterdir()):
        if entry.suffix in (".safetensors", ".json"):
            digest.update(f"{entry.name}\0{entry.stat().st_size}\0".encode())
    return digest.hexdigest()


def writable_root(path: str) -> str:
    """Where a file can be written that shares the fate of ``path``: the nearest existing directory, or the URL itself.

    Raises StoreError if there is something else than a directory in the way.
    """
    if "://" in path and not path.startswith("file://"):
        return path
    place = Path(path.removeprefix("file://"))
    while not os.path.exists(place) and place.parent != place:
        place = place.parent
    if not os.path.isdir(place):
        raise StoreError(f"{place} is not a directory", "choose another path")
    return str(place)


# ---- in the job -----------------------------------------------------------------------------------------------------


def main() -> None:
    """Entry point of the job: the request is the last argument; prints the report as one line."""
    import ray

    request = Request.from_json(sys.argv[-1])
    ray.init(log_to_driver=False)  # the job's environment names the cluster
    print(examine(ray, request).to_line(), flush=True)


def examine(ray: Any, request: Request) -> Report:
    """Looks at the paths from here and, for those that workers use, from every live node."""
    problems: list[Problem] = []
    notes: list[str] = []
    tokens: dict[str, tuple[str, str]] = {}
    for p in (p for p in request.paths if p.role == "output"):
        try:
            root, token = writable_root(p.path), temp_name()
            open_store(root).put(token, b"")
            tokens[p.path] = (root, token)
        except StoreError as e:
            problems.append(Problem(f"{p.flag} {p.path}: not writable on the head node: {e.message}", e.hint))
    try:
        here = look("the head node", request.paths, tokens)
        problems += here.problems
        views = _node_views(ray, [p for p in request.paths if p.workers], tokens, problems)
    finally:
        for root, token in tokens.values():
            with suppress(Exl2RayError):
                open_store(root).delete(token)
    for where, view in views.items():
        known = {p.message for p in here.problems}  # what is missing on the head node need not be said for every node
        problems += [p for p in view.problems if p.message.replace(where, "the head node") not in known]
        problems += _differences(where, view, here)
    if request.witness is not None and not os.path.exists(request.witness):
        where = os.path.dirname(request.witness)
        notes.append(f"{where} on the cluster is another directory than here: results will be there, not on this machine")
    gpus = int(ray.cluster_resources().get("GPU", 0))
    return Report(tuple(problems), tuple(notes), len(views), gpus, here.versions, here.models)


def _node_views(
    ray: Any, paths: list[SharedPath], tokens: Mapping[str, tuple[str, str]], problems: list[Problem]
) -> dict[str, NodeView]:
    """What each live node sees, by its name; appends to ``problems`` for those that do not answer."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=0)(look)
    refs = {}
    for node in ray.nodes():
        if node["Alive"]:
            where = f"node {node['NodeManagerHostname']} ({node['NodeID'][:8]})"
            strategy = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            refs[task.options(scheduling_strategy=strategy).remote(where, paths, tokens)] = where
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=NODE_SECONDS)
    views = {}
    for ref, where in refs.items():
        if ref not in ready:
            message = f"{where} did not answer within {NODE_SECONDS:g} s"
            problems.append(Problem(message, "is it overloaded? see `ray status`"))
            continue
        try:
            views[where] = ray.get(ref)
        except ray.exceptions.RayError as e:
            text = str(e).strip().splitlines()[-1][:300]
            problems.append(Problem(f"{where}: {text}", "exl2ray must be installed on every node, or shipped: --working-dir"))
    return views


def _differences(where: str, view: NodeView, head: NodeView) -> list[Problem]:
    """Software and models that are not the head node's."""
    out = []
    for name, version in view.versions.items():
        if head.versions.get(name) != version:
            message = f"{name} is {version} on {where} and {head.versions.get(name, 'missing')} on the head node"
            out.append(Problem(message, "use one image or environment on every node"))
    for path, digest in view.models.items():
        if path in head.models and head.models[path] != digest:
            out.append(Problem(f"-i {path}: other files on {where} than on the head node", SHARED_HINT))
    return out
