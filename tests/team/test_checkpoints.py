"""Saved states: the newest whole ones are found, whatever happened to the others, and only what is read is hashed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import exl2ray.team.checkpoints as checkpoints_module
from exl2ray.store.local import LocalStore
from exl2ray.store.records import FileRef, Records
from exl2ray.store.tensors import put_tensors
from exl2ray.team.checkpoints import Chain, Checkpoints

CHAIN = Chain("measure", "reference:" + "ab" * 16)


def states(value: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((2, 3), value)}


def saved(root: Path, *indices: int) -> tuple[LocalStore, Checkpoints]:
    """States whose values are their index; all are kept, since module 1 may still need them."""
    store = LocalStore(str(root))
    checkpoints = Checkpoints(Records(store), 0.0)
    for index in indices:
        checkpoints.save(CHAIN, index, {None: states(float(index))}, keep_from=1)
    return store, checkpoints


def loaded(checkpoints: Checkpoints, index: int) -> int | None:
    found = checkpoints.load(CHAIN, index)
    if found is None:
        return None
    assert torch.equal(found.tensors["x"], states(float(found.index))["x"])
    return found.index


def test_the_newest_before_a_module_is_found(tmp_path: Path) -> None:
    _, checkpoints = saved(tmp_path, 2, 5, 9)
    assert [loaded(checkpoints, i) for i in (1, 2, 4, 5, 8, 9, 20)] == [None, 2, 2, 5, 5, 9, 9]


@pytest.mark.parametrize("damage", ["torn", "flipped", "removed", "zeroed"])
def test_damaged_states_are_passed_over(tmp_path: Path, damage: str) -> None:
    store, checkpoints = saved(tmp_path, 2, 5)
    path = next(Path(store.root, n) for n in store.list("measure/states") if "states-5" in n)
    data = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:  # torn: a size that was written before its content (ext4 without fsync) reads as zeros at the end
        path.write_bytes(
            {"torn": data[:-4], "flipped": data[:-1] + bytes([data[-1] ^ 1]), "zeroed": data[:-8] + bytes(8)}[damage]
        )
    assert loaded(checkpoints, 9) == 2


def test_only_what_is_read_is_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, checkpoints = saved(tmp_path, 2, 5, 9)
    hashed: list[str] = []
    sha256 = store.sha256
    monkeypatch.setattr(store, "sha256", lambda rel: hashed.append(rel) or sha256(rel))
    assert loaded(checkpoints, 7) == 5
    assert ["states-5" in rel for rel in hashed] == [True]
    hashed.clear()
    checkpoints.save(CHAIN, 12, {None: states(12.0)}, keep_from=1)
    assert hashed == []


def test_states_that_no_module_needs_any_more_are_removed(tmp_path: Path) -> None:
    store, checkpoints = saved(tmp_path, 2, 5)
    checkpoints.save(CHAIN, 9, {None: states(9.0)}, keep_from=6)
    assert [loaded(checkpoints, i) for i in (2, 5, 9)] == [None, 5, 9]
    checkpoints.save(CHAIN, 11, {None: states(11.0)}, keep_from=11)
    assert [loaded(checkpoints, i) for i in (9, 11)] == [None, 11]
    assert len(store.list("measure/states")) == len(store.list("measure/records")) == 1


@pytest.mark.parametrize("save_seconds", [0.0, 0.5, 30.0])
def test_saving_takes_a_twentieth_of_the_time_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float
) -> None:
    """Whatever the disk: asked after every module of two seconds, for an hour, on a clock of our own."""
    now, saving = 0.0, 0.0
    monkeypatch.setattr(checkpoints_module.time, "monotonic", lambda: now)

    def put(store: LocalStore, rel: str, tensors: dict[str, torch.Tensor]) -> FileRef:
        nonlocal now, saving
        now, saving = now + save_seconds, saving + save_seconds
        return put_tensors(store, rel, tensors)

    monkeypatch.setattr(checkpoints_module, "put_tensors", put)
    checkpoints = Checkpoints(Records(LocalStore(str(tmp_path))), 10.0)
    saves = 0
    while now < 3600:
        now += 2.0
        if checkpoints.due():
            saves += 1
            checkpoints.save(CHAIN, saves, {None: states(0.0)}, keep_from=saves)
    assert saving <= 0.05 * now + save_seconds
    period = max(10.0, 19 * save_seconds) + 2.0 + save_seconds
    assert saves == pytest.approx(3600 / period, rel=0.25)  # and no less than is allowed


def test_states_of_other_rows_or_choices_are_not_used(tmp_path: Path) -> None:
    _, checkpoints = saved(tmp_path, 2)
    assert checkpoints.load(Chain("measure", "reference:" + "cd" * 16), 5) is None
    chain = Chain("quant/4.0", "quantized:" + "ab" * 16, ("11" * 32, "22" * 32, "33" * 32))
    checkpoints.save(chain, 2, {0: states(2.0)}, keep_from=2)
    assert checkpoints.load(chain, 2, 0) is not None
    assert checkpoints.load(chain, 2, 1) is None
    other = Chain(chain.kind, chain.name, ("11" * 32, "44" * 32, "33" * 32))
    assert checkpoints.load(other, 2, 0) is None
