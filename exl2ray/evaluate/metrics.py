"""Figures of merit from logits: negative log-likelihood, KL divergence, agreement of the most probable tokens.

For each predicted token, with model distribution q and reference distribution p over the vocabulary:

* nll = -ln q(actual token); perplexity is exp of its mean over all predictions,
* kl = KL(p || q) = sum_v p(v) (ln p(v) - ln q(v)), in nats,
* top1: whether both have the same most probable token,
* top5: share of p's five most probable tokens that are among q's five.

A mean hides the few tokens at which a model goes astray, so the tail of KL has figures of its own: percentiles (the least
value that this share of predictions does not exceed) and the maximum.

Softmax runs in float32, sums over predictions in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from exl2ray.errors import NumericError
from exl2ray.evaluate.forward import LOGITS_AT_ONCE, ModelOutput, logit_batches

TOP = 5


@dataclass(frozen=True, eq=False)
class Scores:
    """Figures of every prediction, (R, T - 1) float64 on the CPU; entry (r, t) is about token t + 1 of row r.

    All but ``nll`` are None without a reference.
    """

    nll: Tensor
    reference_nll: Tensor | None = None
    kl: Tensor | None = None
    top1: Tensor | None = None
    top5: Tensor | None = None


@dataclass(frozen=True)
class Estimate:
    """A mean over predictions. standard_error: over rows, which are independent texts; None for a single row."""

    value: float
    standard_error: float | None

    def exp(self) -> Estimate:
        """exp of the value (a perplexity from a mean nll), the error to first order; infinite beyond float64."""
        value = math.exp(self.value) if self.value < 709 else math.inf
        return Estimate(value, None if self.standard_error is None else value * self.standard_error)

    def to_json(self) -> dict[str, Any]:
        """Value and standard error; null where they are infinite or unknown."""
        error = self.standard_error
        return {
            "value": self.value if math.isfinite(self.value) else None,
            "standard_error": error if error is not None and math.isfinite(error) else None,
        }


@dataclass(frozen=True)
class Quantile:
    """A quantile of single predictions. low, high: its 95 % interval over rows; None where rows are too few to tell."""

    value: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high}


TAIL = {"p95": 0.95, "p99": 0.99, "p99.9": 0.999, "max": 1.0}
RESAMPLED = 200  # times, for intervals


def tail(values: Tensor, counted: Tensor) -> dict[str, Quantile]:
    """Quantiles of ``values`` (R, P) where ``counted`` (R, P) bool, by the names of ``TAIL``.

    Intervals are of a bootstrap that draws whole rows, since the tokens of a text depend on each other; drawn by a seed, so
    that they are the same every time. The maximum has none: no resampling exceeds it.
    """
    rows, _ = counted.nonzero(as_tuple=True)
    flat = values[counted].double().numpy()
    order = np.argsort(flat, kind="stable")
    flat, owners, count = flat[order], rows.numpy()[order], len(counted)

    def quantiles(weights: np.ndarray[Any, np.dtype[Any]]) -> list[float]:
        below = np.cumsum(weights)
        return [float(flat[np.searchsorted(below, share * below[-1])]) for share in TAIL.values()]

    found = quantiles(np.ones(len(flat)))
    random = np.random.default_rng(0)
    drawn = [random.multinomial(count, np.full(count, 1 / count))[owners] for _ in range(RESAMPLED if count > 1 else 0)]
    again = np.array([quantiles(weights) for weights in drawn if weights.sum() > 0]).reshape(-1, len(TAIL))
    out = {}
    for i, (name, value) in enumerate(zip(TAIL, found, strict=True)):
        ends = np.percentile(again[:, i], [2.5, 97.5]).tolist() if len(again) and name != "max" else [None, None]
        out[name] = Quantile(value, *ends)
    return out


def mean_over_rows(values: Tensor, counted: Tensor) -> Estimate:
    """Mean of ``values`` (R, P) where ``counted`` (R, P) bool, and its standard error over rows.

    Rows may count different numbers of predictions: the error is that of the ratio of the row sums s_r and counts n_r,
    sqrt(R / (R - 1) * sum_r (s_r - m n_r)^2) / sum_r n_r with m = sum s / sum n (Cochran, Sampling Techniques, 6.4).
    """
    n = counted.sum(dim=1, dtype=torch.float64)
    s = torch.where(counted, values.double(), 0.0).sum(dim=1)
    mean, rows = s.sum() / n.sum(), int((n > 0).sum())
    if rows < 2:
        return Estimate(float(mean), None)
    squares = (s - mean * n).square().sum() * (rows / (rows - 1))
    return Estimate(float(mean), float(squares.sqrt() / n.sum()))


def counted_predictions(rows: int, length: int, stride: int | None) -> Tensor:
    """(R, T - 1) bool: which predictions count. With a stride, windows overlap by T - stride tokens, and every window
    but the first counts its last ``stride`` predictions, so that each token of the text is predicted once."""
    counted = torch.ones(rows, length - 1, dtype=torch.bool)
    if stride is not None:
        counted[1:, : max(0, length - 1 - stride)] = False
    return counted


def score(
    model: ModelOutput,
    reference: ModelOutput | None,
    ids: Tensor,  # (R, T) int64
    logits_at_once: int = LOGITS_AT_ONCE,
) -> Scores:
    """Scores of all next-token predictions within the rows. Raises NumericError for logits that are not finite."""
    rows, length = ids.shape
    names = ("nll",) if reference is None else ("nll", "reference_nll", "kl", "top1", "top5")
    out = {name: torch.empty(rows, length - 1, dtype=torch.float64) for name in names}
    for batch in logit_batches(model, reference, logits_at_once):
        r, p = batch.rows, batch.positions
        where = f"rows {r.start} to {r.stop - 1}, positions {p.start} to {p.stop - 1}"
        _check_logits(batch.logits, f"{model.model.path}: {where}")
        if reference is not None and batch.reference is not None:
            _check_logits(batch.reference, f"{reference.model.path}: {where}")
        targets = ids[r, p.start + 1 : p.stop + 1].to(batch.logits.device)
        for name, values in compare(batch.logits, targets, batch.reference).items():
            out[name][r, p] = values.double().cpu()
    return Scores(**out)


def compare(
    logits: Tensor,  # (..., vocab) float32
    targets: Tensor,  # (...) int64, the tokens that came
    reference: Tensor | None = None,  # (..., vocab) float32
) -> dict[str, Tensor]:
    """Figures of single predictions by name of ``Scores``, (...) each."""
    q = logits.log_softmax(dim=-1)
    out = {"nll": -q.gather(-1, targets[..., None])[..., 0]}
    if reference is None:
        return out
    p = reference.log_softmax(dim=-1)
    out["reference_nll"] = -p.gather(-1, targets[..., None])[..., 0]
    out["kl"] = (p.exp() * (p - q)).sum(dim=-1)
    k = min(TOP, logits.shape[-1])
    ours, theirs = q.topk(k, dim=-1).indices, p.topk(k, dim=-1).indices
    out["top1"] = (q.argmax(dim=-1) == p.argmax(dim=-1)).float()
    out["top5"] = (ours[..., :, None] == theirs[..., None, :]).float().sum(dim=(-1, -2)) / k
    return out


def _check_logits(logits: Tensor, where: str) -> None:
    low, high = torch.stack(logits.aminmax()).tolist()
    if math.isfinite(low) and math.isfinite(high):
        return
    nans, infinities = int(logits.isnan().sum()), int(logits.isinf().sum())
    raise NumericError(
        f"{where}: {nans} of {logits.numel()} logits are NaN and {infinities} infinite",
        "the model or its weights are broken, or its activations exceed float16",
    )
