"""Copies from a GPU through a small buffer: the same values, whatever their shape, and other threads go on meanwhile."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from exl2ray.team.packed_files import BUFFER_BYTES, HostCopies, recorded

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def test_values_arrive() -> None:
    device = torch.device("cuda")
    tensors = {
        "larger than the buffer": torch.arange(BUFFER_BYTES // 2 + 12345, dtype=torch.int32, device=device),
        "scalar": torch.tensor(2.5, dtype=torch.float16, device=device),
        "empty": torch.empty(0, 8, dtype=torch.float16, device=device),
        "a view": torch.arange(12, device=device).reshape(3, 4).t(),
        "on the host": torch.arange(5),
    }
    found = HostCopies(device).copy(tensors, recorded())
    for name, t in tensors.items():
        assert found[name].device.type == "cpu"
        assert found[name].shape == t.shape
        assert found[name].dtype == t.dtype
        assert torch.equal(found[name], t.cpu()), name


def test_memory_that_was_used_before() -> None:
    device = torch.device("cuda")
    tensors = {name: torch.arange(1000, dtype=torch.uint8, device=device) for name in ("again", "of another size", "new")}
    old = {"again": torch.zeros(1000, dtype=torch.uint8), "of another size": torch.zeros(999, dtype=torch.uint8)}
    found = HostCopies(device).copy(tensors, recorded(), old)
    assert all(torch.equal(found[name], t.cpu()) for name, t in tensors.items())
    assert found["again"] is old["again"]
    assert not old["of another size"].any()


def test_many_small_ones_and_one_that_does_not_fit_beside_them() -> None:
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(5)
    sizes = [1, 3, 63, 64, 65, 1 << 20] * 8 + [BUFFER_BYTES - 100, 7, BUFFER_BYTES + 1, 5]
    made = [torch.randint(0, 256, (n,), dtype=torch.uint8, device=device, generator=generator) for n in sizes]
    tensors = {str(i): t for i, t in enumerate(made)}
    found = HostCopies(device).copy(tensors, recorded())
    assert list(found) == list(tensors)
    assert all(torch.equal(found[name], t.cpu()) for name, t in tensors.items())


def test_kernels_are_launched_meanwhile() -> None:
    device = torch.device("cuda")
    copies = HostCopies(device)
    large = {"t": torch.zeros(1 << 30, dtype=torch.uint8, device=device)}
    small = torch.zeros(16, device=device)
    ready = recorded()
    copies.copy(large, ready)
    thread = threading.Thread(target=copies.copy, args=(large, ready))
    begin = time.perf_counter()
    thread.start()
    longest = 0.0
    while thread.is_alive():
        launch = time.perf_counter()
        small.add_(1)
        longest = max(longest, time.perf_counter() - launch)
    whole = time.perf_counter() - begin
    assert longest < whole / 4, f"a launch took {longest:.3f} s of {whole:.3f} s"
