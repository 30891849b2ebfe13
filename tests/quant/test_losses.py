"""Losses that the solver leaves behind: equal to the traces they stand for, whatever the batches and parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quant_helpers import hessian, load, measured, states, weights

from exl2ray.model.blocks import check_states
from exl2ray.quality import Settings
from exl2ray.quant.hessian import prepare, round_to_nearest
from exl2ray.quant.measure import PIECES, LossTable, piece_rows, shape_option, squared_error
from exl2ray.quant.qparams import mlp_options, parse, unique
from exl2ray.quant.rows import reference_pass
from exl2ray.quant.solve import Problem, solve_options, solve_problems


@pytest.mark.parametrize("k", [96, 608])  # one panel, two
def test_losses_are_the_trace_of_the_error(k: int) -> None:
    h, ws = hessian(k, 3, tokens=2 * k), [weights(k, 32, 1), weights(k, 64, 2)]
    factor = prepare(h)
    layouts = [parse(t).layout(k) for t in ("1:3b_32g", "1:5b_32g")]
    problems = [Problem(i, layout) for i in (0, 1) for layout in layouts]
    for problem, s in zip(problems, solve_problems(factor, ws, problems), strict=True):
        e = (ws[problem.weight] - s.weight.float()).double()
        damped = h.double() + factor.damping * torch.eye(k)
        assert s.losses.shape == (k // 32,)
        assert float(s.losses.sum()) == pytest.approx(float((e * (damped @ e)).sum()), rel=2e-4)
        assert float(s.energies.sum()) == pytest.approx(float(e.square().sum()), rel=1e-5)
        assert float(squared_error(s, factor)) == pytest.approx(float((e * (h.double() @ e)).sum()), rel=1e-3)
        by_rows = e[factor.perm].square().sum(1).view(-1, 32).sum(1)
        assert torch.allclose(s.energies.double(), by_rows, rtol=1e-4)


def test_without_feedback_the_mean_diagonal_has_to_do() -> None:
    k = 64
    h, w = hessian(k), weights(k, 32)
    factor = round_to_nearest(4 * h.diagonal(), rows=4)
    s = solve_problems(factor, [w], [Problem(0, parse("1:4b_32g").layout(k))])[0]
    energy = float((w - s.weight.float()).double().square().sum())
    assert float(squared_error(s, factor)) == pytest.approx(energy * float(h.diagonal().mean()), rel=1e-4)


def test_table_and_shape() -> None:
    k, n = 2112, 32
    options = [parse(t) for t in ("0.1:3b_64g/0.9:2b_64g", "1:4b_64g", "1:8b_128g")]
    assert shape_option(options) == 1
    assert shape_option(options[:1]) == -1
    factor = prepare(hessian(k, tokens=2 * k))
    solved = solve_options(factor, {"w": weights(k, n)}, {"w": options})["w"]
    table = LossTable()
    table.add("w", options, solved, factor, 1 / 40)
    entry = table.extra()["linears"]["w"]
    expected = {o.desc: float(squared_error(solved[j], factor)) / 40 for j, o in enumerate(options)}
    assert entry["losses"] == pytest.approx(expected, rel=1e-5)
    assert list(entry["losses"]) == sorted(expected)
    rows = piece_rows(k)  # 66 chunks in pieces of three
    assert rows == 96
    assert len(entry["shape"]) == k // rows <= PIECES
    assert sum(entry["shape"]) / len(entry["shape"]) == pytest.approx(1, rel=1e-4)
    chunks = solved[1].losses - factor.damping / 2 * solved[1].energies
    assert entry["shape"][0] == pytest.approx(float(chunks[:3].mean() / chunks.mean()), rel=1e-3)


@pytest.mark.parametrize(("family", "index", "roles"), [("Llama", 2, 3), ("Mixtral", 2, 3), ("Cohere", 1, 7)])
def test_every_role_has_losses_and_a_shape(tiny: Callable[[str], Path], family: str, index: int, roles: int) -> None:
    spec, block = load(tiny(family), index)
    x = states(spec)
    extra = measured(block, x, Settings())[0].extra
    assert len(extra["linears"]) == roles
    for role, entry in extra["linears"].items():
        assert len(entry["shape"]) >= 2, role
        assert min(entry["losses"].values()) > 0, role


def test_losses_of_a_block_are_those_of_its_outputs(tiny: Callable[[str], Path]) -> None:
    """Per token, over the calibration tokens."""
    spec, block = load(tiny("Llama"), 2)
    x = states(spec)
    _, hessians = reference_pass(block, x, Settings(), check_states)
    h = {g: a.h / a.rows for g, a in hessians.items()}
    extra = measured(block, x, Settings())[0].extra
    inputs = []
    block.forward(x, lambda group, n: inputs.append(n) if group == "down" else None)
    down = block.module.linear("down_proj")
    options = unique([row[-1] for row in mlp_options()])[0]
    w = block.weights[down.key]
    solved = solve_options(prepare(h["down"]), {"down": w}, {"down": options})["down"]
    for j, option in enumerate(options):
        error = (inputs[0].double() @ (w - solved[j].weight.float()).double()).square().sum() / len(inputs[0])
        found = extra["linears"]["down_proj"]["losses"][option.desc]
        assert found == pytest.approx(float(error), rel=2e-3), option.desc
