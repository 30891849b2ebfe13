"""What a GPU has room for besides the work on one module; shapes of Llama 70B, 2048 tokens per row."""

from __future__ import annotations

import pytest
import torch

from exl2ray.model.spec import LinearSpec, ModuleSpec, Stored
from exl2ray.quant.memory import (
    ahead_bytes,
    context_bytes,
    room_for_contexts,
    room_within,
    settings_within,
    states_fit_within,
    sums_on_host_within,
)

GB = 10**9
HIDDEN, WIDE = 8192, 28672


def module(kind: str, *linears: tuple[str, str, int, int]) -> ModuleSpec:
    made = tuple(LinearSpec(role, role, k, n, group, Stored("", (n, k))) for role, group, k, n in linears)
    return ModuleSpec(0, kind, f"model.layers.0.{kind}", 0, made)  # type: ignore[arg-type]


ATTENTION = module("attention", ("q_proj", "qkv", HIDDEN, HIDDEN), ("k_proj", "qkv", HIDDEN, 1024),
                   ("v_proj", "qkv", HIDDEN, 1024), ("o_proj", "o", HIDDEN, HIDDEN))  # fmt: skip
MLP = module("mlp", ("gate_proj", "gate_up", HIDDEN, WIDE), ("up_proj", "gate_up", HIDDEN, WIDE),
             ("down_proj", "down", WIDE, HIDDEN))  # fmt: skip


def states(rows: int) -> int:
    return rows * 2048 * HIDDEN * 2


@pytest.mark.parametrize("total", [16 * GB, 24 * GB, 80 * GB, 150 * GB])
@pytest.mark.parametrize("rows", [16, 115])
def test_room_and_fitting_states_agree(total: int, rows: int) -> None:
    room = room_within([ATTENTION, MLP], states(rows), 2048, total, False)
    assert states_fit_within([ATTENTION, MLP], states(rows), 2048, total) == (room >= 0)
    assert room < total
    more = room_within([ATTENTION, MLP], states(rows), 2048, total + 10 * GB, False)
    assert more > room


def test_a_large_gpu_prepares_two_layers_of_70b_and_a_small_one_none() -> None:
    layer = context_bytes(ATTENTION, states(115)) + context_bytes(MLP, states(115))
    assert context_bytes(MLP, states(115)) == states(115) + 4 * (HIDDEN**2 + WIDE**2)
    assert 2 * layer < 0.9 * room_within([ATTENTION, MLP], states(115), 2048, int(150.7 * GB), False) < 3 * layer
    assert room_within([ATTENTION, MLP], states(115), 2048, 24 * GB, False) < 0
    assert sums_on_host_within(MLP, 24 * GB)
    assert not sums_on_host_within(MLP, 85 * GB)


def test_a_cpu_has_no_limit() -> None:
    assert room_for_contexts([ATTENTION, MLP], states(115), 2048, torch.device("cpu")) > 1000 * GB


def experts(count: int, hidden: int, width: int) -> ModuleSpec:
    shapes = (("w1", "w13", hidden, width), ("w3", "w13", hidden, width), ("w2", "w2", width, hidden))
    made = [
        LinearSpec(role, f"{role}.{e}", k, n, f"{group}.{e}", Stored("", (n, k)), expert=e)
        for e in range(count)
        for role, group, k, n in shapes
    ]
    return ModuleSpec(0, "moe", "model.layers.0", 0, tuple(made))


def test_states_stay_on_a_gpu_that_has_room_for_quantising_alone() -> None:
    """Mixtral's options fill 150 GB while it is measured, and those of 7B leave no room for four sets of states on 24."""
    square = (("q_proj", "qkv"), ("k_proj", "qkv"), ("v_proj", "qkv"), ("o_proj", "o"))
    small = [
        module("attention", *((role, group, 4096, 4096) for role, group in square)),
        module("mlp", ("gate_proj", "gate_up", 4096, 11008), ("up_proj", "gate_up", 4096, 11008),
               ("down_proj", "down", 11008, 4096)),
    ]  # fmt: skip
    nbytes = 115 * 2048 * 4096 * 2
    mixtral, large, card = [experts(8, 4096, 14336)], int(150.7 * GB), 24 << 30
    for modules, total, corrected in ((mixtral, large, False), (small, card, True)):
        assert not states_fit_within(modules, nbytes, 2048, total, corrected)
        assert states_fit_within(modules, nbytes, 2048, total, corrected, measuring=False)
    assert not states_fit_within(small, nbytes, 2048, 8 << 30, True, measuring=False)
    for total in (8 * GB, 24 * GB, 80 * GB):  # never less room than while measuring, which quantising does not need
        assert room_within(mixtral, nbytes, 2048, total, True, False) >= room_within(mixtral, nbytes, 2048, total, True)


def test_factors_are_made_ahead_where_there_is_room() -> None:
    dense = module("mlp", ("gate_proj", "gate_up", 4096, 11008), ("down_proj", "down", 11008, 4096))
    three = module("parallel", ("q_proj", "in", 1024, 1024), ("o_proj", "o", 1024, 1024), ("down_proj", "down", 2048, 1024))
    assert ahead_bytes(dense) == 12 * 11008**2  # float64 beside the result
    mixtral = experts(8, 4096, 14336)
    assert ahead_bytes(mixtral) == 12 * 14336**2 + 8 * 4096**2 + 4 * 4096**2  # of both inputs, and the one in hand
    for made, total, expected in (
        (dense, 24 * GB, False), (dense, 80 * GB, True), (mixtral, 24 * GB, False), (mixtral, 150 * GB, True),
        (three, 80 * GB, True), (ATTENTION, 80 * GB, True), (MLP, 150 * GB, False),
    ):  # fmt: skip
        assert settings_within(made, 16, 2048, total, 0.12).ahead == expected
