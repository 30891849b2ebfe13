"""Shards that are filled while modules are quantised: killed, damaged, shared with others, on a disk that is too small."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
from kill_steps import killed_at
from shard_places import files_of, places, record_of, weights
from test_disks import At, SmallDisk, disk  # noqa: F401 - a fixture
from workdir_cases import Conversion, contents

from exl2ray.convert import convert
from exl2ray.errors import StoreError
from exl2ray.events import Silent

ATTENTION, HEAD = "model.layers.0.self_attn", "lm_head.linear"
KIND = "quant/4.0"


def items(reporter: Silent) -> list[str]:
    return [f"{f['key']}" for name, f in reporter.events if name == "item"]


def without(work: Path, *keys: str) -> Path:
    """A work directory in which some modules are not quantised yet."""
    for key in keys:
        (found,) = (work / KIND / "records").glob(f"{key}.*.json")
        found.unlink()
    return work


def tensor_files(work: Path) -> list[str]:
    return sorted(p.name for p in (work / KIND / "tensors").iterdir())


def test_killed_while_shards_are_filled(made: Conversion, tmp_path: Path) -> None:
    """Before a file operation there; then damage to what is in a shard by then costs just that module."""
    before, n, damaged = without(made.copy_of_work(tmp_path / "before"), HEAD), 1, 0
    rng = random.Random(1)
    while True:
        work, target = Path(shutil.copytree(before, tmp_path / f"work{n}")), tmp_path / f"target{n}"
        arguments = [*made.arguments(work, target), "-b", "4"]
        if not killed_at(n, arguments, tmp_path / "log", work / KIND):
            break
        assert not (target / "config.json").exists() or contents(target) == contents(made.target)
        placed = [k for k in (ATTENTION, "model.layers.1.mlp") if "pieces" in record_of(work, k)["files"][0]]
        if placed:
            weights(work, rng.choice(placed)).flip()
            damaged += 1
        reporter = made.convert(work, target)[1]
        assert set(items(reporter)) <= {HEAD, *placed}
        assert len(items(reporter)) - (HEAD in items(reporter)) == bool(placed)
        assert contents(target) == contents(made.target)
        shards = tensor_files(work)
        assert len(shards) == 2
        assert all(name.startswith("output-0000") for name in shards), "something is left"
        n += 7
    assert n > 30, "the steps are not met"
    assert damaged, "no module was in a shard yet"


def test_the_output_is_the_only_copy(made: Conversion, tmp_path: Path) -> None:
    """Files of workers are gone, shards of the work directory and of the output are one; a lost output comes back at once."""
    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "out"
    made.convert(work, target)
    inodes = {(work / KIND / "tensors" / n).stat().st_ino for n in tensor_files(work)}
    assert inodes == {p.stat().st_ino for p in target.glob("output*.safetensors")}
    assert not [rel for rel in files_of(record_of(work, ATTENTION)) if (work / rel).exists()]
    shutil.rmtree(target)
    assert items(made.convert(work, target)[1]) == []
    assert inodes == {p.stat().st_ino for p in target.glob("output*.safetensors")}
    assert contents(target) == contents(made.target)


def test_a_finished_model_is_not_written_into(made: Conversion, tmp_path: Path) -> None:
    """Whoever has a link to a shard keeps what is in it, also when a module is made again and when bitrates change place."""
    work, target, kept = made.copy_of_work(tmp_path / "work"), tmp_path / "out", tmp_path / "kept"
    made.convert(work, target)
    shutil.copytree(target, kept, copy_function=os.link)
    weights(work, ATTENTION).flip()
    damaged = contents(kept)
    assert items(made.convert(work, target)[1]) == [ATTENTION]
    assert contents(target) == contents(made.target)
    made.convert(work, target, bits=(5.0,))
    assert contents(target) == contents(made.target5)
    assert contents(kept) == damaged != contents(made.target)


def test_other_settings_get_other_shards(made: Conversion, tmp_path: Path) -> None:
    """Modules that they have in common move over; shards that no record needs go."""
    work, target = made.copy_of_work(tmp_path / "work"), tmp_path / "out"
    made.convert(work, target)
    first = tensor_files(work)
    assert items(made.convert(work, tmp_path / "one", shard_size=0)[1]) == []
    assert [len(n) for n in tensor_files(work)] == [len("output.0123456789abcdef.safetensors")]
    assert items(made.convert(work, target)[1]) == []  # and it is there still
    assert items(made.convert(work, tmp_path / "again")[1]) == []
    assert tensor_files(work) == first
    assert contents(tmp_path / "again") == contents(made.target)


@pytest.mark.parametrize("damage", ["header", "cut off", "gone", "a link"])
def test_shards_that_are_damaged_as_a_whole(damage: str, made: Conversion, tmp_path: Path) -> None:
    work = made.copy_of_work(tmp_path / "work")
    made.convert(work, tmp_path / "first")
    shard = next(iter(places(work, HEAD).values())).path
    if damage == "header":
        with shard.open("r+b") as f:
            f.write(b"\xff" * 64)
    elif damage == "cut off":
        os.truncate(shard, shard.stat().st_size - 5)
    else:
        shard.unlink()
        if damage == "a link":
            shard.symlink_to(tmp_path / "first" / "config.json")
    target = tmp_path / "out"
    if damage == "a link":
        with pytest.raises(StoreError, match="a link, pipe, socket or device"):
            made.convert(work, target)
        return
    reporter = made.convert(work, target)[1]
    assert (items(reporter) == []) == (damage == "header")
    assert contents(target) == contents(made.target)


def test_permissions_are_those_of_the_output(made: Conversion, tmp_path: Path) -> None:
    """Shards that were made under another umask than the output's other files are not given to it."""
    work, target = without(made.copy_of_work(tmp_path / "work"), HEAD), tmp_path / "out"
    assert killed_at(12, [*made.arguments(work, target), "-b", "4"], tmp_path / "log", work / KIND)
    before = os.umask(0o077)
    try:
        made.convert(work, target)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in target.iterdir()} == {0o600}
    assert contents(target) == contents(made.target)


def test_a_disk_without_room_for_the_shards(made: Conversion, disk: SmallDisk) -> None:  # noqa: F811
    """Is full before anything is quantised."""
    work, target = without(made.copy_of_work(disk.path / "work"), HEAD), disk.path / "out"

    def fill() -> None:
        (disk.path / "filler").write_bytes(b"x" * (shutil.disk_usage(disk.path).free - (1 << 18)))

    reporter = At(("note", ""), fill)
    with pytest.raises(StoreError, match="No space left") as caught:
        convert(made.recipe(work, target), reporter)
    assert "free some space" in caught.value.hint
    assert items(reporter) == []
    (disk.path / "filler").unlink()
    assert items(made.convert(work, target)[1]) == [HEAD]
    assert contents(target) == contents(made.target)
