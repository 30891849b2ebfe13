"""How the quantiser works: what --quality stands for, settings of quantiser and allocation beyond the plain algorithm, as a
table; and how the numerics of one module are run.

`reference` is GPTQ and an allocation per module, as ExLlamaV2 runs it. The others cost time and no bytes: the files have the
same format and size. Flags of their own override single settings. docs/quality.md has the figures behind the choice. `best`
is `balanced`, tuned in the end; it was four sweeps of coordinate descent in place of two, which came to the same: KL 0.00308
and 0.00301 (+- 0.00017) on a 34 M model at 4.0 bpw, no difference on SmolLM2 (docs/log.md). `--sweeps 4` still does it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Quality = Literal["reference", "balanced", "best"]
ScaleSearch = Literal["error", "feedback"]
Allocated = Literal["module", "linear"]


@dataclass(frozen=True)
class Numerics:
    """Settings that change quantised weights, at the same bits."""

    target_correction: float = 0.0  # strength of corrected targets (`exl2ray.quant.correct`), 0 to 1
    scale_search: ScaleSearch = "error"  # "feedback": also by the loss after feedback (`exl2ray.quant.gptq.refine_codes`)
    sweeps: int = 0  # of coordinate descent over the integers after GPTQ (`exl2ray.cuda.solver`)

    def describe(self) -> str:
        """In words, for people; empty for the plain algorithm."""
        parts = []
        if self.target_correction:
            parts.append(f"targets corrected towards the source model (strength {self.target_correction:g})")
        if self.scale_search == "feedback":
            parts.append("scale codes by error feedback")
        if self.sweeps:
            parts.append(f"{self.sweeps} sweep{'s' * (self.sweeps != 1)} of coordinate descent")
        return ", ".join(parts)


PLAIN = Numerics()
PRESETS: dict[Quality, Numerics] = {
    "reference": PLAIN,
    "balanced": Numerics(0.5, "feedback", 2),
    "best": Numerics(0.5, "feedback", 2),  # and --tune (`exl2ray.recipe`)
}


ALLOCATIONS: dict[Quality, Allocated] = {"reference": "module", "balanced": "linear", "best": "linear"}


def resolve(
    quality: Quality,
    propagate: str,
    target_correction: float | None = None,
    scale_search: ScaleSearch | None = None,
    sweeps: int | None = None,
) -> Numerics:
    """The settings of a preset, with what is given explicitly in their place.

    Targets are corrected only where modules are calibrated on what the quantised ones before them produce.
    """
    given = {"target_correction": target_correction, "scale_search": scale_search, "sweeps": sweeps}
    out = replace(PRESETS[quality], **{k: v for k, v in given.items() if v is not None})  # type: ignore[arg-type]
    return replace(out, target_correction=0.0) if propagate == "reference" else out


DAMPING = 0.12  # of the mean of diag(H); the reference's value


@dataclass(frozen=True)
class Settings:
    """How to run the numerics of one module.

    Results depend on ``damping``, ``all_experts``, ``score_rows`` and ``numerics`` alone, up to rounding. The last are about
    quantising, not measuring.
    """

    damping: float = DAMPING
    batch_rows: int = 4  # calibration rows per forward
    budget_bytes: int | None = None  # working memory of one solver batch
    offload: bool = False  # keep the candidates of a module in host memory, for GPUs that cannot hold them all
    expert_tokens: int | None = None  # tokens of one expert that are scored at once; None: all
    ahead: bool = False  # Hessians of the next linears are factorised while the present ones are solved
    keep_bytes: int = 0  # of what enters second linears, for results that would be computed again
    sums_on_host: bool = False  # partial sums of Hessians wait in host memory, for GPUs that cannot hold several
    all_experts: bool = False  # Hessians of every expert from all tokens; the forward pass stays as routed
    score_rows: int | None = None  # calibration rows on which the option tables are scored; None: all
    numerics: Numerics = PLAIN
