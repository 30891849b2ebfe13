"""How far a module's output is from the target: what both kinds of modules are scored by."""

from __future__ import annotations

import torch
from torch import Tensor

from exl2ray.formats.layout import FLOAT16_MAX

WORST_ACCURACY = 1e-6


def row_errors(result: Tensor, target: Tensor, norm: Tensor) -> Tensor:
    """Sum over the rows of a batch of ||result - target|| / norm, float64 scalar on the device.

    result, target: (R, T, hidden); norm: (R,) float32 = ||target|| per row.
    """
    if result.dtype == torch.float16:
        result = result.clamp(-FLOAT16_MAX, FLOAT16_MAX)
    total: Tensor = ((result.float() - target.float()).flatten(1).norm(dim=1) / norm).double().sum()
    return total


def accuracy_of(error: float) -> float:
    """1 - error, at least 1e-6; NaN counts as useless."""
    accuracy = 1.0 - error
    return max(WORST_ACCURACY, accuracy) if accuracy == accuracy else WORST_ACCURACY
