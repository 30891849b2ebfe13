"""Figures of single predictions and their means, against plain float64 formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.evaluate.metrics import Estimate, Quantile, compare, counted_predictions, mean_over_rows, tail


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max()
    return shifted - math.log(np.exp(shifted).sum())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(0.0, 20.0))
def test_single_predictions_follow_their_definitions(seed: int, vocab: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    logits, reference = rng.standard_normal((2, 4, vocab)).astype(np.float32) * (1 + spread)
    targets = rng.integers(0, vocab, 4)
    found = compare(*map(torch.from_numpy, (logits, targets, reference)))
    k = min(5, vocab)
    for i in range(4):
        q, p = log_probabilities(logits[i].astype(np.float64)), log_probabilities(reference[i].astype(np.float64))
        assert float(found["nll"][i]) == pytest.approx(-q[targets[i]], rel=1e-5, abs=1e-4)
        assert float(found["reference_nll"][i]) == pytest.approx(-p[targets[i]], rel=1e-5, abs=1e-4)
        assert float(found["kl"][i]) == pytest.approx(float((np.exp(p) * (p - q)).sum()), rel=1e-4, abs=1e-4)
        assert bool(found["top1"][i]) == (q.argmax() == p.argmax())
        shared = set(np.argsort(-q)[:k].tolist()) & set(np.argsort(-p)[:k].tolist())
        assert float(found["top5"][i]) == pytest.approx(len(shared) / k)


def test_equal_logits_have_no_divergence() -> None:
    logits = torch.randn(3, 7, 50, generator=torch.Generator().manual_seed(1)) * 5
    found = compare(logits, torch.zeros(3, 7, dtype=torch.int64), logits.clone())
    assert float(found["kl"].abs().max()) == 0
    assert float(found["top1"].min()) == float(found["top5"].min()) == 1
    assert torch.equal(found["nll"], found["reference_nll"])


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(1, 30))
def test_standard_error_is_that_of_row_means_when_rows_are_equal(seed: int, rows: int, columns: int) -> None:
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))
    estimate = mean_over_rows(values, torch.ones(rows, columns, dtype=torch.bool))
    means = values.mean(dim=1).numpy()
    assert estimate.value == pytest.approx(float(values.mean()), abs=1e-12)
    assert estimate.standard_error == pytest.approx(means.std(ddof=1) / math.sqrt(rows), abs=1e-12)


def test_only_counted_predictions_enter_the_mean() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [100.0, math.nan, 7.0]])
    estimate = mean_over_rows(values, counted_predictions(2, 4, stride=1))
    assert estimate.value == pytest.approx((1 + 2 + 3 + 7) / 4)
    # Row sums 6 and 7, counts 3 and 1, mean 3.25: residuals -3.75 and 3.75, R / (R - 1) = 2, 4 predictions.
    assert estimate.standard_error == pytest.approx(math.sqrt(2 * 2 * 3.75**2) / 4)


def test_confidence_intervals_cover_the_truth() -> None:
    generator = torch.Generator().manual_seed(7)
    inside = 0
    for _ in range(400):
        rows = torch.randn(40, 1, generator=generator) * 0.5 + 2.0  # rows differ, as texts do
        found = mean_over_rows(rows + torch.randn(40, 20, generator=generator), torch.ones(40, 20, dtype=torch.bool))
        assert found.standard_error is not None
        inside += abs(found.value - 2.0) <= 1.96 * found.standard_error
    assert 0.91 <= inside / 400 <= 0.98


def test_one_row_has_no_standard_error_and_a_huge_nll_no_finite_perplexity() -> None:
    alone = mean_over_rows(torch.ones(1, 5), torch.ones(1, 5, dtype=torch.bool))
    assert alone == Estimate(1.0, None)
    assert alone.exp().value == pytest.approx(math.e)
    assert Estimate(5000.0, 1.0).exp().to_json() == {"value": None, "standard_error": None}
    assert Estimate(math.log(10), 0.01).exp() == Estimate(pytest.approx(10), pytest.approx(0.1))


# ---- the tail ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(2, 60))
def test_quantiles_follow_their_definition(seed: int, rows: int, columns: int) -> None:
    rng = np.random.default_rng(seed)
    values, counted = rng.exponential(size=(rows, columns)), rng.random((rows, columns)) < 0.8
    counted[0, 0] = True
    found = tail(torch.from_numpy(values), torch.from_numpy(counted))
    ordered = np.sort(values[counted])
    for name, share in (("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999)):
        expected = next(v for i, v in enumerate(ordered, 1) if i >= share * len(ordered) - 1e-9)
        assert found[name].value == expected
    assert found["max"] == Quantile(ordered[-1])
    assert (found["p95"].low is None) == (rows == 1)
    again = tail(torch.from_numpy(values), torch.from_numpy(counted))
    assert again == found


def test_intervals_of_quantiles_cover_the_truth() -> None:
    """Rows that differ, as texts do: an interval over single tokens would be far too narrow."""
    rng, inside = np.random.default_rng(2), 0
    truth = np.quantile(rng.exponential(size=(4000, 1)).repeat(50, 1) + rng.exponential(size=(4000, 50)), 0.95)
    for _ in range(100):
        values = rng.exponential(size=(60, 1)) + rng.exponential(size=(60, 50))
        q = tail(torch.from_numpy(values), torch.ones(60, 50, dtype=torch.bool))["p95"]
        assert q.low is not None
        assert q.high is not None
        inside += q.low <= truth <= q.high
    assert 85 <= inside <= 99


def test_rows_without_a_kind_do_not_count_as_rows() -> None:
    """The error of a kind of text that is in two of four rows is that of two rows."""
    values = torch.tensor([[1.0, 2.0], [3.0, 5.0], [9.0, 9.0], [9.0, 9.0]])
    counted = torch.tensor([[True, True], [True, True], [False, False], [False, False]])
    assert mean_over_rows(values, counted) == mean_over_rows(values[:2], counted[:2])
