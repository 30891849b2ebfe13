"""Output directories: what may lie there, who may write; a kill at any moment leaves the old model, the new one, or none."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from kill_steps import killed_at, start
from special_files import make_pipe
from workdir_cases import Conversion, Victim, contents, snapshot

from exl2ray.convert import dry_run, patch
from exl2ray.errors import StoreError, UsageError
from exl2ray.events import Silent
from exl2ray.formats.claim import CLAIM, LOCK
from exl2ray.formats.target import Owner, locked
from exl2ray.formats.verify import verify_directory

SHARD = "output-00001-of-00002.safetensors"


def ways(made: Conversion, work: Path, target: Path) -> list[Callable[[], object]]:
    """--dry-run, a first conversion, a resume and a patch refuse."""
    return [
        lambda: dry_run(made.recipe(work, target), Silent()),
        lambda: made.convert(work.with_name("new"), target),
        lambda: made.convert(work, target),
        lambda: patch(made.recipe(work, target), ["*.0.*.v_proj=8"], Silent()),
        lambda: patch(made.recipe(work, None), ["*.0.*.v_proj=8"], Silent(), None, str(target)),
    ]


# ---- what may lie there -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["notes.txt", "config.json", "README.md", "tokenizer.json", "authorized_keys", ".bashrc", "model.gguf", "a folder/x",
     "output.safetensors", "output-00001-of-00002.safetensors", "model.safetensors.index.json", "é\n.txt"],
)  # fmt: skip
def test_a_directory_with_something_in_it(name: str, made: Conversion, work: Path, tmp_path: Path) -> None:
    target = tmp_path / "precious"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("years of work")
    before, work_before = snapshot(target), snapshot(work)
    for way in ways(made, work, target)[: None if name in ("notes.txt", "output.safetensors") else 2]:
        with pytest.raises(UsageError, match="not written there by exl2ray"):
            way()
    assert snapshot(target) == before
    assert not (tmp_path / "new").exists()
    assert {k for k in snapshot(work) if "quant/" in k} == {k for k in work_before if "quant/" in k}
    if name == "notes.txt":
        exl2ray("plan", *made.arguments(tmp_path / "new", target)[1:]).ends_with(2, "not written there by exl2ray")


@pytest.mark.parametrize("name", [".gitattributes", ".git/HEAD", ".cache/x", ".DS_Store", "lost+found/x", ".nfs01"])
def test_what_git_and_file_systems_leave_is_no_obstacle(name: str, made: Conversion, work: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / name).parent.mkdir(parents=True)
    (target / name).write_text("x")
    made.convert(work, target)
    assert (target / name).read_text() == "x"
    assert contents(made.target).items() <= contents(target).items()


def test_what_a_user_adds_to_a_model_stays(made: Conversion, work: Path, target: Path) -> None:
    (target / "my notes.txt").write_text("good at 4 bits")
    made.convert(work, target, bits=(5.0,))
    assert (target / "my notes.txt").read_text() == "good at 4 bits"
    assert json.loads((target / "config.json").read_text())["quantization_config"]["bits"] == 5.0


def test_a_file_of_the_user_is_not_replaced_by_one_of_the_source(made: Conversion, work: Path, target: Path) -> None:
    model = Path(shutil.copytree(made.model, work.with_name("model")))
    (model / "NOTICE.txt").write_text("of the source")
    (target / "NOTICE.txt").write_text("of the user")
    with pytest.raises(UsageError, match=r"holds NOTICE\.txt, not written there by exl2ray"):
        made.convert(work, target, in_dir=str(model))
    assert (target / "NOTICE.txt").read_text() == "of the user"


def test_a_claim_of_an_older_version(made: Conversion, work: Path, target: Path) -> None:
    """It said the source and the shards only."""
    claim = json.loads((target / CLAIM).read_text())
    (target / CLAIM).write_text(json.dumps({k: claim[k] for k in ("source", "shards")}, indent=1))
    made.convert(work, target, bits=(5.0,))
    assert json.loads((target / CLAIM).read_text()) == claim


def test_a_work_directory_of_an_older_version_gets_an_identity(made: Conversion, work: Path, tmp_path: Path) -> None:
    path = work / "job.json"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if '"id"' not in line))
    made.convert(work, tmp_path / "out")
    assert len(json.loads(path.read_text())["id"]) == 32
    assert contents(tmp_path / "out") == contents(made.target)


def test_the_work_directory_is_no_output(made: Conversion, tmp_path: Path) -> None:
    exl2ray(*made.arguments(tmp_path / "w", tmp_path / "w")).ends_with(2, "work directory")
    assert not (tmp_path / "w").exists()


def test_a_work_directory_inside_of_the_output(made: Conversion, tmp_path: Path) -> None:
    made.convert(tmp_path / "out" / "work", tmp_path / "out")
    made.convert(tmp_path / "out" / "work", tmp_path / "out", bits=(5.0,))
    assert (tmp_path / "out" / "config.json").exists()


# ---- links ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARD, CLAIM, LOCK, "config.json", "README.md", "tokenizer.json"])
@pytest.mark.parametrize("full", [False, True])
def test_links_in_the_output(name: str, full: bool, made: Conversion, work: Path, tmp_path: Path, victim: Victim) -> None:
    target = made.copy_of_target(tmp_path / "out") if full else tmp_path / "out"
    target.mkdir(exist_ok=True)
    (target / name).unlink(missing_ok=True)
    (target / name).symlink_to(victim.file)
    before = snapshot(target)
    for way in ways(made, work, target)[: None if full and name == SHARD else 2]:
        with pytest.raises(StoreError, match="symbolic link"):
            way()
    victim.unharmed()
    assert snapshot(target) == before


@pytest.mark.parametrize("name", [CLAIM, LOCK, SHARD])
def test_nobody_waits_for_a_pipe_in_the_output(name: str, made: Conversion, work: Path, target: Path) -> None:
    (target / name).unlink(missing_ok=True)
    make_pipe(target / name)
    exl2ray(*made.arguments(work, target), seconds=20).ends_with(7, "a named pipe")


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_an_output_that_is_a_link_where_everybody_may_write(
    mode: int, made: Conversion, work: Path, tmp_path: Path, victim: Victim
) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "out").symlink_to(victim.root / "empty")
    (tmp_path / "scratch").chmod(mode)
    with pytest.raises(StoreError, match="everybody may write"):
        made.convert(work, tmp_path / "scratch" / "out")
    victim.unharmed()


def test_an_output_that_is_a_link_of_ones_own(made: Conversion, work: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    made.convert(work, tmp_path / "out")
    assert contents(tmp_path / "disk") == contents(made.target)


# ---- who may write --------------------------------------------------------------------------------------------------------


def owner(made: Conversion, job: str) -> Owner:
    source = json.loads((made.target / CLAIM).read_text())["source"]
    return Owner(source, str(made.model), job, f"/jobs/{job}")


def test_one_conversion_at_a_time(made: Conversion, work: Path, target: Path) -> None:
    before = snapshot(target)
    with locked(target, owner(made, "a" * 32)):
        for folder in (work, work.with_name("new")):
            exl2ray(*made.arguments(folder, target, "-b", "5")).ends_with(7, "another conversion is writing there")
    assert snapshot(target) == before
    made.convert(work, target, bits=(5.0,))


def test_two_at_once(made: Conversion, tmp_path: Path) -> None:
    """Started together, each with a work directory of its own: one is refused, or comes later; one model is left."""
    target = tmp_path / "out"
    logs = [tmp_path / f"log{bits}" for bits in (4, 6)]
    processes = [
        start(made.arguments(tmp_path / f"work{bits}", target, "-b", bits), log)
        for bits, log in zip("46", logs, strict=True)
    ]
    for process in processes:
        process.join()
    codes = [p.exitcode for p in processes]
    assert sorted(codes, key=str) in ([0, 7], [0, 0]), [log.read_text() for log in logs]
    if 7 in codes:
        assert "another conversion is writing there" in " ".join(logs[codes.index(7)].read_text().split())
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["bits"] in [bits for bits, code in zip((4.0, 6.0), codes, strict=True) if code == 0]
    assert verify_directory(target) == []
    assert not (target / LOCK).exists()


def test_a_lock_that_a_killed_one_left_is_taken_over(made: Conversion, work: Path, target: Path) -> None:
    (target / LOCK).touch()
    made.convert(work, target, bits=(5.0,))
    assert not (target / LOCK).exists()


def test_an_unfinished_model_is_of_its_work_directory(made: Conversion, work: Path, target: Path, tmp_path: Path) -> None:
    assert killed_at(14, made.arguments(work, target, "-b", "5"), tmp_path / "log", target)
    assert not (target / "config.json").exists()
    with pytest.raises(UsageError, match=f"another work directory has not finished: {work}"):
        made.convert(tmp_path / "other", target)
    made.convert(work, target, bits=(5.0,), no_resume=True)  # it is still the same one
    assert (target / "config.json").exists()
    made.convert(tmp_path / "other", target)  # and now it is finished
    assert contents(target) == contents(made.target)


def test_a_claim_without_a_model_hinders_nobody(made: Conversion, work: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    claim = {"source": owner(made, "").source, "shards": [], "files": [], "job": "b" * 32, "work": "/gone"}
    (target / CLAIM).write_text(json.dumps(claim))
    made.convert(work, target)
    assert contents(target) == contents(made.target)


def test_nothing_is_left_where_nothing_was_written(made: Conversion, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="made up"), locked(tmp_path / "new" / "out", owner(made, "")):
        raise RuntimeError("made up")
    assert not (tmp_path / "new" / "out").exists()


# ---- in which order -------------------------------------------------------------------------------------------------------


def is_whole(target: Path, models: list[dict[str, str]]) -> bool:
    """Whether there is a config.json, and then exactly one of ``models`` around it."""
    found = {n: h for n, h in contents(target).items() if n != LOCK and not n.endswith(".tmp")}
    if "config.json" not in found:
        return False
    assert found in models, f"half old, half new: {sorted(found)}"
    return True


@pytest.mark.parametrize("shards", ["1", "0"])
def test_killed_at_every_step_of_replacing_a_model(shards: str, made: Conversion, work: Path, tmp_path: Path) -> None:
    """``shards``: of 1 MiB, two as before; or a single one, so that both of the old ones go."""
    made.convert(work, tmp_path / "new", bits=(5.0,), shard_size=int(shards))
    models = [contents(made.target), contents(tmp_path / "new")]
    seen: list[bool] = []
    while True:
        target = made.copy_of_target(tmp_path / f"target{len(seen)}")
        arguments = made.arguments(work, target, "-b", "5", "-ss", shards)
        if not killed_at(len(seen) + 1, arguments, tmp_path / "log", target):
            break
        seen.append(is_whole(target, models))
        if len(seen) % 6 == 0:
            made.convert(work, target, bits=(5.0,), shard_size=int(shards))
            assert contents(target) == models[1]
        shutil.rmtree(target)
    assert contents(target) == models[1]
    assert len(seen) > 12
    changes = [i for i in range(1, len(seen)) if seen[i] != seen[i - 1]]
    assert seen[0]
    assert len(changes) == 2, "whole, then none, then whole again"


@pytest.mark.parametrize("n", [4, 7, 11])
def test_killed_while_patching_in_place(n: int, work: Path, target: Path, tmp_path: Path) -> None:
    arguments = ["patch", "-o", str(work), "--set", "*.0.*.v_proj=8", "--device", "cpu", "--executor", "inline", "-cf"]
    models = [contents(target)]
    assert killed_at(n, [*arguments, str(target)], tmp_path / "log", target)
    is_whole(target, models)
    for place in (target, tmp_path / "again"):
        exl2ray(*arguments, place).ends_with(0)
    assert contents(target) == contents(tmp_path / "again")
    assert contents(target)[SHARD.replace("1-of", "2-of")] != models[0][SHARD.replace("1-of", "2-of")]


def test_an_index_goes_with_the_config(made: Conversion, work: Path, target: Path) -> None:
    (target / "model.safetensors.index.json").write_text("{}")  # of a user's tool, about shards that are no more
    made.convert(work, target, bits=(5.0,))
    assert contents(target) == contents(made.target5)


def test_no_room_for_the_new_model_leaves_the_old_one(
    made: Conversion, work: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("exl2ray.beneath.reserve", full)
    before = contents(target)
    with pytest.raises(StoreError, match="No space left"):
        made.convert(work, target, bits=(5.0,))
    assert contents(target) == before


def test_an_output_that_is_deleted_while_the_conversion_runs(made: Conversion, work: Path, target: Path) -> None:
    class Deleting(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "stage" and fields["stage"].startswith("compile"):
                shutil.rmtree(target, ignore_errors=True)

    from exl2ray.convert import convert

    with pytest.raises(StoreError, match=r"deleted|does not exist|No such file") as caught:
        convert(made.recipe(work, target, bits=(5.0,)), Deleting())
    assert caught.value.exit_code == 7
    made.convert(work, target, bits=(5.0,))
    assert contents(target) == contents(made.target5)


def test_new_parents_of_an_output_are_durable(
    made: Conversion, work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[str] = set()
    fsync = os.fsync

    def noting(handle: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{handle}"))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noting)
    made.convert(work, tmp_path / "a" / "b" / "out")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b"), str(tmp_path / "a" / "b" / "out")} <= synced
