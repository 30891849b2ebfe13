"""GPU tests run on bare machines too: what exl2ray's own bounds rule out is patched before numba-cuda is imported."""

from __future__ import annotations

import numpy
import pytest
import torch

if not hasattr(numpy, "row_stack"):  # numba-cuda 0.30 imports it; numpy 2.5 dropped it
    numpy.row_stack = numpy.vstack


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))
