"""Independent items on fake workers, and shares of the backward pass: the same results however they are divided."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
from dist_helpers import FakeSession, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.dist.faults import WorkerOutOfMemory
from exl2ray.dist.items import ItemResult, SensitivityItem
from exl2ray.dist.pool import Pool, Task
from exl2ray.dist.probing import ROWS, SHARE_ROWS, TOKENS, backward_pass, deal, sensitivities, share_rows_out
from exl2ray.dist.runner import Runner
from exl2ray.dist.schedule import Limits, Scheduler
from exl2ray.dist.session import InlineSession, Lost
from exl2ray.errors import ClusterError, NumericError
from exl2ray.events import Silent
from exl2ray.steps import Job

QUICK = Limits(first=5, floor=0.2, rest=0.01, grace=0.05, patience=0.05)


def item(index: int) -> SensitivityItem:
    return SensitivityItem({index: (0,)}, 32, "ab" * 16)


def result(index: int) -> ItemResult:
    return ItemResult(f"item {index}", 0.01, "", {})


def pool_of(count: int, done: list[int], **more: Any) -> Pool:
    tasks = [Task("sensitivity", item(i), f"item {i}", 1.0, lambda r, i=i: done.append(i), **more) for i in range(count)]
    return Pool(tasks)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 12), st.integers(1, 5), st.integers(0, 10**6))
def test_every_task_is_done_once_whatever_is_lost(count: int, workers: int, seed: int) -> None:
    choice = random.Random(seed)

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        return Lost("killed") if choice.random() < 0.15 else result(next(iter(args[0].shares)))

    done: list[int] = []
    pool = pool_of(count, done)
    with contextlib.suppress(ClusterError):  # one task lost three workers
        Scheduler(FakeSession(workers, behave, seed), QUICK).run(pool)
        assert pool.done
        assert sorted(done) == list(range(count))
    assert len(set(done)) == len(done)


def test_a_result_that_was_committed_before_the_loss_is_found() -> None:
    done: list[int] = []
    pool = pool_of(1, done, found=lambda: result(0))
    Scheduler(FakeSession(1, lambda worker, method, args: Lost("killed")), QUICK).run(pool)
    assert done == [0]
    assert pool.done


def test_less_at_once_after_running_out_of_memory() -> None:
    seen: list[int] = []

    def behave(worker: int, method: str, args: tuple[Any, ...]) -> Any:
        seen.append(args[0].shrink)
        return WorkerOutOfMemory("no room") if args[0].shrink == 1 else result(0)

    done: list[int] = []
    Scheduler(FakeSession(1, behave), QUICK).run(pool_of(1, done))
    assert done == [0]
    assert 1 == seen[0] < seen[1]


# ---- the backward pass ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["model", "moe_model"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    source = request.getfixturevalue(request.param)
    with Job(recipe(source, tmp_path_factory.mktemp("job") / "work", allocation="linear"), Silent()) as opened:
        yield opened


def runner_of(job: Job) -> Runner:
    assert isinstance(job.session, InlineSession)
    return Runner(job.session._setup)


SHARES = {0: (0, 2), 1: (1,), 2: (3, 4)}


def test_shares_together_or_alone(job: Job) -> None:
    runner = runner_of(job)
    whole = backward_pass(runner, SensitivityItem(SHARES, 32, "ab" * 16))
    alone: dict[int, Any] = {}
    for share, rows in reversed(SHARES.items()):
        alone.update(backward_pass(runner, SensitivityItem({share: rows}, 32, "ab" * 16)))
    assert alone == whole
    found = sensitivities(job.spec, whole, 5 * 32)
    assert list(found) == [m.profile_key for m in job.spec.modules if m.linears]
    for m in job.spec.modules:
        if m.linears:
            assert set(found[m.profile_key]) == {x.role for x in m.linears}
            assert all(min(values) > 0 for values in found[m.profile_key].values())
    smaller = backward_pass(runner, SensitivityItem(SHARES, 32, "ab" * 16, shrink=2))
    for key, roles in sensitivities(job.spec, smaller, 5 * 32).items():
        for role, values in roles.items():
            # one row at a time; random signs at the logits are drawn row by row too
            assert values == pytest.approx(found[key][role], rel=0.5), (key, role)


def test_gradients_that_are_not_finite_are_refused(job: Job) -> None:
    runner = runner_of(job)
    load = runner.load_for_gradients

    def broken(module: Any, coming: Any) -> Any:
        block = load(module, coming)
        if module.kind == "head":
            weight = next(iter(block.weights.values()))
            weight.mul_(float("inf"))
        return block

    runner.load_for_gradients = broken  # type: ignore[method-assign]
    with pytest.raises(NumericError, match="gradients are not finite"):
        backward_pass(runner, SensitivityItem({0: (0,)}, 32, "ab" * 16))


def test_a_role_without_tokens_has_no_sensitivity(job: Job) -> None:
    module = next(m for m in job.spec.modules if m.linears)
    assert set(sensitivities(job.spec, {}, 1)[module.profile_key].values().__iter__().__next__()) == {0.0}


@given(rows=st.integers(1, 40), workers=st.integers(1, 12))
def test_every_share_is_dealt_once(rows: int, workers: int) -> None:
    shares, tokens = share_rows_out(["web"] * rows, 2048)
    assert tokens == TOKENS
    assert [r for share in shares.values() for r in share] == sorted({r for share in shares.values() for r in share})
    hands = deal(shares, workers)
    assert len(hands) == min(workers, len(shares))
    assert sorted(n for hand in hands for n in hand) == list(shares)
    assert {n: r for hand in hands for n, r in hand.items()} == shares
    assert max(map(len, hands)) - min(map(len, hands)) <= 1


def test_rows_of_the_pass_are_text() -> None:
    kinds = ["web"] * 5 + ["shuffled", "random", "random", "noise"] + ["code"] * 20
    shares, tokens = share_rows_out(kinds, 2048)
    rows = [r for share in shares.values() for r in share]
    assert len(rows) == ROWS == len(set(rows))
    assert {len(share) for share in shares.values()} == {SHARE_ROWS}
    assert tokens == TOKENS
    assert {kinds[i] for i in rows} == {"web", "code"}
    assert share_rows_out(["parquet"] * 3, 128) == ({0: (0, 1), 1: (2,)}, 128)
    assert share_rows_out(["random"], 32) == ({0: (0,)}, 32)
