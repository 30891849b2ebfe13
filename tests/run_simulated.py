"""Checks of kernels under Numba's CUDA simulator, in a process of its own: the switch must be set before numba loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def pass_under_the_simulator(checks: Path) -> None:
    """All tests of a file pass there, and none is skipped."""
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(checks)]
    env = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
