"""An orthogonal matrix for the residual stream, applied without ever being formed.

x -> x R with R = D (Q^T (x) H): random signs D, a Walsh-Hadamard transform H of the largest power of two in the size, and a
random orthogonal matrix Q of the odd factor that is left. Every entry of x R mixes all entries of x, so that no channel of
the residual stream stands out any more (as in QuaRot, Ashkboos et al. 2024). The transform is sums and differences in
float32 in one order, so that for a power of two every device gives the same bits; the product with Q rounds as matrix
products do there.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

METHOD = "hadamard-1"  # a change of what a seed stands for changes the name, which is part of every result's identity
CPU_CHUNK_BYTES, GPU_CHUNK_BYTES = 2 << 20, 64 << 20  # float32 rows transformed at a time; on CPUs they stay in the cache


@dataclass(frozen=True)
class Rotation:
    """R of one size (size, size), from a seed."""

    size: int
    seed: int = 0

    def identity(self) -> dict[str, Any]:
        """What tells one rotation from another, for hashes and measurement.json."""
        return {"method": METHOD, "seed": self.seed}

    def rows(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """(x * scale) R for x (n, size), a new tensor (n, size) on ``device``: float32 inside, rounded once to ``dtype``.

        scale: (size,) float32, or None for ones.
        """
        device = torch.device(device)
        signs, mix = _factors(self.size, self.seed)
        first = (signs if scale is None else signs * scale)[:, None].to(device)
        mix = None if mix is None else mix.to(device)
        x = x.to(device, non_blocking=True)
        out = torch.empty(x.shape, dtype=dtype, device=device)
        step = max(1, (CPU_CHUNK_BYTES if device.type == "cpu" else GPU_CHUNK_BYTES) // (4 * self.size))
        for start in range(0, x.shape[0], step):
            part = x[start : start + step].t()
            turned = torch.empty(part.shape, device=device)  # contiguous, rows of x as columns
            turned.copy_(part).mul_(first)
            _hadamard(turned, _power(self.size))
            if mix is not None:
                turned = (mix @ turned.view(mix.shape[0], -1)).view(turned.shape)
            out[start : start + step] = turned.t()
        return out


def _power(size: int) -> int:
    """The largest power of two that divides ``size``."""
    return size & -size


@cache
def _factors(size: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Signs (size,) float32, scaled so that the transform is orthogonal, and Q (m, m) float32 of the odd factor m > 1."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
    signs *= _power(size) ** -0.5
    odd = size // _power(size)
    if odd == 1:
        return signs, None
    q, r = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
    return signs, (q * r.diagonal().sign()).float()  # uniformly distributed with the signs of R's diagonal


def _hadamard(x: Tensor, size: int) -> None:
    """Unscaled Walsh-Hadamard transform of every run of ``size`` rows of x (rows, n), in place."""
    half = 1
    while half < size:
        pairs = x.view(-1, 2, half, x.shape[1])
        a, b = pairs[:, 0], pairs[:, 1]
        difference = a - b
        a += b
        b.copy_(difference)
        half *= 2
