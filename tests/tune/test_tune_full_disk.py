"""A work directory that takes nothing for a while: nothing is trained twice, and nothing that was kept is lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from test_tune_run import same, settings, tuned
from thread_comm import together

from exl2ray.driver.policy import Limits, Policy
from exl2ray.errors import JobMismatchError, StoreError
from exl2ray.events import Silent
from exl2ray.quant.group import Solo
from exl2ray.store.faults import GaveUpError, translated
from exl2ray.store.local import LocalStore
from exl2ray.tune import keeping, state, training
from exl2ray.tune.run import WORK, tune

Pairs = Callable[..., tuple[Path, Path]]
FEW: dict[str, Any] = {"tokens": 4096, "checkpoint_seconds": 0}  # eight steps


class Disk:
    """Refuses some of the files of checkpoints. ``tries``: names of the first file of each; ``full``: says which fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tries: list[str] = []
        self.full: Callable[[int, str], bool] = lambda number, name: False
        self.steps, self.error = 0, errno.ENOSPC
        put, step = LocalStore.put_parts, training.Trainer.step

        def putting(store: LocalStore, rel: str, parts: Sequence[bytes]) -> None:
            if rel.startswith(f"{state.FOLDER}/"):
                self.tries += [rel] if rel.endswith("-1.safetensors") else []
                if rel.endswith("-2.safetensors") and self.full(len(self.tries), rel):  # after some that were written
                    with translated("write", store.full_name(rel)):
                        raise OSError(self.error, os.strerror(self.error))
            put(store, rel, parts)

        def stepping(*given: Any) -> Any:
            self.steps += 1
            return step(*given)

        monkeypatch.setattr(LocalStore, "put_parts", putting)
        monkeypatch.setattr(training.Trainer, "step", stepping)
        monkeypatch.setattr(keeping, "RETRY_SECONDS", 0.0)
        monkeypatch.setattr(keeping, "TICK_SECONDS", 0.01)


def messages(reporter: Silent) -> list[str]:
    return [fields.get("message", "") for _, fields in reporter.events]


def test_a_checkpoint_that_cannot_be_made_costs_nothing(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(settings(pair, text, tmp_path / "whole", **FEW))
    disk, reporter = Disk(monkeypatch), Silent()
    disk.full = lambda number, name: number in (2, 3)
    left: list[list[str]] = []
    delete = state._delete_unnamed
    work = tmp_path / "out" / WORK
    monkeypatch.setattr(
        state, "_delete_unnamed", lambda s: (delete(s), left.append(sorted(f.name for f in (work / state.FOLDER).iterdir())))
    )
    tune(settings(pair, text, tmp_path / "out", **FEW), torch.device("cpu"), reporter)
    told = messages(reporter)
    assert sum("no checkpoint could be made (cannot write" in m and "training goes on without" in m for m in told) == 1
    assert "checkpoints can be made again: one of step 4" in told
    assert not any("worker was lost" in m for m in told)
    assert disk.steps == 8
    assert left[0] == left[1] == left[2] != left[3], "what could not be finished is deleted, and what was kept is not"
    assert same(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    ("error", "remedy"), [(errno.ENOSPC, "kB are needed there: free some"), (errno.EROFS, "make it writable again")]
)
def test_the_end_of_training_waits_for_room(
    error: int, remedy: str, pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(settings(pair, text, tmp_path / "whole", **FEW))
    disk, reporter = Disk(monkeypatch), Silent()
    disk.error = error
    disk.full = lambda number, name: 8 <= number <= 11
    tune(settings(pair, text, tmp_path / "out", **FEW), torch.device("cpu"), reporter)
    told = messages(reporter)
    waits = [m for m in told if "what was trained cannot be kept" in m]
    assert len(waits) == 1
    assert os.strerror(error) in waits[0]
    assert f"{remedy}, it is tried again until" in waits[0]
    assert "what was trained is kept now" in told
    assert not any("worker was lost" in m for m in told)
    assert (disk.steps, len(disk.tries)) == (8, 12)
    assert same(tmp_path / "whole", tmp_path / "out")


def test_it_gives_up_once_and_goes_on_from_the_last_checkpoint(
    pair: Pairs, text: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned(settings(pair, text, tmp_path / "whole", **FEW))
    monkeypatch.setattr(keeping, "WAIT_SECONDS", 0.0)
    disk = Disk(monkeypatch)
    disk.full = lambda number, name: number > 5
    with pytest.raises(GaveUpError, match="what was trained cannot be kept: cannot write") as caught:
        tuned(settings(pair, text, tmp_path / "out", **FEW))
    assert "run the same command again: it goes on from step 5, the last checkpoint" in caught.value.hint
    assert disk.steps == 8, "not trained again and again"
    disk.full = lambda number, name: False
    reporter = Silent()
    tune(settings(pair, text, tmp_path / "out", **FEW), torch.device("cpu"), reporter)
    assert "going on from step 5" in messages(reporter)
    assert disk.steps == 8 + 3
    assert same(tmp_path / "whole", tmp_path / "out")


def test_a_stop_ends_the_wait(tmp_path: Path) -> None:
    notes: list[str] = []
    keeper = keeping.Keeper(LocalStore(str(tmp_path)), Solo(), notes, 60.0, 13, 1, 7)

    def write() -> None:
        raise StoreError("full")

    told = list(keeper.at_last(write, lambda: True))
    assert told[-1] == "stopped before what was trained could be kept: it goes on from step 7, the last checkpoint"
    assert (len(told), keeper.is_done) == (2, False)


def test_a_group_fails_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One member has no room: all of them hear of it, and the checkpoint before is whole."""
    store, put = LocalStore(str(tmp_path)), LocalStore.put_parts
    full = [False]

    def putting(self: LocalStore, rel: str, parts: Sequence[bytes]) -> None:
        if full[0] and "-2-1-" in rel:
            raise StoreError(f"no room for {rel}")
        put(self, rel, parts)

    monkeypatch.setattr(LocalStore, "put_parts", putting)

    def saved(step: int) -> list[Any]:
        def member(comm: Any) -> str:
            try:
                states = [("a", {"x": torch.ones(3)}), ("b", {"y": torch.ones(2)})]
                state.save(store, comm, state.Progress("one", step), states)
            except StoreError as e:
                return e.message
            return ""

        return together(2, member)

    assert saved(1) == ["", ""]
    before = store.list(state.FOLDER)
    full[0] = True
    assert saved(2) == ["no room for states/2-2-1-0.safetensors"] * 2
    assert store.list(state.FOLDER) == before
    found = state.restore(store, Solo(), "one")
    assert found is not None
    assert found.progress.step == 1


@pytest.mark.parametrize("error", [GaveUpError("full"), JobMismatchError("changed")], ids=["gave up", "changed"])
def test_what_trying_again_does_not_mend_stops_the_job(error: StoreError) -> None:
    with pytest.raises(type(error)):
        Policy(Limits(), lambda *_, **more: None, lambda: "").after(error, 0, 0, "steps", "step 8")
    assert Policy(Limits(), lambda *_, **more: None, lambda: "").after(StoreError("x"), 0, 0, "steps", "step 8") == 2.0
