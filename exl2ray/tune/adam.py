"""Adam (Kingma, Ba 2014) for the tensors of one module, in few launches and without a number that the host must know.

Rates and counts of steps are tensors on the device, so that a recorded step (`exl2ray.tune.recording`) can be replayed with
another rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.optim.adam import adam

BETAS = (0.9, 0.999)
EPSILON = 1e-12  # gradients of single weights may be small
MOMENTS = ("exp_avg", "exp_avg_sq")


class Adam:
    """Moments of named float32 tensors on one device; `step` moves the tensors in place."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = dict(parameters)
        self.moments = {m: {n: torch.zeros_like(p) for n, p in parameters.items()} for m in MOMENTS}
        self.counts = [torch.zeros((), device=p.device) for p in parameters.values()]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], rate: Tensor) -> None:
        """gradients: in the order of the parameters. rate: () float32 on their device."""
        if not self.parameters:
            return
        parameters, given = list(self.parameters.values()), list(gradients)
        first, second = (list(self.moments[m].values()) for m in MOMENTS)
        adam(
            parameters, given, first, second, [], self.counts, fused=True, capturable=rate.is_cuda, amsgrad=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=rate, weight_decay=0.0, eps=EPSILON, maximize=False,
        )  # fmt: skip

    def count(self, steps: int) -> None:
        """Says how many steps the moments come from."""
        for count in self.counts:
            count.fill_(float(steps))
