"""Shares of the backward pass: the same results however they are divided."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from team_helpers import recipe

from exl2ray.convert import convert
from exl2ray.driver.workers import InlineWorkers
from exl2ray.errors import NumericError
from exl2ray.events import Silent
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.weights import whole_tensors
from exl2ray.steps import Job
from exl2ray.team import sensitivity
from exl2ray.team.runner import Runner
from exl2ray.team.sensitivity import ROWS, SHARE_ROWS, TOKENS, backward_pass, deal, sensitivities, share_rows_out


@pytest.fixture(scope="module", params=["model", "moe_model"])
def job(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    source = request.getfixturevalue(request.param)
    with Job(recipe(source, tmp_path_factory.mktemp("job") / "work", allocation="linear"), Silent()) as opened:
        yield opened


def runner_of(job: Job) -> Runner:
    assert isinstance(job.workers, InlineWorkers)
    return Runner(job.workers._setup)


SHARES = {0: (0, 2), 1: (1,), 2: (3, 4)}


def test_shares_together_or_alone(job: Job) -> None:
    runner = runner_of(job)
    whole = backward_pass(runner, SHARES, 32)
    alone: dict[int, Any] = {}
    for share, rows in reversed(SHARES.items()):
        alone.update(backward_pass(runner, {share: rows}, 32))
    assert alone == whole
    found = sensitivities(job.spec, whole, 5 * 32)
    assert list(found) == [m.profile_key for m in job.spec.modules if m.linears]
    for m in job.spec.modules:
        if m.linears:
            assert set(found[m.profile_key]) == {x.role for x in m.linears}
            assert all(min(values) > 0 for values in found[m.profile_key].values())
    runner.shrink, runner.in_hand = {"these rows": 2}, "these rows"
    smaller = backward_pass(runner, SHARES, 32)
    for key, roles in sensitivities(job.spec, smaller, 5 * 32).items():
        for role, values in roles.items():
            # one row at a time; random signs at the logits are drawn row by row too
            assert values == pytest.approx(found[key][role], rel=0.5), (key, role)


def test_the_start_of_the_model_is_read_before_another_pass_needs_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After measuring for the backward pass, after that for quantising, and not where nothing follows."""
    begun, expect = [], Runner.expect_the_first

    def counted(runner: Runner) -> None:
        expect(runner)
        begun.append(set(runner.ahead._fetched))

    monkeypatch.setattr(Runner, "expect_the_first", counted)
    convert(recipe(model, tmp_path / "work", allocation="linear"), Silent())
    first = begun[0]
    assert {name for m in load_spec(SourceModel(model)).modules[:3] for name in whole_tensors(m)} == first
    assert begun == [first] * 3, "once for each pass"
    begun.clear()
    measured = {"output_measurement": str(tmp_path / "m.json"), "compile_full": None}
    convert(recipe(model, tmp_path / "other", allocation="linear", **measured), Silent())
    assert begun == [first] * 2
    begun.clear()
    convert(recipe(model, tmp_path / "modules", allocation="module", **measured), Silent())
    assert begun == [first]


@pytest.mark.parametrize("modules", [0, 2, 100])
def test_modules_that_stay_for_the_way_back(job: Job, modules: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each one is read again, but for the last ones that there is room for; what is found is the same."""
    runner = runner_of(job)
    expected, load, read = backward_pass(runner, SHARES, 32), runner.load_for_gradients, []

    def counted(module: Any, coming: Any) -> Any:
        read.append(module.index)
        return load(module, coming)

    sizes = {m.index: 4 * sum(x.in_features * x.out_features for x in m.linears) for m in job.spec.modules}
    last = [m.index for m in job.spec.modules[1:-1]][::-1][:modules]
    monkeypatch.setattr(sensitivity, "_room_for_blocks", lambda runner, nbytes: sum(sizes[i] for i in last))
    runner.load_for_gradients = counted  # type: ignore[method-assign]
    assert backward_pass(runner, SHARES, 32) == expected
    forward = [m.index for m in job.spec.modules[:-1]]
    way_back = [m.index for m in job.spec.modules[:0:-1] if m.index not in last]
    assert [i for i in read if sizes[i]] == [i for i in forward + way_back if sizes[i]]


def test_no_module_stays_after_running_out_of_memory() -> None:
    runner = SimpleNamespace(device=torch.device("cuda"), shrink={"these rows": 4}, in_hand="others")
    runner.room = lambda nbytes: 100 - nbytes
    room = sensitivity._room_for_blocks
    assert room(cast(Runner, runner), 40) == 30
    for changed in ({"in_hand": "these rows"}, {"device": torch.device("cpu")}):
        assert room(cast(Runner, SimpleNamespace(**{**vars(runner), **changed})), 40) == 0


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
        backward_pass(runner, {0: (0,)}, 32)


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
