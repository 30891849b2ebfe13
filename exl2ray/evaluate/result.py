"""What an evaluation found: perplexity, KL divergence, agreement and size of one model directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl2ray.evaluate.metrics import Estimate, Quantile, Scores
from exl2ray.evaluate.sizes import ModelSize


@dataclass(frozen=True)
class KindResult:
    """The figures of one kind of text, as in ``EvalResult``."""

    predictions: int
    nll: Estimate
    kl: Estimate | None
    top1: Estimate | None

    def to_json(self) -> dict[str, Any]:
        figures = {"perplexity": self.nll.exp(), "kl": self.kl, "top1_agreement": self.top1}
        return {"predictions": self.predictions, **{n: None if e is None else e.to_json() for n, e in figures.items()}}


@dataclass(frozen=True)
class EvalResult:
    """One model on one set of rows. Fields with None need a reference.

    nll: mean negative log-likelihood in nats per token. kl: mean KL(reference || model) in nats per token. top1, top5:
    agreement with the reference, see ``metrics``. nll_increase: nll minus the reference's, whose standard error is that
    of the difference per row and so much smaller than either one's. rows, length: of the tokens given; bos: whether
    BOS was put in front of each row. predictions: tokens that count. seconds: of this model's own forward pass and of
    comparing it; reference_seconds: of the reference's forward pass, shared by all models compared with it. positions:
    the figures of every single prediction, if asked for. kl_tail: quantiles of the KL of single predictions. kinds: by kind
    of text, where the rows have kinds.
    """

    model: Path
    reference: Path | None
    rows: int
    length: int
    predictions: int
    bos: bool
    nll: Estimate
    reference_nll: Estimate | None
    nll_increase: Estimate | None
    kl: Estimate | None
    top1: Estimate | None
    top5: Estimate | None
    size: ModelSize
    seconds: float
    reference_seconds: float | None
    warnings: tuple[str, ...] = ()
    positions: Scores | None = field(default=None, repr=False, compare=False)
    kl_tail: Mapping[str, Quantile] = field(default_factory=dict)
    kinds: Mapping[str, KindResult] = field(default_factory=dict)

    @property
    def perplexity(self) -> Estimate:
        return self.nll.exp()

    @property
    def reference_perplexity(self) -> Estimate | None:
        return self.reference_nll.exp() if self.reference_nll is not None else None

    def to_json(self) -> dict[str, Any]:
        """Everything but ``positions``, as JSON values (`results.schema.json`); figures are {"value", "standard_error"} or
        null, quantiles {"value", "low", "high"}."""
        figures = {
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "nll": self.nll,
            "nll_increase": self.nll_increase,
            "kl": self.kl,
            "top1_agreement": self.top1,
            "top5_agreement": self.top5,
        }
        return {
            "model": str(self.model),
            "reference": None if self.reference is None else str(self.reference),
            "rows": self.rows,
            "length": self.length,
            "predictions": self.predictions,
            "bos": self.bos,
            **{name: None if e is None else e.to_json() for name, e in figures.items()},
            "kl_tail": {name: q.to_json() for name, q in self.kl_tail.items()},
            "kinds": {name: k.to_json() for name, k in self.kinds.items()},
            "file_bytes": self.size.file_bytes,
            "linears_bpw": self.size.linears_bpw,
            "head_bpw": self.size.head_bpw,
            "file_bpw": self.size.file_bpw,
            "seconds": self.seconds,
            "reference_seconds": self.reference_seconds,
            "warnings": list(self.warnings),
        }
