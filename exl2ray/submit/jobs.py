"""Ray's Jobs API, with errors that say what to do: submit a command, follow its output, ask, stop.

The dashboard of a cluster's head node serves it (port 8265). Only HTTP is spoken, so the submitting machine needs no
access to the cluster's other ports, and its Ray may be of another version than the cluster's.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import logging
import os
import socket
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from exl2ray.errors import ClusterError

CONNECT_SECONDS = 10.0
MOST_BYTES = 1 << 16  # of the first answer; a dashboard's has some hundreds
NO_DASHBOARD = "what answers there is not the dashboard of a Ray cluster with ray[default]"
START_SECONDS = 120.0  # the dashboard answers before the head node can run jobs
RECONNECT_SECONDS = 300.0  # how long a lost connection is tried again before following ends
STOP_SECONDS = 60  # what a job gets to end by itself when it is stopped; Ray's default of 3 s is short for a checkpoint
FINISHED = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclass(frozen=True)
class JobState:
    """``status``: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. ``exit_code``: of the command, once known."""

    id: str
    status: str
    message: str
    command: str
    started: float | None  # seconds since the epoch
    ended: float | None
    exit_code: int | None

    @property
    def finished(self) -> bool:
        return self.status in FINISHED


class Cluster:
    """The job server at ``address``, as http://HEAD:8265. Raises ClusterError where it cannot be used.

    ``client``: a connection that is there already, of Ray's JobSubmissionClient or like it.
    """

    def __init__(self, address: str, client: Any = None) -> None:
        self.address = normalized(address)
        self._client = client
        if client is not None:
            return
        _reach(self.address)
        with self._explained("connect"), _no_address_variables():
            from ray.job_submission import JobSubmissionClient

            logging.getLogger("ray").setLevel(logging.WARNING)  # it announces uploads and closed connections
            self._client = JobSubmissionClient(self.address)

    def submit(self, job_id: str, command: str, runtime_env: dict[str, Any], metadata: dict[str, str]) -> None:
        """Starts a shell command on the head node; waits a while for a cluster that has only just started."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with self._explained("submit"):
                    self._client.submit_job(
                        entrypoint=command, submission_id=job_id, runtime_env=runtime_env, metadata=metadata
                    )
                return
            except ClusterError as e:
                if "No available agent" not in e.message or time.monotonic() > deadline:
                    raise
            time.sleep(2.0)

    def state(self, job_id: str) -> JobState:
        """Raises ClusterError if there is no such job."""
        with self._explained(f"find {job_id}"):
            info = self._client.get_job_info(job_id)
        return JobState(
            id=job_id,
            status=str(getattr(info.status, "value", info.status)),
            message=info.message or "",
            command=info.entrypoint,
            started=info.start_time / 1000 if info.start_time else None,
            ended=info.end_time / 1000 if info.end_time else None,
            exit_code=info.driver_exit_code,
        )

    def log(self, job_id: str) -> str:
        """What the job has printed so far."""
        with self._explained(f"read the output of {job_id}"):
            return str(self._client.get_job_logs(job_id))

    def stop(self, job_id: str) -> bool:
        """Asks a job to end; False if it had ended before."""
        with self._explained(f"stop {job_id}"):
            return bool(self._client.stop_job(job_id))

    def delete(self, job_id: str) -> None:
        """Removes a finished job from the list."""
        with self._explained(f"delete {job_id}"):
            self._client.delete_job(job_id)

    def wait(self, job_id: str, timeout_seconds: float) -> JobState:
        """State of the job when it has finished, or after ``timeout_seconds``."""
        deadline = time.monotonic() + timeout_seconds
        while True:
            state = self.state(job_id)
            if state.finished or time.monotonic() > deadline:
                return state
            time.sleep(0.5)

    def follow(self, job_id: str, write: Callable[[str], None]) -> JobState:
        """Hands the job's output to ``write`` from its beginning, as it appears, until the job has finished.

        A broken connection is made again, and output that was handed on already is left out.
        """
        written = 0
        last_contact = time.monotonic()
        while True:
            before = written
            try:
                written = asyncio.run(self._tail(job_id, written, write))
                state = self.state(job_id)
                if state.finished:
                    return state
                last_contact = time.monotonic()
            except _Broken as e:
                written = e.written
                if written > before:
                    last_contact = time.monotonic()
                self._give_up(job_id, last_contact, e.reason)
            except ClusterError as e:
                self._give_up(job_id, last_contact, e.message)
            time.sleep(1.0)

    def _give_up(self, job_id: str, last_contact: float, reason: str) -> None:
        if time.monotonic() - last_contact > RECONNECT_SECONDS:
            raise ClusterError(
                f"lost the connection to {self.address} while following {job_id}: {reason}",
                f"the job may well be running; follow it again with: {self.command('--logs', job_id)}",
            )

    async def _tail(self, job_id: str, skip: int, write: Callable[[str], None]) -> int:
        """Output until the server closes the connection, without its first ``skip`` characters; characters seen in all."""
        from aiohttp import ClientError  # ray[default] brings it

        seen = 0
        stream = self._client.tail_job_logs(job_id)
        while True:
            try:
                text = await anext(stream)
            except StopAsyncIteration:
                return max(seen, skip)
            except (ClientError, OSError, RuntimeError, asyncio.TimeoutError) as e:
                raise _Broken(max(seen, skip), f"{type(e).__name__}: {e}") from e
            fresh = text[max(0, skip - seen) :]
            seen += len(text)
            if fresh:
                write(fresh)

    def command(self, *arguments: str) -> str:
        """The command line that does something else with a job of this cluster."""
        return " ".join(("exl2ray submit --address", self.address, *arguments))

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """ClusterError for what Ray's client raises: RuntimeError with the server's answer, requests' and import errors, and
        TypeError for an answer that has other fields than this Ray knows.
        """
        from ray.exceptions import RayError

        try:
            yield
        except ImportError as e:
            raise _not_installed(e.name or str(e)) from e
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, RayError) as e:
            text = str(e).strip()
            if isinstance(e, RayError):  # refused; what follows the first line is general advice
                text = text.partition("\n")[0]
            if "ray[default]" in text:
                raise _not_installed("the job client of Ray") from e
            raise ClusterError(f"{self.address}: cannot {action}: {_short(text) or type(e).__name__}", _hint(text)) from e


class _Broken(Exception):
    """The connection ended early, after ``written`` characters of output."""

    def __init__(self, written: int, reason: str) -> None:
        super().__init__(reason)
        self.written, self.reason = written, reason


def normalized(address: str) -> str:
    """The dashboard's URL without a trailing slash; ``HEAD:8265`` means http. ClusterError for other kinds of address."""
    if "://" not in address:
        address = f"http://{address}"
    scheme, _, rest = address.partition("://")
    if "@" in rest.partition("/")[0]:  # not shown: what stands before it may be a password
        raise ClusterError(
            "--address: a user or a password in an address goes nowhere",
            "give http://HEAD:8265; a cluster that asks for a token takes it from RAY_AUTH_TOKEN, with RAY_AUTH_MODE=token",
        )
    if scheme not in ("http", "https") or not rest.strip("/"):
        raise ClusterError(
            f"--address {address}: jobs are submitted to the dashboard of the head node",
            "give its URL, as http://HEAD:8265",
        )
    return address.rstrip("/")


def _reach(address: str) -> None:
    """ClusterError unless a dashboard answers there, soon and in few words: Ray's own client has a limit for neither.

    Refusals (401, 404, ...) and certificates are left to that client, which says more about them.
    """
    found: list[bytes | Exception] = []

    def ask() -> None:
        try:
            with urllib.request.urlopen(f"{address}/api/version", timeout=CONNECT_SECONDS) as response:
                found.append(response.read(MOST_BYTES))
        except (OSError, ValueError, http.client.HTTPException) as e:
            found.append(e)

    asking = threading.Thread(target=ask, name="reach", daemon=True)  # a byte now and then would hold it for ever
    asking.start()
    asking.join(2 * CONNECT_SECONDS)
    answer = found[0] if found else TimeoutError()
    if isinstance(answer, bytes):
        if not _is_dashboard(answer):
            raise ClusterError(f"{address}: no job server answers there", NO_DASHBOARD)
        return
    reason = getattr(answer, "reason", answer)
    if isinstance(answer, urllib.error.HTTPError) or isinstance(reason, ssl.SSLError):
        return
    if isinstance(answer, http.client.HTTPException):
        raise ClusterError(
            f"{address}: no job server answers there",
            f"{NO_DASHBOARD}: its port is 8265; 6379 and 10001 are for Ray itself, 22 is ssh",
        ) from answer
    text = "no answer" if isinstance(reason, (TimeoutError, socket.timeout)) else str(reason)
    raise ClusterError(
        f"{address} cannot be reached: {text}",
        "is Ray's dashboard running there (ray start --head --dashboard-host=0.0.0.0), and its port open to this "
        "machine? kubectl port-forward, ssh -L 8265:localhost:8265 or `ray dashboard` make a tunnel",
    ) from answer


def _is_dashboard(answer: bytes) -> bool:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and "ray_version" in found


@contextmanager
def _no_address_variables() -> Iterator[None]:
    """Ray's client prefers these variables to the address it is given (ray-project/ray#36064); we mean what we say."""
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
    before = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(before)


def _not_installed(what: str) -> ClusterError:
    return ClusterError(f"{what} is not installed here", "pip install 'exl2ray[cluster]', which brings ray[default]")


def _hint(text: str) -> str:
    """What to do about an answer of the server."""
    if "does not exist" in text:
        return "the id is printed on submission; `ray job list` knows the others"
    if "is running on the cluster" in text or "not compatible" in text:
        return "exl2ray needs Ray 2.54 or newer on the cluster, and here"
    if "uthenticat" in text or "status code 401" in text or "status code 403" in text:
        return (
            "this cluster asks for its token: export RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN=... or have a copy of the "
            "~/.ray/auth_token of its head node here"
        )
    if "404" in text or "Expecting value" in text or "ray_version" in text:
        return NO_DASHBOARD
    return ""


def _short(text: str) -> str:
    """The telling lines of a server's answer: it may hold a whole traceback."""
    lines = [line for line in text.splitlines() if line.strip()]
    return (lines[0] if len(lines) < 2 else f"{lines[0][:200]} ... {lines[-1]}")[:400] if lines else ""
