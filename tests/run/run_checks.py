"""Random packed linears, and what every implementation of their products must show."""

from __future__ import annotations

import numpy as np
import torch
from exl2_numpy import dequantize_numpy, pack_linear_numpy

from exl2ray.formats.layout import GroupLayout
from exl2ray.run.linear import Exl2Linear


def random_linear(layout: GroupLayout, columns: int, seed: int, bias: bool = False) -> tuple[Exl2Linear, np.ndarray]:
    """A linear with random integers, scales and permutation, and its weights (K, N) float16 by the plain decoder."""
    rng = np.random.default_rng(seed)
    k, groups = layout.in_features, len(layout.bits)
    widths = np.repeat(layout.bits, layout.rows)
    values = (rng.integers(0, 256, (k, columns)) % (1 << widths)[:, None]).astype(np.uint8)
    packed = pack_linear_numpy(
        "linear", values, rng.integers(1, 17, (groups, columns)), rng.uniform(0.001, 0.1, groups).astype(np.float16),
        rng.permutation(k), layout, rng.standard_normal(columns).astype(np.float16) if bias else None,
    )  # fmt: skip
    return Exl2Linear.from_packed(packed), dequantize_numpy(packed)


def check_product(
    linear: Exl2Linear, weights: np.ndarray, rows: int, dtype: torch.dtype, device: str = "cpu"
) -> torch.Tensor:
    """Within the rounding of the result and that of float16 weights, which few rows do without."""
    x = torch.randn(rows, linear.in_features, generator=torch.Generator().manual_seed(rows)).to(dtype)
    y = linear(x.to(device)).cpu()
    w = torch.from_numpy(weights.astype(np.float64))[:, : linear.out_features]
    exact = x.double() @ w
    if linear.bias is not None:
        exact += linear.bias.cpu().double()[: linear.out_features]
    assert y.dtype == dtype
    assert y.shape == exact.shape
    size = x.double().norm(dim=1, keepdim=True) * w.norm(dim=0)
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + rounding / 4 * size + 1e-6).all()
    return y
