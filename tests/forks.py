"""Processes that start with the program's imports behind them, and no threads: the fork server of multiprocessing."""

from __future__ import annotations

import multiprocessing
import os
import sys
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from unittest.mock import patch


def fork_server(*more: str) -> ForkServerContext:
    """Starts the server if there is none; it has imported `preloaded` and the modules ``more``."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["preloaded", *more])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p)):  # it does not take sys.path over
        forkserver.ensure_running()
    return context
