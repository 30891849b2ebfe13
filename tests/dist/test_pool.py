"""Independent items on fake workers, and sweeps of probes: the same results however they are divided."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
from dist_helpers import FakeSession, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from exl2ray.dist import probing
from exl2ray.dist.faults import WorkerOutOfMemory
from exl2ray.dist.items import ItemResult, SensitivityItem
from exl2ray.dist.pool import Pool, Task
from exl2ray.dist.probing import CARRIED_BYTES, ROWS, TOKENS, divide, probe_bytes, probe_rows, sweep, sweep_costs
from exl2ray.dist.runner import Runner
from exl2ray.dist.schedule import Limits, Scheduler
from exl2ray.dist.session import InlineSession, Lost
from exl2ray.errors import ClusterError, NumericError
from exl2ray.planning import module_cost
from exl2ray.progress import Silent
from exl2ray.steps import Job

QUICK = Limits(first=5, floor=0.2, rest=0.01, grace=0.05, patience=0.05)


def item(index: int) -> SensitivityItem:
    return SensitivityItem((index,), (0,), 32, {index: "ab" * 16})


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
        return Lost("killed") if choice.random() < 0.15 else result(args[0].modules[0])

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


# ---- sweeps -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["model", "moe_model"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    source = request.getfixturevalue(request.param)
    with Job(recipe(source, tmp_path_factory.mktemp("job") / "work", allocation="linear"), Silent()) as opened:
        yield opened


def runner_of(job: Job) -> Runner:
    assert isinstance(job.session, InlineSession)
    return Runner(job.session._setup)


def test_sweeps_divided_or_not(job: Job) -> None:
    modules = [m for m in job.spec.modules if m.linears]
    hashes = {m.index: "ab" * 16 for m in modules}
    runner = runner_of(job)
    whole = sweep(runner, SensitivityItem(tuple(hashes), (0, 2), 32, hashes))
    assert set(whole) == {m.profile_key for m in modules}
    for m in modules:
        assert set(whole[m.profile_key]) == {x.role for x in m.linears}
    single: dict[str, Any] = {}
    for index in hashes:
        single.update(sweep(runner, SensitivityItem((index,), (0, 2), 32, hashes)))
    assert single == whole
    smaller = sweep(runner, SensitivityItem(tuple(hashes), (0, 2), 32, hashes, shrink=2))
    for key, roles in whole.items():
        for role, values in roles.items():
            assert smaller[key][role] == pytest.approx(values, rel=1e-3), (key, role)
            assert min(values) > 0


def test_a_model_without_finite_output_is_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing, "divergences", lambda head, x, others: [float("nan")] * len(others))
    with pytest.raises(NumericError, match="has KL nan"):
        sweep(runner_of(job), SensitivityItem((1,), (0,), 32, {1: "ab" * 16}))


@settings(max_examples=30, deadline=None)
@given(workers=st.integers(1, 40), bound=st.sampled_from([1, 20_000, CARRIED_BYTES]), data=st.data())
def test_runs_cover_all_modules_in_order(job: Job, workers: int, bound: int, data: st.DataObject) -> None:
    every = [m for m in job.spec.modules if m.linears]
    modules = [m for m in every if data.draw(st.booleans())] or every[:1]
    costs = {m.index: module_cost(m) for m in job.spec.modules}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("exl2ray.dist.probing.CARRIED_BYTES", bound)
        runs = divide(job.spec, modules, costs, workers, 64)
    assert [i for run in runs for i in run] == [m.index for m in modules]
    assert all(runs)
    assert len(runs) >= min(workers, len(modules)) // 2
    if bound == CARRIED_BYTES:
        assert len(runs) <= max(1, workers)


def test_costs_and_memory(job: Job) -> None:
    spec, costs = job.spec, {m.index: 1.0 for m in job.spec.modules}
    found = sweep_costs(spec, costs)
    first = next(m for m in spec.modules if m.linears)
    assert found[first.index] == len({x.role for x in first.linears}) * (len(spec.modules) - first.index)
    assert found[spec.modules[-1].index] == 1.0
    assert probe_bytes([first], spec, 10) == 4 * 10 * spec.hyper.hidden_size * len({x.role for x in first.linears})
    assert probe_bytes(spec.modules[-1:], spec, 10) == 0


def test_rows_of_probes_are_text() -> None:
    kinds = ["web"] * 5 + ["shuffled", "random", "random", "noise"] + ["code"] * 10
    rows, tokens = probe_rows(kinds, 2048)
    assert len(rows) == ROWS == len(set(rows))
    assert tokens == TOKENS
    assert {kinds[i] for i in rows} == {"web", "code"}
    assert probe_rows(["parquet"] * 3, 128) == ((0, 1, 2), 128)
    assert probe_rows(["random"], 32) == ((0,), 32)
