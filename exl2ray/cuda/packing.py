"""Packing and dequantisation of linears on a GPU (`exl2ray.cuda.packing_kernels`)."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2ray.cuda import packing_kernels as kernels
from exl2ray.cuda.launch import launch

THREADS = 128


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return (columns + THREADS - 1) // THREADS, rows // 32


def pack_rows_cuda(codes: Tensor, bits: Tensor, words: Tensor, packed_rows: int) -> Tensor:
    """GPU form of `exl2ray.quant.pack.pack_rows`; ``bits`` and ``words`` come from `unit_tables`."""
    out = torch.empty(packed_rows, codes.shape[1], dtype=torch.int32, device=codes.device)
    quads = codes.contiguous().view(torch.int32)
    launch(kernels.pack, _grid(*quads.shape), THREADS, quads, bits, words, out)
    return out


def dequantize_cuda(
    q_weight: Tensor, steps: Tensor, perm: Tensor, bits: Tensor, words: Tensor, groups: Tensor
) -> Tensor:
    """GPU form of `exl2ray.quant.pack.dequantize`; ``steps`` (G, N) float16 are the loader's step sizes."""
    out = torch.empty(perm.numel(), q_weight.shape[1], dtype=torch.float16, device=q_weight.device)
    launch(
        kernels.dequantize, _grid(*out.shape), THREADS, q_weight.contiguous(), steps.contiguous(), perm, bits, words, groups,
        out,
    )  # fmt: skip
    return out
