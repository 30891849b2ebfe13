"""What of a tuning is kept: what gains on held-out rows, beyond noise, and makes no kind of text worse."""

from __future__ import annotations

import math

import pytest
import torch

from exl2ray.tune import judge

KINDS = ("a",) * 40 + ("b",) * 40


def noisy(a: float, b: float, seed: int = 0) -> torch.Tensor:
    rows = torch.randn(80, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 0.02
    return (1 + rows) * torch.tensor([a] * 40 + [b] * 40, dtype=torch.float64)


def decided(factors: dict[str, tuple[float, float]], seed: int = 1) -> judge.Verdict:
    """What is kept of parts that multiply the divergences of both kinds of text by these factors."""

    def evaluate(parts: frozenset[str]) -> torch.Tensor:
        a, b = (math.prod(factors[p][kind] for p in parts) for kind in (0, 1))
        return noisy(a, 10 * b, seed)

    return judge.decide(noisy(1, 10), list(factors), evaluate, KINDS)


def test_what_gains_is_kept_and_the_rest_is_rolled_back() -> None:
    verdict = decided({"norms": (0.9, 0.9), "attention": (0.6, 0.5), "MLP": (1.1, 1.2), "head": (0.7, 0.7)})
    assert (verdict.kept, verdict.worse) == (("norms", "attention", "head"), ())
    assert verdict.words == "norms, attention and head"
    assert verdict.ratio == pytest.approx(0.9 * 0.7 * math.sqrt(0.6 * 0.5), rel=1e-2)
    assert float(verdict.rows[:40].mean()) == pytest.approx(0.378, rel=2e-2)


def test_a_gain_within_the_noise_is_none() -> None:
    assert decided({"norms": (0.999, 0.9995)}).kept == ()
    assert decided({"norms": (float("nan"), 0.9)}).kept == ()
    assert decided({}).kept == ()


def test_one_row_says_nothing() -> None:
    one, less = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    assert judge.decide(one, ["norms"], lambda parts: less, ("a",)).kept == ()


def test_no_kind_of_text_may_be_worse() -> None:
    verdict = decided({"norms": (0.8, 0.95), "MLP": (0.3, 1.1)})
    assert (verdict.kept, verdict.worse) == (("norms",), ())
    verdict = decided({"norms": (0.9, 1.1), "MLP": (0.3, 1.1)})
    assert (verdict.kept, verdict.ratio, verdict.worse) == ((), 1.0, ("b",))
    assert torch.equal(verdict.rows, noisy(1, 10))
    assert decided({"norms": (0.9, 1.001)}).kept == ("norms",)  # within the noise


def test_a_kind_that_is_only_watched_may_veto_and_counts_for_nothing_else() -> None:
    kinds = tuple(judge.WATCHED + "code" if k == "b" else k for k in KINDS)
    start = noisy(1, 10)
    assert judge.score(noisy(0.8, 10), kinds) == judge.score(noisy(0.8, 3), kinds)
    better = judge.decide(start, ["MLP"], lambda parts: noisy(0.8, 10, 1), kinds)
    assert better.kept == ("MLP",)
    assert better.ratio == pytest.approx(0.8, rel=1e-2)
    spoilt = judge.decide(start, ["MLP"], lambda parts: noisy(0.8, 11, 1), kinds)
    assert (spoilt.kept, spoilt.worse) == ((), (judge.WATCHED + "code",))
    few = ("a",) * 40 + tuple(judge.WATCHED + f"kind {i // 2}" for i in range(40))  # two rows of each kind say little
    before = torch.ones(80, dtype=torch.float64)
    for change, found in ((0.02, (judge.WATCHED + "text",)), (0.005, ()), (-0.1, ())):
        after = torch.tensor([1.03, 0.97] * 20 + [1 + change] * 40, dtype=torch.float64)
        assert judge.worse(before, after, few) == found


def test_a_state_that_makes_no_kind_worse_comes_before_one_that_does() -> None:
    start = noisy(1, 10)
    assert judge.standing(start, noisy(0.9, 9.9, 1), KINDS) < judge.standing(start, noisy(0.2, 11, 1), KINDS)
    assert judge.standing(start, noisy(0.8, 9, 1), KINDS) < judge.standing(start, noisy(0.9, 9.9, 1), KINDS)
    assert judge.standing(start, noisy(float("nan"), 9), KINDS) == (False, math.inf)


@pytest.mark.parametrize(
    ("ratios", "over"),
    [
        ([1.0], False),
        ([1.0, 0.9, 0.95, 0.97, 0.93], False),  # wanders below the start
        ([1.0, 0.9, 0.95, 0.97, 0.98], False),  # three times worse than before
        ([1.0, 1.02, 1.1, 1.19, 1.15, 1.0], False),  # rises, and comes back
        ([1.0, 0.9, 0.92, 0.95, 0.97, 0.98], True),  # learns its text by heart
        ([1.0, 0.9, 1.9], True),  # out of control
        ([1.0, float("inf")], True),
    ],
)
def test_training_ends_where_it_only_makes_things_worse(ratios: list[float], over: bool) -> None:
    assert judge.is_over([math.log(r) for r in ratios]) == over


def test_figures_name_every_kind_and_the_mean_of_those_that_are_counted() -> None:
    rows = torch.tensor([1.0, 2.0, 6.0, 100.0], dtype=torch.float64)
    kinds = ("a", "a", "b", f"{judge.WATCHED}code")
    assert judge.figures(rows, kinds) == {"a": 1.5, "b": 6.0, f"{judge.WATCHED}code": 100.0, judge.MEAN: 3.0}
