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
