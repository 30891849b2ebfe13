"""RMSNorm and LayerNorm, with and without a weight offset (architectures 5.6, 5.7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from exl2ray.formats.layout import FLOAT16_MAX
from exl2ray.model.rules import NormKind


class Norm:
    """Normalises the last dimension in float32.

    RMSNorm y = x / sqrt(mean(x^2) + eps) * (w + offset); LayerNorm y = (x - mean) / sqrt(var + eps) * w + b. weight:
    (n,), or (heads, n) for one weight per head. Infinities of a float16 input count as +-65504, as at run time.
    """

    def __init__(self, kind: NormKind, weight: Tensor, eps: float, offset: float = 0.0, bias: Tensor | None = None) -> None:
        self.kind = kind
        self.weight = weight.float() + offset
        self.bias = bias.float() if bias is not None else None
        self.eps = eps

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x (..., n) -> (..., n) in ``dtype``."""
        if x.is_cuda and self.kind == "rms" and self.weight.dim() == 1 and dtype == torch.float16:
            from exl2ray.cuda import elementwise

            if elementwise.usable(x):
                return elementwise.rms_norm(x, self.weight, self.eps)
        y = x.float()
        if x.dtype == torch.float16:
            y = y.clamp_(-FLOAT16_MAX, FLOAT16_MAX)
        size = (x.shape[-1],)
        weight = self.weight if self.weight.dim() == 1 else None
        if self.kind == "rms":
            y = F.rms_norm(y, size, weight, self.eps)
        else:
            y = F.layer_norm(y, size, weight, self.bias if weight is not None else None, self.eps)
        if weight is None:
            y = y * self.weight
            if self.bias is not None:
                y = y + self.bias
        return y.to(dtype)
