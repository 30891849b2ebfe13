"""Memory-bound steps of the forward passes on half tensors, each one pass over its data.

The kernels are `exl2ray.cuda.elementwise_kernels`, which says what their plain references are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from exl2ray.cuda import elementwise_kernels as kernels
from exl2ray.cuda.launch import launch

MOST_ROWS = 65535  # of a grid in its second dimension


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors: contiguous halves on one GPU."""
    return all(t.is_cuda and t.dtype == torch.float16 and t.is_contiguous() for t in tensors)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, neox: bool) -> Tensor:
    """x (R, T, heads, D) half, cos and sin (T, d / 2) float32 -> rotated x; `RotaryTable.rotate`."""
    out = torch.empty_like(x)
    rows, length, heads, dim = x.shape
    half = cos.shape[1]
    for start in range(0, rows, MOST_ROWS):
        part = slice(start, start + MOST_ROWS)
        launch(
            kernels.rotate, (length, len(x[part])), kernels.THREADS, x[part].view(-1), cos.contiguous(), sin.contiguous(),
            heads, dim, half, kernels.THREADS // half, kernels.THREADS % half, neox, out[part].view(-1),
        )  # fmt: skip
    return out


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up clamped to +-65504, for halves of equal shape; `exl2ray.model.half.gated`."""
    out = torch.empty_like(gate)
    blocks = (gate.numel() + 4 * kernels.THREADS - 1) // (4 * kernels.THREADS)
    launch(kernels.gated_silu, blocks, kernels.THREADS, gate.view(-1), up.view(-1), out.view(-1))
    return out


def residual_errors(x: Tensor, branch: Tensor, target: Tensor) -> Tensor:
    """(R,) float32: ||half(x + branch) - target|| of each row; x, branch, target (R, T, hidden) halves.

    The sum of a NaN is NaN: a broken candidate shows as such.
    """
    rows = x.shape[0]
    partial = torch.empty(rows, kernels.CHUNKS, dtype=torch.float32, device=x.device)
    flat = [t.view(rows, -1) for t in (x, branch, target)]
    launch(kernels.residual_errors, (kernels.CHUNKS, rows), kernels.THREADS, *flat, partial)
    return partial.double().sum(1).sqrt().float()


def distances(x: Tensor, target: Tensor) -> Tensor:
    """(2, R) float32: ||x - target|| and ||target|| of each row; x, target (R, T, hidden) halves. NaN stays NaN."""
    rows = x.shape[0]
    partial = torch.empty(2, rows, kernels.CHUNKS, dtype=torch.float32, device=x.device)
    launch(kernels.distances, (kernels.CHUNKS, rows), kernels.THREADS, x.view(rows, -1), target.view(rows, -1), partial)
    return partial.double().sum(2).sqrt().float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (..., n) half, weight (n,) float32 -> half(x / sqrt(mean(x^2) + eps) * weight); infinities count as +-65504."""
    out = torch.empty_like(x)
    n = x.shape[-1]
    launch(kernels.rms_norm, x.numel() // n, kernels.THREADS, x.view(-1, n), weight, np.float32(eps), out.view(-1, n))
    return out


def plus_behind(missing: Tensor, x: Tensor, other: Tensor, scale: float) -> Tensor:
    """half(missing + (other - x) / scale), clamped to +-65504, for halves of equal shape."""
    out = torch.empty_like(missing)
    blocks = (missing.numel() + 2 * kernels.THREADS - 1) // (2 * kernels.THREADS)
    flat = [t.view(-1) for t in (missing, x, other)]
    launch(kernels.plus_behind, blocks, kernels.THREADS, *flat, np.float32(scale), out.view(-1))
    return out
