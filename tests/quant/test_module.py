"""One module, one function: a group of any size packs what a worker alone does, and tells the same. Members are threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_helpers import Packed, load, measured, states
from thread_comm import together
from torch import Tensor

from exl2ray.model.blocks import check_states
from exl2ray.quality import Numerics, Settings
from exl2ray.quant import factorising, hessian
from exl2ray.quant.entering import enter_module
from exl2ray.quant.group import Solo
from exl2ray.quant.measure_moe import describe_coverage
from exl2ray.quant.module import QuantizedModule, cut, quantize_module
from exl2ray.quant.qparams import head_option, parse
from exl2ray.quant.rows import error_rows, error_step, number_of, owner_shares, relative_error, share_rows

ROWS = 11
CORRECTED = Numerics(0.5, "feedback", 1)
Found = tuple[QuantizedModule, Packed, dict[str, Tensor]]


def by_group(directory: Path, index: int, settings: Settings, size: int, rows: int = ROWS) -> list[Found]:
    """What each member of a group gets, packs and holds afterwards."""

    def member(comm: Any) -> Found:
        spec, block = load(directory, index)
        x = states(spec, rows=rows, tokens=24)
        other = x + 0.05 * states(spec, rows=rows, tokens=24, seed=1)  # in the source model: near the others, not equal
        if block.module.kind == "head":
            params = {y.key: head_option(6) for y in block.module.linears}
        else:
            params = {y.key: parse("1:4b_32g s4") for y in block.module.linears}
        own = owner_shares(comm.rank, comm.size)
        mine, others = ({s: t for s, t in cut(t).items() if s in own} for t in (x, other))
        packed = Packed()
        result = quantize_module(block, mine, others, rows, params, settings, check_states, packed, comm)
        assert block.module.kind == "head" or not (mine or others)  # whoever handed them over may have had no other use
        return result, packed, dict(block.weights)

    return together(size, member) if size > 1 else [member(Solo())]


@pytest.mark.parametrize("numerics", [Numerics(), CORRECTED], ids=["plain", "corrected"])
@pytest.mark.parametrize(("family", "index"), [("Llama", 1), ("Mixtral", 2), ("Cohere", 1), ("Llama", 6)])
def test_a_group_of_any_size_packs_the_same_bits(
    tiny: Callable[[str], Path], family: str, index: int, numerics: Numerics
) -> None:
    settings = Settings(batch_rows=2, numerics=numerics)
    ((alone, expected, weights),) = by_group(tiny(family), index, settings, 1)
    for size in (2, 3, 8):
        found = by_group(tiny(family), index, settings, size)
        packed = {key: p for _, own, _ in found for key, p in own.items()}
        assert sum(len(own) for _, own, _ in found) == len(packed)  # each by one member
        assert packed.keys() == expected.keys()
        for key, p in packed.items():
            assert all(torch.equal(t, expected[key].tensors()[name]) for name, t in p.tensors().items())
        for result, _, held in found:
            assert (result.error, result.notes, result.experts) == (alone.error, alone.notes, alone.experts)
            assert all(torch.equal(held[key], w) for key, w in weights.items())
            for mine, whole in ((result.x, alone.x), (result.other, alone.other)):
                assert all(torch.equal(t, whole[s]) for s, t in mine.items())
        assert {s for result, _, _ in found for s in result.x} == alone.x.keys()
    if family == "Mixtral":
        assert sum(e["tokens"] for e in alone.experts) == 2 * ROWS * 24
        assert alone.notes[0] == describe_coverage(alone.experts)


@pytest.mark.parametrize("all_experts", [False, True])
@pytest.mark.parametrize(("family", "index"), [("Llama", 1), ("Llama", 2), ("Mixtral", 2), ("Cohere", 1)])
def test_the_reported_error_is_of_every_fourth_row_and_changes_no_byte(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, index: int, all_experts: bool
) -> None:
    rows, settings = 21, Settings(batch_rows=2, all_experts=all_experts)
    found = {size: by_group(tiny(family), index, settings, size, rows) for size in (1, 4)}
    ((result, _, _),) = found[1]
    assert {r.error for r, _, _ in found[4]} == {result.error}

    spec, block = load(tiny(family), index)
    x = states(spec, rows=rows, tokens=24)
    target, out = block.forward(x), torch.cat([result.x[s] for s in sorted(result.x)])
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(out.float(), target.float(), strict=True)][::4]
    assert len(errors) == 6
    assert result.error == pytest.approx(sum(errors) / len(errors), rel=1e-3)

    monkeypatch.setattr("exl2ray.quant.module.error_step", lambda rows: 1)
    for size in (1, 4):
        of_all = by_group(tiny(family), index, settings, size, rows)
        for (mine, own, weights), (other, theirs, same) in zip(found[size], of_all, strict=True):
            assert mine.error != other.error
            assert own.keys() == theirs.keys()
            for key, p in own.items():
                assert all(torch.equal(t, theirs[key].tensors()[name]) for name, t in p.tensors().items())
            assert all(torch.equal(w, same[key]) for key, w in weights.items())
            for before, after in ((mine.x, other.x), (mine.other, other.other)):
                assert all(torch.equal(t, after[s]) for s, t in before.items())


@pytest.mark.parametrize("numerics", [Numerics(), CORRECTED], ids=["plain", "corrected"])
@pytest.mark.parametrize(("family", "index"), [("Llama", 2), ("Mixtral", 2), ("Cohere", 1)])
def test_factors_made_ahead_of_their_turn_change_nothing(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, family: str, index: int, numerics: Numerics
) -> None:
    monkeypatch.setattr("exl2ray.quant.module.lanes_of", lambda block: 1)  # small experts are solved side by side
    monkeypatch.setattr("exl2ray.quant.measure_moe.lanes_of", lambda block: 1)
    made: list[str] = []
    factor = hessian.input_factor

    def noted(block: Any, hessians: Any, group: str, *rest: Any) -> Any:
        made.append(group)
        return factor(block, hessians, group, *rest)

    for room in ("module", "measure", "measure_moe"):
        monkeypatch.setattr(f"exl2ray.quant.{room}.input_factor", noted)
    found = []
    for early in (False, True):
        settings = Settings(batch_rows=2, numerics=numerics, ahead=early)
        made.clear()
        ((result, packed, _),) = by_group(tiny(family), index, settings, 1)
        quantised = list(made)
        spec, block = load(tiny(family), index)
        made.clear()
        profile, _ = measured(block, states(spec, rows=ROWS), settings)
        found.append((result.error, result.notes, profile.to_json(), dict(profile.extra), quantised, list(made), packed))
    (*first, packed), (*second, same) = found
    assert first == second
    assert packed.keys() == same.keys()
    for key, p in packed.items():
        assert all(torch.equal(t, same[key].tensors()[name]) for name, t in p.tensors().items())


def test_rows_of_the_reported_error() -> None:
    """Whoever holds which rows, they are the same ones; few rows count all."""
    for rows in (1, 2, 4, 7, 8, 11, 16, 115):
        every = error_step(rows)
        wanted = list(range(0, rows, every))
        assert [row for share in share_rows(rows) for row in share[error_rows(share.start, every)]] == wanted
        assert len(wanted) == number_of(error_rows(0, every), rows) >= min(rows, 4)
        assert every == 4 or len(wanted) < 8


def test_members_without_rows_take_part(tiny: Callable[[str], Path]) -> None:
    settings = Settings(batch_rows=2, numerics=CORRECTED)
    ((alone, expected, _),) = by_group(tiny("Llama"), 1, settings, 1, rows=2)
    found = by_group(tiny("Llama"), 1, settings, 8, rows=2)
    assert sum(bool(result.x) for result, _, _ in found) == 2
    assert {result.error for result, _, _ in found} == {alone.error}
    for _, own, _ in found:
        for key, p in own.items():
            assert all(torch.equal(t, expected[key].tensors()[name]) for name, t in p.tensors().items())


def test_wide_hessians_of_a_group_are_factorised_by_all(
    tiny: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("cholesky.BLOCK", 32), ("hessian.FLOAT64_ROWS", 48), ("sharing.TOGETHER_ROWS", 48)):
        monkeypatch.setattr(f"exl2ray.quant.{name}", value)
    done: list[str] = []
    factorise = factorising.factorise_together

    def noted(*arguments: Any) -> Any:
        done.append(arguments[6])
        return factorise(*arguments)

    monkeypatch.setattr("exl2ray.quant.sharing.factorise_together", noted)
    ((_, expected, _),) = by_group(tiny("Llama"), 2, Settings(), 1)
    assert not done
    found = by_group(tiny("Llama"), 2, Settings(), 3)
    assert sorted(set(done)) == ["model.layers.0.mlp (down)", "model.layers.0.mlp (gate_up)"]
    for _, own, _ in found:
        for key, p in own.items():
            assert all(torch.equal(t, expected[key].tensors()[name]) for name, t in p.tensors().items())


@pytest.mark.parametrize("index", [1, 2, 6])
def test_an_entered_module_is_quantised_again_and_again(tiny: Callable[[str], Path], index: int) -> None:
    """One pass over the source model serves all bitrates, and is what the chain does with the states of the source model."""
    spec, block = load(tiny("Llama"), index)
    x, settings = states(spec, rows=ROWS), Settings(batch_rows=2)
    source = dict(block.weights)
    entered = enter_module(block, x, settings, check_states)
    found = []
    for bits, known in (("4b", entered), ("3b", entered), ("4b", entered), ("4b", None)):
        params = {y.key: parse(f"1:{bits}_32g s4") for y in block.module.linears}
        packed = Packed()
        result = quantize_module(block, cut(x), cut(x), ROWS, params, settings, check_states, packed, entered=known)
        found.append((result.error, {k: t for p in packed.values() for k, t in p.tensors().items()}))
        for key, w in source.items():
            block.set_weight(key, w)
    first, coarse, again, chain = found
    if index != 6:  # the head's Hessian is summed share by share in a chain only
        assert first[0] == again[0] == chain[0]
        assert first[0] is not None
        assert coarse[0] is not None
        assert coarse[0] > 1.5 * first[0]
    for name, t in first[1].items():
        assert torch.equal(t, again[1][name])
        assert index == 6 or torch.equal(t, chain[1][name])


def test_the_error_of_no_rows_is_zero() -> None:
    """A batch of two rows may hold none of those that are compared."""
    x = torch.ones(3, 4, 8, dtype=torch.float16)
    assert float(relative_error(x[:0], x[:0])) == 0
    assert float(relative_error(x, 2 * x)) == pytest.approx(1.5)
