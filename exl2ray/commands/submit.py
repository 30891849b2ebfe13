"""``exl2ray submit``: a conversion as a Ray job; its state, its output, its end."""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, TextIO

from exl2ray.errors import UsageError
from exl2ray.recipe import SETTINGS
from exl2ray.submit import submission as jobs
from exl2ray.submit.jobs import Cluster, JobState
from exl2ray.terminal.console import aside, clean, json_line, reserved_stdout
from exl2ray.wording import duration

ITEM = re.compile(r"\[[^\]]{1,40}\] \d+/\d+  ")  # a line of `exl2ray.terminal.console.Plain` about an item


def submit(
    command: Sequence[str],
    settings: Mapping[str, Any],
    address: str | None,
    working_dir: str | None,
    no_wait: bool,
    no_check: bool,
    status: str | None,
    logs: str | None,
    stop: str | None,
    as_json: bool,
) -> int:
    """Does the one thing that is asked for; the exit code, which is the job's own once it has ended.

    ``settings``: what the flags of ``command`` say. Raises UsageError, ClusterError, Interrupted.
    """
    if sum(x is not None for x in (status, logs, stop)) + bool(command) != 1:
        raise UsageError(
            "submit does one thing at a time: a command after --, or --status, --logs or --stop with a job's id",
            "as in: exl2ray submit --address http://HEAD:8265 -- convert -i /shared/model -o /shared/jobs",
        )
    if address is None:
        raise UsageError("--address is missing", "give the URL of the head node's dashboard, as http://HEAD:8265")
    with reserved_stdout() if as_json else nullcontext(sys.stdout) as out:
        screen = Screen(out, as_json)
        if command:
            return _submit(screen, command, settings, address, working_dir, not no_wait, not no_check)
        cluster = Cluster(address)
        if status is not None:
            state = cluster.state(status)
            screen.state(state, progress(cluster.log(status)) if state.status == "RUNNING" else "")
            return 0
        if stop is not None:
            screen.state(jobs.stop_job(cluster, stop))
            return 0
        return _follow(screen, cluster, str(logs), wait=not no_wait)


def _submit(
    screen: Screen,
    command: Sequence[str],
    settings: Mapping[str, Any],
    address: str,
    working_dir: str | None,
    wait: bool,
    check: bool,
) -> int:
    recipe = {name: value for name, value in settings.items() if name in SETTINGS}
    jobs.check_settings(command[0], recipe)
    paths = jobs.shared_paths(recipe)
    env = jobs.runtime_env(working_dir)
    if screen.as_json and "--json" not in command:
        command = [*command, "--json"]
    cluster = Cluster(address)
    if check:
        jobs.check_cluster(cluster, paths, env, screen.say)
    job_id = jobs.submit_job(cluster, command, env)
    screen.submitted(cluster, job_id)
    return _follow(screen, cluster, job_id, wait=True) if wait else 0


def _follow(screen: Screen, cluster: Cluster, job_id: str, wait: bool) -> int:
    """The job's output so far or, with ``wait``, to its end."""
    if not wait:
        screen.output(cluster.log(job_id))
        return 0
    state = jobs.follow_job(cluster, job_id, screen.output)
    screen.ended(state)
    return jobs.exit_code(state)


class Screen:
    """Shows the job's output on ``out`` and everything else on standard error; with JSON, all of it as lines on ``out``."""

    def __init__(self, out: TextIO, as_json: bool) -> None:
        self._out, self.as_json = out, as_json
        self._line = ""  # the last line, while it is incomplete

    def say(self, text: str) -> None:
        if self.as_json:
            self._event("note", message=text)
        else:
            aside(text)

    def output(self, text: str) -> None:
        """Text that the job printed. With JSON only its events: Ray and libraries print into the same log."""
        if not self.as_json:
            self._out.write(text)
            self._out.flush()
            return
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if line.startswith('{"event"') and _is_json(line):
                print(line, file=self._out, flush=True)

    def submitted(self, cluster: Cluster, job_id: str) -> None:
        if self.as_json:
            self._event("submitted", id=job_id, address=cluster.address)
            return
        self.say(f"submitted as {job_id}")
        for what, flag in (("state", "--status"), ("output", "--logs"), ("end it", "--stop")):
            self.say(f"  {what + ':':8} {cluster.command(flag, job_id)}")

    def ended(self, state: JobState) -> None:
        if self.as_json:
            self._event("job", **state.__dict__)
        elif state.status == "FAILED":
            code = "" if state.exit_code is None else f" with exit code {state.exit_code}"
            first = "" if state.exit_code is not None else f": {state.message.strip()[:500]}"
            self.say(f"{state.id} failed{code}{first}")
        else:
            self.say(f"{state.id} {state.status.lower()}")

    def state(self, state: JobState, progress: str = "") -> None:
        if self.as_json:
            self._event("job", **state.__dict__, **({"progress": progress} if progress else {}))
            return
        rows = [("job", state.id), ("status", state.status), ("command", _shown(state.command))]
        if state.started is not None:
            rows.append(("started", time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(state.started))))
            rows.append(("for", duration((state.ended or time.time()) - state.started)))
        if state.exit_code is not None:
            rows.append(("exit code", str(state.exit_code)))
        if progress:
            rows.append(("progress", progress))
        for name, value in rows:
            print(clean(f"{name:10} {value}"), file=self._out)

    def _event(self, name: str, **fields: Any) -> None:
        print(json_line({"event": name, **fields}), file=self._out, flush=True)


def progress(log: str) -> str:
    """How far a job is, from what it printed: the last line about an item, with the time left as the job reckons it."""
    for line in reversed(log.splitlines()):
        if ITEM.match(line):
            return line
        if line.startswith('{"event": "item"') and _is_json(line):
            f = json.loads(line)
            eta = f.get("eta_seconds")
            left = f"  ETA {duration(eta)}" if isinstance(eta, (int, float)) and f.get("queue") else ""
            return f"[{f.get('stage')}] {f.get('done')}/{f.get('items')}  {f.get('key')}{left}"
    return ""


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _shown(command: str) -> str:
    """The job's command as one types it."""
    own = shlex.split(jobs.entrypoint([]))
    words = shlex.split(command)
    return shlex.join(["exl2ray", *words[len(own) :]]) if words[: len(own)] == own else command
