"""The kernels for packed weights under the simulator; started by test_run_linear.py. The checks are those of the CPU's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import run_checks as checks
import torch
from numba import config
from simulator import take_turns

from exl2ray.cuda import run
from exl2ray.cuda.run_kernels import Variant
from exl2ray.formats.layout import GroupLayout

take_turns()


def test_the_simulator_is_on() -> None:
    assert config.ENABLE_CUDASIM


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width(bits: int, dtype: torch.dtype, columns: int) -> None:
    """One width, a group of 32 and one of 64 rows, 32 columns: fewer than a block has; one row, and several."""
    linear, weights = checks.random_linear(GroupLayout((bits, bits), (32, 64)), 32, seed=bits, bias=bits == 5)
    linear.packed().variants = (Variant(1, columns, warps=2), Variant(4, warps=2))
    checks.check_product(linear, weights, 1, dtype)
    if columns == 4:
        checks.check_product(linear, weights, 3, dtype)


@pytest.mark.parametrize(("rows", "blocks"), list(itertools.product((1, 2, 4, 7, 16), (1, 12))))
def test_rows_and_slices(rows: int, blocks: int) -> None:
    """All widths in one linear, K cut into slices that the last block sums up; twice, as counters must be left at zero."""
    linear, weights = checks.random_linear(GroupLayout((8, 6, 5, 4, 3, 2), (32,) * 6), 96, seed=9, bias=True)
    packed = linear.packed()
    packed.variants = (Variant(1, 2, warps=1), Variant(4, warps=1))
    packed.blocks_per_sm = blocks
    first = checks.check_product(linear, weights, rows, torch.float16)
    assert torch.equal(first, checks.check_product(linear, weights, rows, torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_unpacking(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "UNPACK_THREADS", 32)
    linear, weights = checks.random_linear(GroupLayout((8, 6, 5, 4, 3, 2), (32, 64, 32, 32, 32, 64)), 32, seed=4)
    assert torch.equal(linear.weight_matrix(dtype), torch.from_numpy(weights.astype(np.float16)).to(dtype))
