"""How the numerics of one module are run."""

from __future__ import annotations

from dataclasses import dataclass

from exl2ray.quality import PLAIN, Numerics

DAMPING = 0.12  # of the mean of diag(H); the reference's value


@dataclass(frozen=True)
class Settings:
    """How to run the numerics of one module.

    Results depend on ``damping``, ``all_experts`` and ``numerics`` alone, up to rounding. The last are about quantising, not
    measuring.
    """

    damping: float = DAMPING
    batch_rows: int = 4  # calibration rows per forward
    budget_bytes: int | None = None  # working memory of one solver batch
    offload: bool = False  # keep the candidates of a module in host memory, for GPUs that cannot hold them all
    expert_tokens: int | None = None  # tokens of one expert that are scored at once; None: all
    sums_on_host: bool = False  # partial sums of Hessians wait in host memory, for GPUs that cannot hold several
    all_experts: bool = False  # Hessians of every expert from all tokens; the forward pass stays as routed
    numerics: Numerics = PLAIN
