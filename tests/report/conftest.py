"""Work directories made by hand, one of each kind per session."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_helpers import Model, evaluation, html_of, whole_work

BITS = (3.0, 4.5)


@pytest.fixture(autouse=True, scope="session")
def _no_fsync() -> Iterator[None]:
    """Hundreds of records are written; none has to outlive a power failure."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session")
def small_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 layers, two bitrates, tensors of the right shapes. Not to be changed by tests."""
    return whole_work(tmp_path_factory.mktemp("small"), Model(6), BITS, tensors=True)


@pytest.fixture(scope="session")
def moe_work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 layers of 8 experts, evaluated."""
    root = whole_work(tmp_path_factory.mktemp("moe"), Model(4, experts=8), BITS)
    (root / "evaluation.json").write_text(json.dumps(evaluation(BITS)))
    return root


@pytest.fixture(scope="session")
def small_html(small_work: Path) -> str:
    return html_of(small_work)


@pytest.fixture(scope="session")
def moe_html(moe_work: Path) -> str:
    return html_of(moe_work)
