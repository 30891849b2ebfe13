"""Setting up a GPU: what the first module would otherwise wait for.

Handles of cuBLAS and cuSOLVER, their kernels, ours from Numba's cache on disk: seconds of a process's life during which the
first weights can be read and other workers can start. Everything that follows is done once on tensors of a few kilobytes.

Backward passes are set up apart, while modules are measured: a conversion needs them later, and not always.

In a conversion this begins in a thread as soon as torch is there (`exl2ray.beforehand`), and the worker waits for its end.

Meanwhile four threads read weights straight into pinned memory. bf16 is converted on the GPU: `.to(device, dtype)` in one
call would do it on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
import torch.nn.functional as F
from torch import Tensor

from exl2ray.formats.layout import GroupLayout
from exl2ray.quality import PLAIN, Numerics
from exl2ray.quant.hessian import Factor, HessianAccumulator, prepare
from exl2ray.quant.pack import dequantize, pack
from exl2ray.quant.qparams import parse
from exl2ray.quant.solve import quantize_linears, solve_options
from exl2ray.stopping import EXPENDABLE
from exl2ray.timeline import step

ROWS, COLUMNS, TOKENS, HEADS = 256, 64, 64, 4


_begun: list[Future[tuple[str | None, Numerics]]] = []  # at most one: what a thread of this process sets up


def begin_warm_up(device: Callable[[], str | None], numerics: Numerics, compiled: Callable[[], None]) -> None:
    """`warm_up` of the ``device`` found (None: of nothing), in this thread. The next `warm_up` waits for its end, and raises
    what it raised. compiled: waits for processes that compile kernels (`exl2ray.quant.precompiling`)."""
    future: Future[tuple[str | None, Numerics]] = Future()
    _begun[:] = [future]
    try:
        with step("device"):
            found = device()
        if found is None:
            compiled()
        else:
            _run_kernels(torch.device(found), numerics, compiled)
        future.set_result((found, numerics))
    except BaseException as e:
        future.set_exception(e)


def warm_up(device: torch.device, numerics: Numerics = PLAIN) -> None:
    """Runs every kernel once that ``numerics`` need, unless `begin_warm_up` has; nothing on a CPU."""
    with step("wait for the device"):
        done = _begun.pop().result() if _begun else None
    if done != (device.type, numerics):
        _run_kernels(device, numerics)
    elif device.type == "cuda":
        torch.cuda.synchronize(device)  # makes the thread's context that of this thread, too


def begin_gradients(device: torch.device) -> None:
    """Sets up backward passes on a GPU in a thread: the first one of a process takes seconds, whatever it computes. Nothing
    is waited for or raised: whoever comes first does the work, and later ones find it done."""
    if device.type == "cuda":
        threading.Thread(target=_run_backward, args=(device,), name=f"{EXPENDABLE} gradients").start()


def _run_backward(device: torch.device) -> None:
    """What the modules of a backward pass are made of, in the dtypes of `exl2ray.team.runner.Runner.load_for_gradients`."""
    with suppress(RuntimeError), torch.enable_grad():
        x = torch.linspace(-1, 1, TOKENS * ROWS, device=device).view(TOKENS, ROWS).requires_grad_()
        weight = torch.linspace(-1, 1, ROWS * ROWS, device=device).view(ROWS, ROWS).bfloat16()
        n = (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)).bfloat16() @ weight
        attended = torch.softmax(n @ n.T, -1) @ n
        y = x + ((F.silu(attended) * n) @ weight).float()
        p = torch.softmax((y.bfloat16() @ weight).float(), -1)
        torch.autograd.grad(p, [x, n], torch.ones_like(p))
        # The device is not waited for: that would spoil a graph which another thread records (`exl2ray.cuda.small_batches`).


def _run_kernels(device: torch.device, numerics: Numerics, compiled: Callable[[], None] = lambda: None) -> None:
    if device.type != "cuda":
        compiled()
        return
    with step("kernels"):
        try:
            factor = _run_forward(device, numerics)
        except RuntimeError:  # a GPU for one process at a time may be taken by another one
            compiled()
            factor = _run_forward(device, numerics)
        compiled()
        _run_solver(factor, numerics)


def _run_forward(device: torch.device, numerics: Numerics) -> Factor:
    """What Hessians, forward passes and errors need; a Hessian's factor. torch's part in a thread beside ours, which reads
    kernels from the disk."""
    from exl2ray.cuda import elementwise

    x = torch.linspace(-1, 1, TOKENS * ROWS, device=device).view(1, TOKENS, ROWS).half()
    with ThreadPoolExecutor(1, f"{EXPENDABLE} libraries") as beside:
        factor = beside.submit(_run_libraries, x)
        angles = torch.zeros(TOKENS, ROWS // HEADS // 2, device=device)
        n = elementwise.rms_norm(x, torch.ones(ROWS, device=device), 1e-5)
        elementwise.rotate(n.view(1, TOKENS, HEADS, -1), angles, angles, neox=True)
        branch = elementwise.gated_silu(x, n)
        elementwise.residual_errors(x, branch, x)
        elementwise.distances(branch, x)
        if numerics.target_correction:
            elementwise.plus_behind(branch, x, n, 1.0)
        return factor.result()


def _run_libraries(x: Tensor) -> Factor:
    """cuBLAS, cuSOLVER and attention. x: (1, TOKENS, ROWS) float16."""
    torch.matmul(x, _weight(x.device))
    accumulator = HessianAccumulator(ROWS, x.device)
    accumulator.add(x, 1)
    factor = prepare(accumulator.finish(), where="warming up")
    torch.linalg.cholesky_ex(torch.eye(ROWS, dtype=torch.float64, device=x.device))  # for wide inputs
    q = x.view(1, TOKENS, HEADS, -1).transpose(1, 2)
    F.scaled_dot_product_attention(q, q, q, is_causal=True)
    return factor


def _run_solver(factor: Factor, numerics: Numerics) -> None:
    """What solves and packing need."""
    weight = _weight(factor.perm.device)
    solve_options(factor, {"q_proj": weight}, {"q_proj": [parse("1:4b_128g"), parse("0.5:4b_32g/0.5:3b_32g")]})
    layout = GroupLayout((4, 3), (128, 128))
    solved = quantize_linears(factor, {"warm": weight}, {"warm": layout}, numerics=numerics)
    dequantize(pack("warm", solved["warm"]), weight.device)
    torch.cuda.synchronize(weight.device)


def _weight(device: torch.device) -> Tensor:
    return torch.linspace(-1, 1, ROWS * COLUMNS, device=device).view(ROWS, COLUMNS).half()
