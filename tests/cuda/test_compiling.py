"""Kernels that are compiled without torch: they are those that are launched, for the types that they are launched with."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from exl2ray.cuda import compiling, launch, packing
from exl2ray.cuda.gpu import CudaGroups
from exl2ray.cuda.solver import Batch, Shape
from exl2ray.formats.layout import GroupLayout
from exl2ray.quality import PRESETS
from exl2ray.quant import warm
from exl2ray.quant.pack import unit_tables


@pytest.mark.parametrize("quality", ["reference", "balanced"])
def test_signatures_are_those_of_launches(quality: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    numerics, cpu = PRESETS[quality], torch.device("cpu")
    found: dict[str, set[tuple[Any, ...]]] = {}
    made = launch.Launch.__init__

    def noted(self: Any, kernel: Any, grid: Any, block: int, *args: Any) -> None:
        function = kernel.py_func
        name = f"{function.__module__.rpartition('.')[2]}.{function.__name__}"
        found.setdefault(name, set()).add(tuple(launch._numba_type(launch._kind_of(a)) for a in args))
        made(self, kernel, grid, block, *args)

    monkeypatch.setattr(launch.Launch, "__init__", noted)
    monkeypatch.setattr(launch.Launch, "__call__", lambda self, stream, *values: None)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda q, k, v, is_causal: q)  # of halves
    warm._run_forward(cpu, numerics)
    for keep in (False, True):
        for feedback in (False, True):
            own = numerics if feedback else PRESETS["reference"]
            Batch(Shape(64, (32, 32), (64,), (2,), feedback, keep, cpu, own), CudaGroups)
    layout = GroupLayout((4, 3), (32, 32))
    bits, words, groups = unit_tables(layout, cpu)
    packed = packing.pack_rows_cuda(torch.zeros(64, 32, dtype=torch.uint8), bits, words, layout.packed_rows)
    packing.dequantize_cuda(packed, torch.ones(2, 32).half(), torch.arange(64), bits, words, groups)
    assert found == {
        name: {compiling.argument_types(name)}
        for name in compiling.needed(numerics.target_correction > 0, numerics.scale_search == "feedback")
    }


def test_every_kernel_is_in_one_share() -> None:
    names = list(compiling.SIGNATURES)
    for cores, most in ((1, 1), (3, 1), (4, 3), (64, 3)):
        for some in (names, names[3:], names[:1], [compiling.SLOWEST], []):
            shares = compiling.shared_out(some, cores)
            assert sorted(n for share in shares for n in share) == sorted(some)
            assert len(shares) <= most
            assert all(shares)


def test_the_cache_is_asked_for_each_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    folder = tmp_path / "cuda_0123"
    folder.mkdir()
    assert not any(map(compiling.cached, compiling.SIGNATURES))
    index = folder / "settle.settle-31.py312.nbi"
    index.touch()
    assert [name for name in compiling.SIGNATURES if compiling.cached(name)] == ["settle.settle"]
    os.utime(index, (1, 1))  # of an earlier version
    assert not compiling.cached("settle.settle")


def test_torch_is_not_imported() -> None:
    program = """
import sys
from exl2ray.cuda import compiling
for name in compiling.SIGNATURES:
    file, kernel = name.split(".")
    compiling.argument_types(name)
    assert hasattr(compiling.import_module(f"exl2ray.cuda.{file}"), kernel)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
