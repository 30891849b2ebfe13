"""One packed linear: on the CPU against the plain decoder, and the CUDA kernels under Numba's simulator."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import run_checks as checks
import torch
from run_simulated import pass_under_the_simulator

from exl2ray.errors import FormatError, UsageError
from exl2ray.formats.layout import GroupLayout

MIXED = GroupLayout((8, 6, 5, 4, 3, 2), (32, 64, 32, 96, 32, 64))


@pytest.fixture(autouse=True)
def _nothing_compiled() -> None:
    """torch counts what it compiles of a method, whatever module it is of, and gives up at eight."""
    torch.compiler.reset()


@pytest.mark.slow
def test_kernels_under_the_simulator() -> None:
    pass_under_the_simulator(Path(__file__).with_name("simulated_run.py"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5, 16, 17])
@pytest.mark.parametrize("bias", [True, False])
def test_products_on_the_cpu(dtype: torch.dtype, rows: int, bias: bool) -> None:
    linear, weights = checks.random_linear(MIXED, 96, seed=rows, bias=bias)
    checks.check_product(linear, weights, rows, dtype)


def test_padded_columns_are_cut_off() -> None:
    linear, weights = checks.random_linear(GroupLayout((4,), (64,)), 64, seed=1)
    linear.out_features = 50
    checks.check_product(linear, weights, 3, torch.float32)


def test_unpacked_weights_are_the_loaders() -> None:
    linear, weights = checks.random_linear(MIXED, 96, seed=2)
    assert torch.equal(linear.weight_matrix(torch.float16), torch.from_numpy(weights))


def test_gradients_reach_the_activations() -> None:
    linear, weights = checks.random_linear(MIXED, 32, seed=3)
    x = torch.randn(4, linear.in_features, requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.from_numpy(weights).float().sum(1).expand(4, -1), rtol=1e-4, atol=1e-4)


def test_threads_take_turns() -> None:
    linears = [checks.random_linear(MIXED, 96, seed=s)[0] for s in range(4)]
    x = torch.randn(17, MIXED.in_features)
    alone = [linear(x) for linear in linears]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            assert all(map(torch.equal, pool.map(lambda linear: linear(x), linears), alone))


@pytest.mark.parametrize("rows", [3, 17])
def test_compiled_as_one_graph_with_gradients(rows: int) -> None:
    """``aot_eager`` traces as the default does, and leaves out the C++ compiler."""
    model = torch.nn.Sequential(checks.random_linear(GroupLayout((5, 4), (32, 32)), 64, 7, bias=True)[0], torch.nn.Tanh())
    model.append(checks.random_linear(GroupLayout((3,), (64,)), 32, seed=8)[0])
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    found = []
    for m in (model, compiled):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = m(x)
        y.square().sum().backward()
        found.append((y.detach(), x.grad))
        with torch.inference_mode():
            assert torch.equal(m(x), y)
    assert found[0][1].abs().max() > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_what_stays_on_the_device_is_there_before_a_compiled_graph_runs() -> None:
    """``reduce-overhead`` runs calls on the memory of CUDA graphs from the first one on: nothing they make may stay."""
    linear, _ = checks.random_linear(MIXED, 32, seed=11)
    ready = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., object]:
        ready.append(linear._packed is not None)
        return graph.forward

    x = torch.randn(1, linear.in_features)
    y = torch.compile(linear, backend=backend, fullgraph=True)(x)
    assert ready == [True]
    assert torch.equal(y, linear(x))


@pytest.mark.parametrize("rows", [0, 1, 3, 17])
def test_autocast_strides_and_types_are_those_of_a_plain_linear(rows: int) -> None:
    linear, weights = checks.random_linear(MIXED, 64, seed=12, bias=True)
    plain = torch.nn.Linear(linear.in_features, 64)
    plain.weight.data, plain.bias.data = torch.from_numpy(weights.T).float(), linear.bias.float()
    x = torch.randn(linear.in_features, rows).T.requires_grad_()
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    for context in (contextlib.nullcontext(), torch.autocast("cpu", torch.bfloat16)):
        with context:
            wanted, found = plain(x), [linear(x), linear(x.detach()), compiled(x)]
        for y in found:
            assert y.dtype == wanted.dtype
            torch.testing.assert_close(y, wanted, rtol=2**-6, atol=0.1 if y.dtype == torch.bfloat16 else 1e-2)
    assert linear(x.double()).dtype == torch.float64
    with pytest.raises(UsageError, match="activations on meta"):
        linear(x.to("meta"))


def test_copies_are_apart_and_an_export_is_refused() -> None:
    linear, _ = checks.random_linear(MIXED, 32, seed=5)
    x = torch.randn(17, linear.in_features)
    wanted = linear(x)
    other = copy.deepcopy(linear)
    other.q_weight.zero_()
    for again in (linear, pickle.loads(pickle.dumps(linear))):
        assert torch.equal(torch.compile(again, backend="aot_eager")(x), wanted)
    assert not torch.equal(torch.compile(other, backend="aot_eager")(x), wanted)
    with pytest.raises(Exception, match="cannot be exported"):
        torch.export.export(linear, (x,), strict=False)


def test_state_is_what_the_file_holds() -> None:
    linear, _ = checks.random_linear(MIXED, 32, seed=5, bias=True)
    linear(torch.randn(1, linear.in_features))
    assert list(linear.state_dict()) == ["q_weight", "q_scale", "q_scale_max", "q_groups", "q_invperm", "bias"]
    assert linear.bfloat16().q_scale_max.dtype == linear.float().bias.dtype == torch.float16


def test_groups_that_miss_rows_are_refused() -> None:
    linear, _ = checks.random_linear(MIXED, 32, seed=6)
    linear.q_groups[-1] += 1
    with pytest.raises(FormatError):
        linear(torch.randn(1, linear.in_features))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8, 11, 16, 64])
def test_products_on_a_gpu(dtype: torch.dtype, rows: int) -> None:
    layout = GroupLayout((8, 6, 5, 4, 3, 2), (128, 256, 128, 1024, 512, 64))
    linear, weights = checks.random_linear(layout, 1056, seed=7, bias=True)
    linear.to("cuda")
    first = checks.check_product(linear, np.asarray(weights), rows, dtype, "cuda")
    assert torch.equal(first, checks.check_product(linear, np.asarray(weights), rows, dtype, "cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("rows", [1, 3, 16, 64])
def test_products_on_a_gpu_that_is_not_the_current_one(rows: int) -> None:
    """On both GPUs in one process, and in a thread that did nothing with CUDA before."""
    linear, weights = checks.random_linear(GroupLayout((5, 4, 3), (128, 2048, 64)), 1056, seed=13, bias=True)
    for device in ("cuda:0", "cuda:1", "cuda:0"):
        linear.to(device)
        first = checks.check_product(linear, np.asarray(weights), rows, torch.float16, device)
        with ThreadPoolExecutor(1) as pool:
            again = pool.submit(checks.check_product, linear, np.asarray(weights), rows, torch.float16, device).result()
        assert torch.equal(first, again)
    assert torch.cuda.current_device() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_graphs_recorded_before_larger_products_keep_their_memory(rows: int) -> None:
    small, large = (checks.random_linear(MIXED, n, seed=14)[0].to("cuda") for n in (96, 4096))
    x = torch.randn(rows, MIXED.in_features, device="cuda", dtype=torch.float16)
    wanted = small(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = small(x)
    for _ in range(3):
        large(torch.cat([x, x]))
        held = torch.randn(1 << 20, device="cuda")
        before = held.clone()
        graph.replay()
        torch.testing.assert_close(y, wanted)
        assert torch.equal(held, before)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("rows", [1, 17])
def test_float32_and_autocast_on_a_gpu(rows: int) -> None:
    linear, weights = checks.random_linear(MIXED, 96, seed=15, bias=True)
    linear.to("cuda")
    checks.check_product(linear, weights, rows, torch.float16, "cuda")
    checks.check_product(linear, weights, rows, torch.float32, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert linear(torch.randn(rows, MIXED.in_features, device="cuda")).dtype == torch.bfloat16
