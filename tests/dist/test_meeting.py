"""Workers that make a group before there is work, on fake GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from dist_helpers import Unsocial

from exl2ray.dist.items import Meeting, WorkerSetup
from exl2ray.dist.session import InlineSession, RaySession
from exl2ray.dist.worker import Worker
from exl2ray.store.fs import Store
from exl2ray.store.tensors import put_tensors


def made(model: Path, tmp_path: Path) -> WorkerSetup:
    ids = torch.randint(0, 200, (8, 16), generator=torch.Generator().manual_seed(1))
    put_tensors(Store.open(str(tmp_path)), "rows.safetensors", {"measure": ids, "quantize": ids})
    return WorkerSetup(
        in_dir=str(model), work_root=str(tmp_path), device="cpu", rope_scale=None, rope_alpha=None, damping=0.12,
        checkpoint_seconds=1e9, calibration="rows.safetensors", calibration_sha256="ab" * 32, perplexity_rows=8, threads=1,
    )  # fmt: skip


@contextmanager
def running(make: Any, model: Path, tmp_path: Path, cluster: Any) -> Iterator[RaySession]:
    """A session of two workers that have started."""
    session = RaySession(made(model, tmp_path), make, 2, cluster.address, claim={"num_gpus": 1, "num_cpus": 0})
    try:
        until_started(session)
        yield session
    finally:
        session.close()


def until_started(session: RaySession) -> None:
    while session.starting():
        session.wait(0.2)


def answers(session: RaySession, count: int) -> list[Any]:
    found: list[Any] = []
    while len(found) < count:
        outcome = session.wait(1.0)
        if outcome is not None:
            found.append(outcome.value)
    return found


def test_workers_that_have_met_need_not_again(model: Path, tmp_path: Path, cluster: Any) -> None:
    with running(Worker, model, tmp_path, cluster) as session:
        workers = session.idle()
        session._introduce()
        assert session.notes == []
        assert sorted(session.idle()) == sorted(workers)
        meetings = session.meeting(workers)
        assert [(m.rank, m.size) for m in meetings] == [(0, 2), (1, 2)]
        assert session.meeting(workers) == meetings
        assert session.meeting(workers[:1]) == [Meeting()]
        assert session.meeting(workers[::-1])[0].serial != meetings[0].serial  # other ranks, another group

        for worker, meeting in zip(workers, meetings, strict=True):  # known: nobody waits for anybody
            session.submit(worker, "meet", meeting)
            assert answers(session, 1) == [None]

        session.submit(workers[0], "no_such_method")  # its worker gives up what it has, the group too
        assert isinstance(answers(session, 1)[0], Exception)
        anew = session.meeting(workers)
        assert anew[0].serial != meetings[0].serial
        for worker, meeting in zip(workers, anew, strict=True):
            session.submit(worker, "meet", meeting)
        assert answers(session, 2) == [None, None]

        session.kill(workers[1])
        assert session.meeting(workers)[0].serial != anew[0].serial


def test_a_member_that_fails_is_noted(model: Path, tmp_path: Path, cluster: Any) -> None:
    """The others do not wait for it for ever: their store is gone, or they are started anew."""
    with running(Unsocial, model, tmp_path, cluster) as session:
        session._introduce(seconds=3.0)
        assert any("cannot connect to the others: no" in note for note in session.notes)
        until_started(session)
        assert len(session.idle()) == 2


def test_a_worker_in_this_process_is_alone() -> None:
    class Nothing:
        def __init__(self, setup: Any) -> None:
            pass

    assert InlineSession(None, Nothing).meeting([0]) == [Meeting()]  # type: ignore[arg-type]
