"""A conversion as a job of a Ray cluster: check its command line here, its paths there, submit it, follow it.

The job's driver is the same ``exl2ray convert`` on the cluster's head node. It finds the cluster by $RAY_ADDRESS, which the
job server sets, and starts its workers there. Ending the submitting program does not end the job.
"""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from exl2ray import __version__
from exl2ray.errors import ClusterError, Exl2RayError, Interrupted, UsageError
from exl2ray.recipe import Recipe
from exl2ray.remote.address import is_remote, parse
from exl2ray.store.fs import temp_name
from exl2ray.store.open import open_store
from exl2ray.submit.jobs import STOP_SECONDS, Cluster, JobState
from exl2ray.submit.preflight import Report, Request, SharedPath, model_digest, writable_root

COMMANDS = ("convert", "measure")
CHECK_SECONDS = 300.0  # for the job that looks at paths; most of it is starting Python on every node
CHECK_PROGRAM = "from exl2ray.submit.preflight import main; main()"
# Of a checkout only the package is shipped: who may talk to the cluster can fetch it, and .env files, tokens and keys may lie
# beside it. Lines of a .gitignore, which is respected besides; the last is the checkout itself.
NOT_SHIPPED = ["/*", "!/exl2ray", "!/pyproject.toml", ".*", "id_*", "*.pem", "*.key", "__pycache__", "!/."]

Say = Callable[[str], None]


@dataclass(frozen=True)
class Path:
    """How a setting of the recipe names a path. ``stores``: may be s3:// or gs://."""

    flag: str
    role: Any  # of SharedPath
    workers: bool
    stores: bool = False


PATHS = {
    "in_dir": Path("-i", "model", workers=True),
    "out_dir": Path("-o", "output", workers=True, stores=True),
    "compile_full": Path("-cf", "output", workers=False),
    "output_measurement": Path("-om", "output", workers=False),
    "cal_dataset": Path("-c", "data", workers=False),
    "measurement": Path("-m", "file", workers=False),
}


def shared_paths(settings: Mapping[str, Any]) -> tuple[SharedPath, ...]:
    """Paths among the settings of a command (fields of ``Recipe``). UsageError for those that no cluster can share."""
    out = []
    for name, kind in PATHS.items():
        value = settings.get(name)
        for path in value if isinstance(value, tuple) else (value,):
            if path is None or (kind.role == "data" and path.startswith("hf://")):  # the driver fetches those
                continue
            if name == "in_dir" and is_remote(path):  # every node opens it by its address
                parse(path)
                continue
            out.append(_shared_path(kind, path))
    return tuple(out)


def _shared_path(kind: Path, path: str) -> SharedPath:
    if "://" in path and not kind.stores:
        raise UsageError(
            f"{kind.flag} {path}: only -i and -o may be in an object store",
            "name a path that every node of the cluster mounts",
        )
    local = path.removeprefix("file://")
    if "://" not in local and not os.path.isabs(local):
        raise UsageError(
            f"{kind.flag} {path}: a relative path is another place on the cluster",
            f"give the absolute path that the cluster's nodes see, as {kind.flag} /shared/{os.path.basename(local)}",
        )
    return SharedPath(kind.flag, path.replace("{bpw}", "bpw").replace("{head}", "head"), kind.role, kind.workers)


def check_settings(command: str, settings: Mapping[str, Any]) -> None:
    """UsageError for a command line that would stop the job at once."""
    if command not in COMMANDS:
        raise UsageError(f"{command} cannot be submitted", f"give one of: {', '.join(COMMANDS)}")
    if settings.get("ray_address") is not None:
        raise UsageError("--ray-address has no place in a submitted command: the job runs on the cluster it is submitted to")
    Recipe(**{**settings, "in_dir": settings.get("in_dir") or ""})


def entrypoint(command: Sequence[str]) -> str:
    """The shell command of the job; ``-m`` prefers a shipped checkout to what is installed."""
    return shlex.join(["python", "-m", "exl2ray.cli", *command])


def runtime_env(working_dir: str | None) -> dict[str, Any]:
    """What the job's processes need beyond the cluster's own environment; UsageError for a wrong ``working_dir``."""
    env: dict[str, Any] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}}
    if working_dir is not None:
        if not os.path.isfile(os.path.join(working_dir, "exl2ray", "__init__.py")):
            raise UsageError(
                f"--working-dir {working_dir}: is not a checkout of exl2ray", "name the folder that holds exl2ray/"
            )
        env.update(working_dir=os.path.abspath(working_dir), excludes=NOT_SHIPPED)
    return env


# ---- looking at the cluster -----------------------------------------------------------------------------------------


def check_cluster(cluster: Cluster, paths: Sequence[SharedPath], env: dict[str, Any], say: Say) -> Report:
    """Has a small job look at the paths on every node. ClusterError naming all problems; ``say`` gets what is odd."""
    job_id = f"exl2ray-check-{secrets.token_hex(6)}"
    with _witness(paths) as witness:
        request = Request(tuple(paths), witness)
        command = shlex.join(["python", "-c", CHECK_PROGRAM, request.to_json()])
        cluster.submit(job_id, command, env, {"exl2ray": __version__})
        try:
            state = cluster.wait(job_id, CHECK_SECONDS)
        except KeyboardInterrupt as e:
            cluster.stop(job_id)
            raise Interrupted("stopped while the cluster was looked at; nothing was submitted") from e
    log = cluster.log(job_id) if state.finished else ""
    report = Report.from_log(log)
    if report is None:
        if not state.finished:
            cluster.stop(job_id)
        raise _no_report(cluster, state, log)
    with suppress(ClusterError):  # only tidiness
        cluster.delete(job_id)
    if report.problems:
        raise _refused(report, paths)
    _compare(report, paths, say)
    return report


@contextmanager
def _witness(paths: Sequence[SharedPath]) -> Iterator[str | None]:
    """Path of a file beside the work directory that the cluster should see if it shares it with this machine.

    None where this machine has no such directory: then there is nothing to compare.
    """
    out = next((p.path for p in paths if p.flag == "-o"), "://")
    if "://" in out:
        yield None
        return
    try:
        root = writable_root(out)
        if root == os.sep:  # this machine knows nothing of the path
            yield None
            return
        store, name = open_store(root), temp_name()
        store.put(name, b"")
    except Exl2RayError:
        yield None
        return
    try:
        yield os.path.join(root, name)
    finally:
        with suppress(Exl2RayError):
            store.delete(name)


def _no_report(cluster: Cluster, state: JobState, log: str) -> ClusterError:
    """Why the check said nothing."""
    if not state.finished:
        return ClusterError(
            f"the cluster at {cluster.address} did not run a small job within {CHECK_SECONDS:g} s (it is {state.status})",
            "is the head node overloaded? see `ray status`; --no-check submits without looking",
        )
    lines = [line for line in (log or state.message).splitlines() if line.strip()]
    last = lines[-1][:300] if lines else state.status
    missing = "No module named 'exl2ray'" in log or "not found" in last
    return ClusterError(
        f"looking at the cluster failed: {last}",
        "install exl2ray in the cluster's image or environment, or ship a checkout with --working-dir"
        if missing
        else f"the whole output: {cluster.command('--logs', state.id)}",
    )


def _refused(report: Report, paths: Sequence[SharedPath]) -> ClusterError:
    """All problems in one error; the hint is about the first."""
    first = report.problems[0]
    hint = next((p.hint for p in report.problems if p.hint), "")
    for p in paths:
        if p.role != "output" and first.message.startswith(f"{p.flag} {p.path}:") and os.path.exists(p.path):
            hint = f"{p.path} exists on this machine only: copy it to a file system that every node of the cluster mounts"
    return ClusterError("the command cannot run on this cluster:", hint, [f"  {p.message}" for p in report.problems])


def _compare(report: Report, paths: Sequence[SharedPath], say: Say) -> None:
    """Says how the cluster differs from this machine, where that does no harm but may surprise."""
    for note in report.notes:
        say(f"warning: {note}")
    theirs = report.versions.get("exl2ray", "")
    if theirs != __version__:
        say(f"warning: exl2ray is {theirs} on the cluster and {__version__} here")
    for p in paths:
        if p.role == "model" and os.path.isdir(p.path) and model_digest(p.path) != report.models.get(p.path):
            say(f"warning: {p.flag} {p.path} holds other files on the cluster than here")
    nodes = "1 node" if report.nodes == 1 else f"{report.nodes} nodes"
    say(f"cluster: {nodes}, {report.gpus} GPUs, exl2ray {theirs}, Ray {report.versions.get('ray', '?')}")


# ---- jobs -----------------------------------------------------------------------------------------------------------


def submit_job(cluster: Cluster, command: Sequence[str], env: dict[str, Any]) -> str:
    """Starts the job; its id."""
    job_id = f"exl2ray-{secrets.token_hex(6)}"
    line = entrypoint(command)
    cluster.submit(job_id, line, env, {"exl2ray": __version__, "command": shlex.join(["exl2ray", *command])})
    return job_id


def follow_job(cluster: Cluster, job_id: str, write: Say) -> JobState:
    """Hands on the job's output until it has finished. Interrupted on Ctrl-C, which leaves the job alone."""
    cluster.state(job_id)  # a wrong id shows here, not as a connection that fails again and again
    try:
        return cluster.follow(job_id, write)
    except KeyboardInterrupt as e:
        raise Interrupted(
            f"detached from {job_id}, which goes on running",
            f"follow it again with: {cluster.command('--logs', job_id)}; stop it with: {cluster.command('--stop', job_id)}",
        ) from e


def stop_job(cluster: Cluster, job_id: str) -> JobState:
    """Asks the job to end, and waits until it has: it finishes what it is writing and releases the work directory."""
    cluster.stop(job_id)
    state = cluster.wait(job_id, STOP_SECONDS + 15)
    if not state.finished:
        message = f"{job_id} did not stop within {STOP_SECONDS + 15} s"
        raise ClusterError(message, "see `ray job list` and the logs of the head node")
    return state


def exit_code(state: JobState) -> int:
    """Exit code that stands for the end of a job: its own if it had one."""
    if state.status == "SUCCEEDED":
        return 0
    if state.status == "STOPPED":
        return Interrupted.exit_code
    return state.exit_code or ClusterError.exit_code
