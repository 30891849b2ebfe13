"""Shared fixtures. Reference data lives beside the checkout and is optional: tests that need it skip with a reason."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Folder with the reference's outputs, models and data; not part of the repository."""
    if not (SHARED / "golden").is_dir():
        pytest.skip(f"reference data not found at {SHARED}")
    return SHARED


# Whole Ray clusters of several nodes on one machine, with processes killed and stopped at random: minutes each, and
# sensitive to how busy the machine is. `make test-cluster` runs them, `make test` everything else.
CLUSTER_FILES = {"test_chaos.py", "test_faults.py", "test_parallel.py", "test_submit_cluster.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.name in CLUSTER_FILES:
            item.add_marker(pytest.mark.cluster)
