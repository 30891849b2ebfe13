"""A group that runs the source model together: states and weights have the bits of one worker alone. Members are threads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_comm import together
from torch import Tensor

import exl2ray.team.shared_reading as reading_module
import exl2ray.team.source_forward as sweep_module
from exl2ray.model.blocks import check_states
from exl2ray.quant.entering import enter_module
from exl2ray.quant.group import Solo
from exl2ray.quant.hessian import HessianAccumulator
from exl2ray.quant.memory import context_bytes
from exl2ray.quant.rows import SHARES, TreeSum, owner_shares, reduction, share_rows, shared_batches
from exl2ray.store.open import open_store
from exl2ray.store.tensors import put_tensors
from exl2ray.team.messages import Meeting, WorkerSetup
from exl2ray.team.runner import Runner
from exl2ray.team.source_forward import Found, begin_reading, source_forward

ROWS, TOKENS = 19, 32


@pytest.fixture
def setup(model: Path, tmp_path: Path) -> WorkerSetup:
    ids = torch.randint(0, 200, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    put_tensors(open_store(str(tmp_path)), "rows.safetensors", {"measure": ids, "quantize": ids})
    return WorkerSetup(
        in_dir=str(model), work_root=str(tmp_path), device="cpu", rope_scale=None, rope_alpha=None, damping=0.12,
        checkpoint_seconds=1e9, calibration="rows.safetensors", calibration_sha256="ab" * 32, perplexity_rows=ROWS, threads=1,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even these few tokens are worth while, and these small tensors."""
    monkeypatch.setattr(sweep_module, "PREPARE_TOKENS", 1)
    monkeypatch.setattr(reading_module, "SHARED_BYTES", 1)


@dataclass
class Entered:
    x: Tensor
    y: Tensor
    hessians: dict[str, Tensor]


def alone(run: Runner) -> dict[int, Entered]:
    """What a worker without a group finds at every module with linears but the head."""
    x = run.embedded("measure")
    out = {}
    for module in run.spec.modules[1:-2]:
        entered = enter_module(run.load(module), x, run.settings(module, *x.shape[:2]), check_states)
        assert entered.y is not None
        out[module.index] = Entered(x, entered.y, {group: h.h for group, h in entered.hessians.items()})
        x = entered.y
    return out


def members(size: int, setup: WorkerSetup, stretches: tuple[tuple[int, ...], ...], read: Any = None) -> list[Found]:
    def member(comm: Any) -> Found:
        run = Runner(setup)
        load = run.source.load

        def noted(name: str, rows: slice | None = None, allocate: Any = None) -> Tensor:
            if rows is not None and read is not None:
                read.append((name, rows.start, rows.stop))
            return load(name, rows, allocate)

        run.source.load = noted  # type: ignore[method-assign]
        with begin_reading(run, Meeting(None, comm.rank, comm.size), stretches) as reading:
            return source_forward(run, comm, "measure", stretches, reading)

    return together(size, member) if size > 1 else [member(Solo())]


STRETCHES = [
    ((1, 2, 3, 4),), ((1, 2), (3, 4)), ((1,), (2, 3, 4)), ((1,), (2,), (3, 4)),
    ((1,), (1,), (2,), (3,), (3,), (4,), (4,), (4,)),
    ((3,), (4,)),  # the group of a second machine
]  # fmt: skip


@pytest.mark.parametrize("stretches", STRETCHES, ids=str)
def test_prepared_modules_have_the_bits_of_a_worker_alone(
    stretches: tuple[tuple[int, ...], ...], setup: WorkerSetup
) -> None:
    expected = alone(Runner(setup))
    read: list[tuple[str, int, int]] = []
    size = len(stretches)
    taken: set[int] = set()
    for found, stretch in zip(members(size, setup, stretches, read), stretches, strict=True):
        assert found.index == stretch[0]
        if stretch[0] in taken:  # somebody else's
            assert not found.prepared
            assert found.x is not None
            assert torch.equal(found.x, expected[stretch[0]].x)
            continue
        taken |= set(stretch)
        assert tuple(found.prepared) == stretch
        for index, p in found.prepared.items():
            assert torch.equal(p.x, expected[index].x)
            assert torch.equal(p.y, expected[index].y)
            assert p.hessians.keys() == expected[index].hessians.keys()
            for group, h in p.hessians.items():
                assert h.rows == ROWS
                assert h.tokens == ROWS * TOKENS
                assert torch.equal(h.h, expected[index].hessians[group])
    assert len(set(read)) == len(read)  # nothing was read twice
    source = Runner(setup).source
    for name in {name for name, _, _ in read}:
        parts = sorted((start, stop) for other, start, stop in read if other == name)
        assert len(parts) == size
        assert [i for a, b in parts for i in range(a, b)] == list(range(source.shape(name)[0]))


def test_without_room_a_member_gets_the_states(setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    """None at all, or for one module."""
    run = Runner(setup)
    expected = alone(run)
    nbytes = expected[1].x.nbytes
    one = context_bytes(run.spec.modules[3], nbytes)
    for room, prepared in ((0, []), (2 * one, [3])):
        monkeypatch.setattr(Runner, "room", lambda self, n, rows, room=room: room)
        first, second = members(2, setup, ((1, 2), (3, 4)))
        assert list(second.prepared) == prepared
        if prepared:
            assert second.x is None
            assert torch.equal(second.prepared[3].y, expected[3].y)
        else:
            assert second.x is not None
            assert torch.equal(second.x, expected[3].x)
            assert first.x is not None
            assert torch.equal(first.x, expected[1].x)


def test_few_tokens_are_not_worth_preparing(setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    found = members(2, setup, ((1, 2), (3, 4)))
    assert not any(f.prepared for f in found)
    assert found[1].x is not None


def test_the_entry_of_the_head_is_not_prepared(setup: WorkerSetup) -> None:
    run = Runner(setup)
    states = alone(run)[4].y
    for module in run.spec.modules[5:-1]:
        states = run.advance(run.load(module), states, shared=True)
    first, second = members(2, setup, ((1, 2, 3, 4), (6,)))
    assert list(first.prepared) == [1, 2, 3, 4]
    assert not second.prepared
    assert second.x is not None
    assert torch.equal(second.x, states)


@given(st.integers(1, 120), st.integers(1, SHARES), st.data())
def test_reductions_bring_everything_to_the_owner(rows: int, size: int, data: st.DataObject) -> None:
    owner = data.draw(st.integers(0, size - 1))
    trees = []
    for rank in range(size):
        tree = TreeSum()
        for s in owner_shares(rank, size):
            if len(share_rows(rows)[s]):
                h = HessianAccumulator(1)
                h.rows, h.tokens = len(share_rows(rows)[s]), 2 * len(share_rows(rows)[s])
                tree.add(s, h)
        trees.append(tree)
    moves = reduction([t.counts() for t in trees], owner)
    for node, source, to, counts in moves:
        assert trees[source].counts()[node] == counts
        trees[to].add_node(node, trees[source].take(node))
    assert all(not t.counts() for rank, t in enumerate(trees) if rank != owner)
    assert trees[owner].total().rows == rows
    if size == SHARES and rows >= SHARES:
        assert sum(to == owner for _, _, to, _ in moves) == 3  # and not seven


def test_batches_end_where_shares_end() -> None:
    for rows in (1, 5, 16, 19, 115):
        for size in (1, 2, 4, 100):
            slices = list(shared_batches(rows, size))
            assert [i for s in slices for i in range(rows)[s]] == list(range(rows))
            assert all(0 < s.stop - s.start <= size for s in slices)
            bounds = {r.start for r in share_rows(rows) if len(r)}
            assert bounds <= {s.start for s in slices}
