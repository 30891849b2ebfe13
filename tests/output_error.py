"""The error of a quantised linear on the inputs of its Hessian."""

from __future__ import annotations

from torch import Tensor


def relative_error(h: Tensor, w: Tensor, dq: Tensor) -> float:
    """tr(E^T H E) / tr(W^T H W), E = W - dq; all in natural row order, float64 sums."""
    h, w = h.double(), w.double()
    e = w - dq.double()
    return float((e * (h @ e)).sum() / (w * (h @ w)).sum())
