"""A group that runs the source model together: states and weights have the bits of one worker alone. Members are threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import exl2ray.dist.sweep as sweep_module
from exl2ray.dist.comm import Solo
from exl2ray.dist.items import Meeting, SweepItem, WorkerSetup
from exl2ray.dist.runner import Runner
from exl2ray.dist.sweep import SharedReading, states_at
from exl2ray.quant.rows import share_rows, shared_batches
from exl2ray.store.fs import Store
from exl2ray.store.tensors import put_tensors

ROWS, TOKENS = 19, 32


class Threads:
    """A Comm between threads of this process."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.mail: dict[tuple[int, int], queue.Queue[Tensor]] = {
            (a, b): queue.Queue() for a in range(size) for b in range(size)
        }

    def member(self, rank: int) -> Any:
        return _Member(self, rank)


class _Member:
    def __init__(self, threads: Threads, rank: int) -> None:
        self.rank, self.size, self.received, self._mail = rank, threads.size, 0, threads.mail

    def exchange(self, sends: Sequence[tuple[Tensor, int]], receives: Sequence[tuple[Tensor, int]]) -> None:
        for t, to in sends:
            assert t.is_contiguous()
            self._mail[self.rank, to].put(t.clone())
        for t, source in receives:
            assert t.is_contiguous()
            t.copy_(self._mail[source, self.rank].get(timeout=20))
            self.received += t.nbytes


def together(size: int, work: Callable[[Any], Any]) -> list[Any]:
    """What each member returns."""
    threads, out = Threads(size), [None] * size

    def run(rank: int) -> None:
        out[rank] = work(threads.member(rank))

    members = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    for m in members:
        m.start()
    for m in members:
        m.join(60)
    return out


@pytest.fixture
def setup(model: Path, tmp_path: Path) -> WorkerSetup:
    ids = torch.randint(0, 200, (ROWS, TOKENS), generator=torch.Generator().manual_seed(1))
    put_tensors(Store.open(str(tmp_path)), "rows.safetensors", {"measure": ids, "quantize": ids})
    return WorkerSetup(
        in_dir=str(model), work_root=str(tmp_path), device="cpu", rope_scale=None, rope_alpha=None, damping=0.12,
        checkpoint_seconds=1e9, calibration="rows.safetensors", calibration_sha256="ab" * 32, perplexity_rows=ROWS, threads=1,
    )  # fmt: skip


def alone(run: Runner) -> list[Tensor]:
    """States at the entry of every module."""
    x = run.embedded("measure")
    out = [x, x]
    for module in run.spec.modules[1:-1]:
        x = run.advance_all(run.load(module), x)
        out.append(x)
    return out


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_states_have_the_bits_of_a_worker_alone(size: int, setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "SHARED_BYTES", 1)
    expected = alone(Runner(setup))
    indices = [1, 3, 4, 2, 4, 1, 3, 2][:size]  # a group of one: the entry of the first module
    stops = tuple(sorted((index, rank) for rank, index in enumerate(indices)))
    read: list[tuple[str, int, int]] = []

    def member(comm: Any) -> Any:
        run = Runner(setup)
        reading = SharedReading(run, comm)
        load = run.source.load

        def noted(name: str, rows: slice | None = None, allocate: Any = None) -> Tensor:
            if rows is not None:
                read.append((name, rows.start, rows.stop))
            return load(name, rows, allocate)

        reading._source.load = noted  # type: ignore[method-assign]
        return states_at(run, comm, reading, SweepItem("measure", stops, Meeting(("", 0), comm.rank, size)))

    found = together(size, member) if size > 1 else [member(Solo())]
    for rank, index in enumerate(indices):
        assert found[rank][0] == index
        assert torch.equal(found[rank][1], expected[index])
    assert len(set(read)) == len(read)  # nothing was read twice
    source = Runner(setup).source
    for name in {name for name, _, _ in read}:
        parts = sorted((start, stop) for other, start, stop in read if other == name)
        assert len(parts) == size
        assert [i for a, b in parts for i in range(a, b)] == list(range(source.shape(name)[0]))


def test_a_member_without_a_stop_helps(setup: WorkerSetup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep_module, "SHARED_BYTES", 1)
    expected = alone(Runner(setup))

    def member(comm: Any) -> Any:
        run = Runner(setup)
        return states_at(run, comm, SharedReading(run, comm), SweepItem("measure", ((4, 1),), Meeting(("", 0), comm.rank, 3)))

    found = together(3, member)
    assert found[0] is None
    assert found[2] is None
    assert torch.equal(found[1][1], expected[4])


def test_batches_end_where_shares_end() -> None:
    for rows in (1, 5, 16, 19, 115):
        for size in (1, 2, 4, 100):
            slices = list(shared_batches(rows, size))
            assert [i for s in slices for i in range(rows)[s]] == list(range(rows))
            assert all(0 < s.stop - s.start <= size for s in slices)
            bounds = {r.start for r in share_rows(rows) if len(r)}
            assert bounds <= {s.start for s in slices}
