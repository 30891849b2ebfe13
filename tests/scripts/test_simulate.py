"""The simulation of scaling: bounds that every schedule obeys, and that docs/scaling.md shows what the scripts say."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise

import estimate_costs
import pytest
import simulate
from hypothesis import given, settings
from hypothesis import strategies as st
from observed import Observed
from schedule_costs import Costs, ModelCosts, ModuleCosts
from schedules import SHARES, chains, serial_s, source_modules, step
from sweeps import perplexity_s, sweep

from exl2ray.driver.independent import cut
from exl2ray.quant import rows as group_sums

KINDS = ("measure", "reference", "quantized")


@pytest.fixture(scope="module")
def simulation() -> simulate.Simulation:
    return simulate.Simulation(Costs.load(simulate.COSTS))


def seconds_(low: float = 0.0, high: float = 10.0) -> st.SearchStrategy[float]:
    return st.floats(low, high)


@st.composite
def module_costs(draw: st.DrawFn) -> ModuleCosts:
    inputs = [f"input{i}" for i in range(draw(st.integers(1, 3)))]
    measure = draw(seconds_())
    solve = {i: draw(seconds_()) for i in inputs}
    wide = {i: draw(st.floats(0, 0.5)) * solve[i] for i in inputs if draw(st.booleans())}
    return ModuleCosts(
        load_s=draw(seconds_(0, 2)), sweep_s=draw(seconds_()), hessian_s=draw(seconds_()), measure_s=measure,
        forward_s=draw(seconds_()), forward_hessian_s=draw(seconds_()),
        reported_s=draw(seconds_()), check_s=draw(seconds_()), solve_s=solve, wide_s=wide,
        wide_serial_s={i: s / 3 for i, s in wide.items()},
        hessian_gb={i: draw(seconds_()) for i in inputs}, packed_gb={i: draw(seconds_()) for i in inputs},
        first_measure_s=draw(seconds_(0, 5)), first_quantize_s=draw(seconds_(0, 5)), first_chain_s=draw(seconds_(0, 5)),
        group=draw(st.floats(0.5, 2)),
    )  # fmt: skip


@st.composite
def all_costs(draw: st.DrawFn) -> Costs:
    kinds = {f"kind{i}": draw(module_costs()) for i in range(draw(st.integers(1, 2)))}
    gb = draw(seconds_(0.1)), draw(seconds_(0.1))
    room = draw(seconds_(0, 50))
    model = ModelCosts(draw(st.integers(1, 12)), *gb, draw(st.integers(1, 20)), kinds, draw(seconds_(0, 1)), room)
    rate, times = draw(seconds_(1, 100)), (draw(st.floats(0, 0.1)), draw(st.floats(0, 0.1)))
    sweeps = draw(st.floats(0, 0.1)), draw(st.floats(1, 4))
    return Costs("random", rate, *times, *sweeps, 1.0, 1.0, 1.0, {"m": model})


def run(costs: Costs, kind: str, workers: int) -> float:
    return simulate.predict(costs, "m", kind, workers).seconds


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(all_costs())
def test_one_gpu_takes_the_sum_of_all_modules(kind: str, costs: Costs) -> None:
    assert run(costs, kind, 1) == pytest.approx(serial_s(costs, costs.models["m"], kind))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(all_costs(), st.integers(1, 64))
def test_bounds(kind: str, costs: Costs, workers: int) -> None:
    """N workers are at most N times as fast, and no faster than what must happen one after another."""
    model = costs.models["m"]
    took = run(costs, kind, workers)
    assert took * workers >= serial_s(costs, model, kind) * (1 - 1e-9)
    if kind != "quantized" and workers <= SHARES:
        result = source_modules(costs, model, workers, kind == "measure")
        assert result.seconds >= sum(result.front.values()) * (1 - 1e-9) or workers == 1


@settings(max_examples=60, deadline=None)
@given(all_costs())
def test_larger_groups_are_never_slower_where_sending_is_free(costs: Costs) -> None:
    free = replace(costs, nccl_gb_s=float("inf"), message_s=0.0)
    times = [run(free, "quantized", n) for n in (*range(1, 10), 16, 64)]
    for fewer, more in pairwise(times):
        assert more <= fewer * (1 + 1e-9)
    assert times[7:] == [times[7]] * 4  # a group has eight members at most


def test_enough_is_enough(simulation: simulate.Simulation) -> None:
    for model in simulation.costs.models:
        n = simulation.enough(model, "ladder")
        assert simulation.speed_up(model, "ladder", n) >= simulate.ENOUGH * simulation.speed_up(model, "ladder", 64)
        fewer = max(k for k in simulate.COUNTS if k < n)
        assert simulation.speed_up(model, "ladder", fewer) < simulate.ENOUGH * simulation.speed_up(model, "ladder", 64)


def test_faster_links_help(simulation: simulate.Simulation) -> None:
    model = simulation.costs.models["70B"]
    narrow = replace(simulation.costs, nccl_gb_s=simulation.costs.nccl_gb_s / 10)
    assert chains(simulation.costs, model, 8).seconds < 0.95 * chains(narrow, model, 8).seconds


@pytest.mark.parametrize("kind", ["measure", "reference"])
def test_several_machines_are_faster_than_one(simulation: simulate.Simulation, kind: str) -> None:
    for model in simulation.costs.models:
        one, two, eight = (simulation.speed_up(model, kind, n) for n in (8, 16, 64))
        assert 1.25 * one < two < eight


def stretches_of(model: ModelCosts, size: int, measuring: bool) -> list[range]:
    """Of ``size`` workers."""
    return [*cut([m.enter_s(measuring) + m.rest_s(measuring) for m in model.chain()], size)]


def free_sweeps(costs: Costs, layers: int, room_gb: float) -> tuple[Costs, ModelCosts, ModuleCosts]:
    """A model of MLPs alone whose rows can be shared out evenly, where sending and reading cost nothing."""
    model = costs.models["7B"]
    mlp = replace(model.modules["mlp"], load_s=0.0)
    free = replace(costs, driver_s=0.0, nccl_gb_s=float("inf"), message_s=0.0, sweep_module_s=0.0)
    made = replace(model, layers=layers, modules={"mlp": mlp}, perplexity_s=0.0, quantize_rows=8, room_gb=room_gb)
    return free, made, mlp


def test_prepared_modules_are_not_entered_again(simulation: simulate.Simulation) -> None:
    """With room for all, two GPUs share the reference passes and the work after them, and do nothing else."""
    free, model, mlp = free_sweeps(simulation.costs, 4, 1000.0)
    for workers in (2, 4):
        alone = 4 * (mlp.enter_s(False) + mlp.rest_s(False))
        assert source_modules(free, model, workers, False).seconds == pytest.approx(alone / workers)


def test_without_room_owners_go_through_their_modules_alone(simulation: simulate.Simulation) -> None:
    free, model, mlp = free_sweeps(simulation.costs, 4, 0.0)
    found = sweep(free, model, [range(2), range(2, 4)], False)
    assert found.owners == {}
    assert found.seconds == pytest.approx(2 * mlp.forward_s / 2)
    own = 2 * (mlp.enter_s(False) + mlp.rest_s(False))
    assert source_modules(free, model, 2, False).seconds == pytest.approx(found.seconds + own)


def test_room_bounds_what_is_prepared(simulation: simulate.Simulation) -> None:
    """Of the 70B shape a GPU has room for two layers; partial sums of an MLP of 405B leave it, which ends there."""
    for name, least, most in (("70B", 4, 5), ("405B", 0, 1), ("Mixtral 8x7B", 0, 0)):
        made = simulation.costs.models[name]
        stretches = stretches_of(made, 8, False)
        found = sweep(simulation.costs, made, stretches, False)
        for worker, (start, *_) in enumerate(stretches):
            own = [k for k, w in found.owners.items() if w == worker]
            assert own == list(range(start, start + len(own)))
            assert least <= len(own) <= most, (name, worker)
    model = simulation.costs.models["70B"]
    assert sweep(simulation.costs, model, stretches_of(model, 8, True), True).owners == {}


def test_a_sweep_takes_about_what_was_seen(simulation: simulate.Simulation) -> None:
    """Seconds on H200, 70B shape: 4 layers on two, 8 on four."""
    model = simulation.costs.models["70B"]
    for layers, size, measuring, seen in ((4, 2, True, 0.2), (8, 4, True, 0.64), (4, 2, False, 3.41), (8, 4, False, 3.72)):
        made = replace(model, layers=layers)
        took = sweep(simulation.costs, made, stretches_of(made, size, measuring), measuring).seconds
        assert took == pytest.approx(seen, rel=0.1, abs=0.1)
    for layers, size, seen in ((4, 2, 0.32), (8, 4, 0.39)):
        assert perplexity_s(simulation.costs, replace(model, layers=layers), size) == pytest.approx(seen, rel=0.1)


def test_what_a_sweep_is_worth(simulation: simulate.Simulation) -> None:
    """Two GPUs of one machine measure more than 1.8 times as fast; up to eight, more are faster."""
    for model in simulation.costs.models:
        assert simulation.speed_up(model, "measure", 2) > 1.8
        for kind in ("measure", "reference"):
            ups = [simulation.speed_up(model, kind, n) for n in range(1, 9)]
            assert all(more >= 0.97 * fewer for fewer, more in pairwise(ups)), (model, kind, ups)
            assert ups[1] > 1.7
            assert ups[3] > 3.0


def test_a_ladder_shares_the_gpus_out(simulation: simulate.Simulation) -> None:
    """One bitrate is a chain; three on one GPU take three times as long; on three or six each has a group of its own."""
    costs, model = simulation.costs, simulation.costs.models["70B"]
    bare = replace(model, modules={k: replace(m, first_chain_s=0.0, load_s=0.0) for k, m in model.modules.items()})
    for gpus in (1, 2, 8):
        steps = sum(sum(step(costs, bare, m, gpus).values()) for m in bare.chain())
        assert chains(costs, bare, gpus, 1).seconds == pytest.approx(costs.driver_s + steps)
    for gpus, group in ((1, 1), (3, 1), (6, 2)):
        alone = chains(costs, bare, group).seconds
        assert chains(costs, bare, gpus, 3).seconds == pytest.approx(alone * (3 if gpus == 1 else 1))


def test_costs_take_over_what_was_seen(simulation: simulate.Simulation) -> None:
    """Seconds of a whole module, or of its calls; the rest keeps the estimate."""
    calls = {"mlp": {"enter": (3.0, 1.0), "measure": (None, 7.0)}}
    seen = Observed("a test", 0.5, {"70B": {"measure": calls, "quantized": {"mlp": {"chain": (6.0, 5.0)}}}})
    found = seen.corrected(simulation.costs)
    before, after = simulation.costs.models["70B"].modules, found.models["70B"].modules
    assert found.driver_s == 0.5
    assert after["attention"].measure_s == before["attention"].measure_s
    mlp = after["mlp"]
    assert (mlp.enter_s(True), mlp.measure_s, mlp.first_measure_s) == (pytest.approx(1.0), pytest.approx(7.0), 2.0)
    assert mlp.sweep_s / mlp.hessian_s == pytest.approx(before["mlp"].sweep_s / before["mlp"].hessian_s)
    assert (mlp.enter_s(False) + mlp.reported_s + mlp.rest_s(False)) * mlp.group == pytest.approx(5.0)
    assert mlp.first_chain_s == 1.0


def test_largest_group_is_the_real_one() -> None:
    assert SHARES == group_sums.SHARES


def test_models_of_the_table(simulation: simulate.Simulation) -> None:
    assert list(simulation.costs.models) == ["7B", "70B", "405B", "Mixtral 8x7B"]


def test_estimates_are_current(simulation: simulate.Simulation) -> None:
    value = json.loads(simulate.COSTS.read_text(encoding="utf-8"))
    assert value == json.loads(json.dumps(estimate_costs.estimate()))


def test_docs_are_current(simulation: simulate.Simulation) -> None:
    page = simulate.DOCS.read_text(encoding="utf-8")
    assert simulate.with_table(page, simulation.table()) == page, "run: python scripts/simulate.py --write-docs"
