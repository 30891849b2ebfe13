"""The process that starts a private Ray, beside the driver, which looks at its job meanwhile and connects to it later.

    driver -- options as its argument, the token in its environment --> head: ray.init
           <-- one line of JSON: an address, or why there is none ----

Most of the start of workers is waiting for Ray's own processes (docs/log.md, 2026-11-29). A thread of the driver cannot
wait for them: Ray wants a working directory, an environment and signal handlers of its own, and they belong to a process.
Here it has them, in a session that no Ctrl-C reaches. It ends with the driver, however that ends, and the kernel ends Ray's
processes with it. What a conversion does not use is not started: the autoscaler's monitor, the reader of logs and the server
of the dashboard, three of Ray's seven processes. Those of workers exist from the beginning, and import torch when they are
born.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

from exl2ray.driver import private
from exl2ray.errors import ClusterError

PRELOADED = ["exl2ray.team.worker"]  # what a worker imports at its birth: torch and numba are among it
_UNUSED = ("start_monitor", "start_log_monitor", "start_api_server")  # methods of Ray's node


class Head:
    """The process as its driver sees it. ``options``: for ray.init, JSON types. ``folder``: a trusted one to run in."""

    def __init__(self, options: Mapping[str, Any], environment: Mapping[str, str], folder: str) -> None:
        # As Ray does for a worker that claims one processor; but torch is imported before anything is claimed.
        # Ray gives its first process 30 s to answer: not enough on a machine that is busy with other things.
        own = {"OMP_NUM_THREADS": "1", "RAY_gcs_server_port_wait_time_s": "120"}
        env = {**own, **environment, "PYTHONPATH": _python_path(environment, folder)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(options)], cwd=folder, env=env, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip

    def address(self, name: str, hint: str) -> str:
        """Waits for Ray; host:port. Raises ClusterError; ``name``, ``hint``: for the message, if Ray says what is wrong."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        answer = json.loads(line) if line else {"reason": f"its process ended with status {self._process.wait()}"}
        if "error" in answer:
            raise ClusterError(answer["error"], answer["hint"])
        if "reason" in answer:
            raise cannot_start(name, answer["reason"], hint)
        return str(answer["address"])

    def end(self) -> None:
        """Kills it and what it has started, with all that is being started this moment."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass  # nobody is left
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()


def cannot_start(name: str, reason: str, hint: str) -> ClusterError:
    return ClusterError(f"cannot start or reach Ray at {name!r}: {' '.join(reason.split())[:300]}", hint)


def _python_path(environment: Mapping[str, str], folder: str) -> str:
    """$PYTHONPATH as it is here, for a process that runs elsewhere; and ``folder``, of a checkout that was not installed."""
    here = [os.path.abspath(path) for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    return os.pathsep.join([*here, *([folder] if folder != sys.prefix else [])])


def main() -> None:
    """Starts Ray, says where it is, and stays until the driver has gone."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    try:
        answer = {"address": _start(json.loads(sys.argv[1]))}
    except ClusterError as e:
        answer = {"error": e.lines[0], "hint": e.hint}
    except BaseException as e:  # a node that does not come up is a plain Exception, a stale address SystemExit
        answer = {"reason": f"{type(e).__name__}: {e}"}
    print(json.dumps(answer), file=answers, flush=True)
    threading.Event().wait()


def _start(options: dict[str, Any]) -> str:
    """Starts Ray; the address of its GCS."""
    import ray

    private.refuse_old(ray)
    _leave_out_what_is_unused()
    with private.on_loopback():
        ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR, **options)
    address = str(ray.get_runtime_context().gcs_address)
    private.refuse_open(address)
    return address


def _leave_out_what_is_unused() -> None:
    """A version of Ray without one of these methods starts it as it likes."""
    from ray._private.node import Node

    for name in _UNUSED:
        if hasattr(Node, name):
            setattr(Node, name, lambda *args, **kwargs: None)


def _end_with_the_driver() -> NoReturn:
    """When the driver has gone, its end of the pipe is closed."""
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    main()
