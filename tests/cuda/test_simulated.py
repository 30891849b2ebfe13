"""The kernels under Numba's CUDA simulator."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_simulated import pass_under_the_simulator


@pytest.mark.slow
def test_kernels_under_the_simulator() -> None:
    pass_under_the_simulator(Path(__file__).with_name("simulated_kernels.py"))
