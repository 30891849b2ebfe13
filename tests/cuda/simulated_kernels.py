"""Every kernel once under the simulator, which runs each GPU thread as a Python thread: the smallest sizes that reach all
branches. Started by test_simulated.py."""

from __future__ import annotations

import kernel_checks as checks
import numpy as np
import pytest
from numba import config
from simulator import take_turns

from exl2ray.cuda import elementwise_kernels, settle
from exl2ray.formats.layout import GroupLayout

take_turns()


def test_the_simulator_is_on() -> None:
    assert config.ENABLE_CUDASIM


@pytest.fixture(params=[32, 128])
def tall(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that are rounded in one launch, and groups that are cut into several."""
    monkeypatch.setattr(settle, "TALL", request.param)


@pytest.mark.usefixtures("tall")
def test_solver() -> None:
    """Two groups of different height and width, two segments."""
    checks.check_feedback("cpu", 96, [32], [GroupLayout((5, 2), (64, 32)), GroupLayout((4, 3), (64, 32))], seed=1)


def test_refinement() -> None:
    """A group that is refined before one that is not; of two segments of one batch the second has more to refine."""
    checks.check_refinement("cpu", 64, 32, [GroupLayout((4, 2), (32, 32)), GroupLayout((5, 3), (32, 32))], seed=7, share=0.95)


@pytest.mark.usefixtures("tall")
def test_descent() -> None:
    """Two groups of different height and width, two segments."""
    checks.check_descent("cpu", 96, 32, [GroupLayout((4, 2), (64, 32)), GroupLayout((5, 3), (64, 32))], seed=8, share=0.95)


def test_round_to_nearest() -> None:
    checks.check_rounding("cpu", 32, 32, GroupLayout((3,), (32,)), seed=2)


def test_very_small_weights() -> None:
    checks.check_small_weights("cpu")


def test_packing() -> None:
    checks.check_packing("cpu", GroupLayout((8, 6, 5, 4, 3, 2), (32,) * 6), 32, seed=3)


def few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise_kernels, "THREADS", 32)
    for name, times in (("T", 1), ("T2", 2), ("T3", 3), ("T4", 4)):
        monkeypatch.setattr(elementwise_kernels, name, np.uint64(32 * times))


@pytest.mark.parametrize(("rotated", "neox"), [(8, True), (4, True), (8, False)])
def test_rotate(rotated: int, neox: bool) -> None:
    checks.check_rotate("cpu", rotated, neox)


def test_gated_silu() -> None:
    checks.check_gated("cpu")


def test_residual_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two blocks of 32 threads per row: with 64 of 256, the simulator takes minutes."""
    monkeypatch.setattr(elementwise_kernels, "CHUNKS", 2)
    few_threads(monkeypatch)
    checks.check_residual_errors("cpu", tokens=10)


def test_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise_kernels, "CHUNKS", 2)
    few_threads(monkeypatch)
    checks.check_distances("cpu", tokens=6)


def test_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    few_threads(monkeypatch)
    checks.check_rms_norm("cpu")
    checks.check_rms_norm("cpu", 224)  # four elements of a thread at a time, and three that are left


def test_plus_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    few_threads(monkeypatch)
    checks.check_plus_behind("cpu")
