"""Stand-ins for the two ends of a submission: Ray's job client, and Ray on the cluster."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from types import SimpleNamespace
from typing import Any

from exl2ray.submit.jobs import Cluster

ADDRESS = "http://127.0.0.1:8265"


class FakeClient:
    """As much of JobSubmissionClient as is used. ``log``: output of the job; ``breaks``: connections that fail, and after
    how many characters of output.
    """

    def __init__(self, log: str = "", status: str = "SUCCEEDED", exit_code: int | None = 0) -> None:
        self.text, self.status, self.exit_code = log, status, exit_code
        self.breaks: list[tuple[int, Exception]] = []
        self.refusals: list[str] = []  # of submissions, before they succeed
        self.submitted: list[dict[str, Any]] = []
        self.stopped: list[str] = []
        self.deleted: list[str] = []
        self.connections = 0
        self.chunk = 7  # characters that arrive at once

    def submit_job(self, **what: Any) -> str:
        if self.refusals:
            raise RuntimeError(f"Request failed with status code 500: {self.refusals.pop(0)}.")
        self.submitted.append(what)
        return str(what["submission_id"])

    def get_job_info(self, job_id: str) -> Any:
        if not job_id.startswith("exl2ray-"):
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return SimpleNamespace(
            status=SimpleNamespace(value=self.status),
            message="said the server",
            entrypoint="python -m exl2ray.cli convert -o /w",
            start_time=1000,  # milliseconds
            end_time=3500,
            driver_exit_code=self.exit_code,
        )

    def get_job_logs(self, job_id: str) -> str:
        return self.text

    def stop_job(self, job_id: str) -> bool:
        self.stopped.append(job_id)
        self.status = "STOPPED"
        return True

    def delete_job(self, job_id: str) -> bool:
        self.deleted.append(job_id)
        return True

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.connections += 1
        end, error = self.breaks.pop(0) if self.breaks else (len(self.text), None)
        for i in range(0, end, self.chunk):
            yield self.text[i : min(end, i + self.chunk)]
        if error is not None:
            raise error


def node_id(name: str) -> str:
    """28 bytes in hexadecimal: Ray checks the form."""
    return name.encode().hex().ljust(56, "0")


class FakeRay:
    """Ray as ``preflight.examine`` uses it, with tasks that run here. ``nodes_of``: node name -> what runs there in place of
    the task (None: the task itself).
    """

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, nodes_of: Mapping[str, Callable[..., Any] | None], gpus: float = 0.0) -> None:
        self._nodes = dict(nodes_of)
        self._gpus = gpus
        self.silent: set[str] = set()  # nodes whose task never ends

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": node_id(n), "NodeManagerHostname": n, "Alive": n != "dead"} for n in self._nodes]

    def remote(self, **options: Any) -> Callable[[Any], Any]:
        def decorate(function: Any) -> Any:
            return SimpleNamespace(options=lambda scheduling_strategy: _Task(self, function, scheduling_strategy.node_id))

        return decorate

    def wait(self, refs: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        ready = [r for r in refs if r.node not in self.silent]
        return ready, [r for r in refs if r.node in self.silent]

    def get(self, ref: Any) -> Any:
        if isinstance(ref.value, Exception):
            raise ref.value
        return ref.value

    def cluster_resources(self) -> dict[str, float]:
        return {"GPU": self._gpus} if self._gpus else {}


class _Task:
    def __init__(self, ray: FakeRay, function: Any, node: str) -> None:
        self._ray, self._function = ray, function
        self._node = next(n for n in ray._nodes if node_id(n) == node)

    def remote(self, *args: Any) -> Any:
        instead = self._ray._nodes[self._node]
        try:
            value = (instead or self._function)(*args)
        except Exception as e:
            value = e
        return _Ref(self._node, value)


class _Ref:
    def __init__(self, node: str, value: Any) -> None:
        self.node, self.value = node, value


def cluster(client: FakeClient) -> Cluster:
    return Cluster(ADDRESS, client)
