"""Shared fixtures. Reference data lives beside the checkout and is optional: tests that need it skip with a reason."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from slow_tests import slow_tests

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


# Torch's threads wait for each other in a loop that keeps the processor busy, and that longer than a product of a tiny model
# takes: with more processes than cores it was half of the time of tests that compute. Set before torch is loaded;
# programs that tests start inherit it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Started under nohup or in the background of a script, the suite inherits signals that are ignored, and so would all the
# programs that it starts and stops by them.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# The same examples each time, however long they take: a machine that is busy with other things is no failure, and the suite
# of one commit has one result. `pytest --hypothesis-profile=default` looks for examples that nobody has seen.
settings.register_profile("suite", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the reference's outputs, models and data; not part of the repository."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"reference data not found at {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def architectures(shared_dir: Path) -> dict[str, Any]:
    """What the reference knows of each of its architectures."""
    path = shared_dir / "spec" / "architectures.json"
    if not path.is_file():
        pytest.skip(f"{path} is absent")
    data: dict[str, Any] = json.loads(path.read_text())
    return data


# Whole Ray clusters of several nodes on one machine, with processes killed and stopped at random: minutes each, and
# sensitive to how busy the machine is: every worker that was killed is replaced by a process that imports torch, 5 s on an
# idle machine and half a minute on one with five times as much to do as it has cores. `make test-cluster` runs them,
# `make test` everything else.
CLUSTER_FILES = {"test_chaos.py", "test_faults.py", "test_parallel.py", "test_submit_cluster.py"}
CLUSTER_SECONDS = 1200  # the driver's own deadlines, which these tests are about, are shorter


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist hands files out in the order below


def pytest_runtest_setup(item: pytest.Item) -> None:
    """What torch draws does not depend on which tests this process has run before: that is a matter of who was quicker."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    slow = slow_tests()
    seconds: defaultdict[Path, float] = defaultdict(float)
    for name, took in slow.items():
        seconds[ROOT / name.partition("::")[0]] += took
    for item in items:
        if item.path.name in CLUSTER_FILES:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.timeout(CLUSTER_SECONDS))
        if item.nodeid.partition("[")[0] in slow:
            item.add_marker(pytest.mark.slow)
    if hasattr(config, "workerinput"):  # one of several processes: a long file that comes last is waited for by the others
        sizes = Counter(item.path for item in items)
        items.sort(key=lambda item: (-seconds[item.path], -sizes[item.path]))
