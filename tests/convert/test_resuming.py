"""Conversions that go on: what is done again, and what is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from convert_helpers import MODULES, Quiet, again, contents, items, messages, recipe, run, stages
from shard_places import files_of, weights
from tiny_models import write_model

from exl2ray.convert import convert
from exl2ray.errors import Interrupted, JobMismatchError, UsageError
from exl2ray.evaluate.record import Evaluation, Figure
from exl2ray.events import Silent
from exl2ray.publish.card import add_evaluation
from exl2ray.store import pieces
from exl2ray.store.job_file import decode_job, encode_job
from exl2ray.store.local import LocalStore


def test_a_work_directory_may_be_moved(quiet: Quiet, finished: Path) -> None:
    assert contents(finished / "out-4.0") == contents(quiet.outputs[4.0])
    assert contents(finished / "out-5.0") == contents(quiet.outputs[5.0])


def test_a_finished_job_computes_nothing(quiet: Quiet, finished: Path) -> None:
    before = contents(finished / "work" / "quant"), contents(finished / "out-4.0")
    reporter = again(quiet, finished)
    assert items(reporter) == []
    assert [s for s in stages(reporter) if not s.startswith("compile")] == []
    assert (contents(finished / "work" / "quant"), contents(finished / "out-4.0")) == before


def test_a_job_that_keeps_its_place_as_it_was_given_goes_on(
    quiet: Quiet, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions did, relative to the folder that one happened to be in."""
    path = finished / "work" / "job.json"
    stored = decode_job(path.read_bytes(), "job.json")
    assert stored.job["output"]["compile_full"] == str(finished / "out-{bpw}")
    stored.job["output"]["compile_full"] = "out-{bpw}"
    path.write_bytes(encode_job(stored))
    monkeypatch.chdir(finished)
    assert items(again(quiet, finished)) == []
    assert items(again(quiet, finished, compile_full="out-{bpw}")) == []
    with pytest.raises(JobMismatchError, match="-cf"):
        again(quiet, finished, compile_full="other-{bpw}")


def written(root: Path) -> dict[str, int]:
    """Time of the last change of every file of the outputs."""
    return {str(p): p.stat().st_mtime_ns for p in sorted(root.glob("out-*/**/*")) if p.is_file()}


def test_a_finished_job_writes_nothing(quiet: Quiet, finished: Path) -> None:
    """Not even after an evaluation was put on the card, and the files were touched by a copy."""
    add_evaluation(finished / "out-4.0", Evaluation("out-4.0", "", 1, 2, 3, Figure(9.0)))
    os.utime(finished / "out-5.0" / "output.safetensors")
    before = written(finished)
    reporter = again(quiet, finished)
    assert stages(reporter) == []
    assert len([m for m in messages(reporter, "note") if "has the model already" in m]) == 2
    assert written(finished) == before
    (done,) = [fields for name, fields in reporter.events if name == "done"]
    assert [o["file_bytes"] for o in done["outputs"]] == [o.file_bytes for o in quiet.summary.outputs]
    assert [o["calibration_perplexity"] for o in done["outputs"]] == [o.calibration_perplexity for o in quiet.summary.outputs]


@pytest.mark.parametrize("name", ["output.safetensors", "tokenizer.json", "config.json", "README.md"])
@pytest.mark.parametrize("damage", ["deleted", "torn", "altered"])
def test_damaged_files_of_an_output_are_written_again(quiet: Quiet, finished: Path, name: str, damage: str) -> None:
    file = finished / "out-4.0" / name
    shards = file.with_name("output.safetensors")
    inode, data = shards.stat().st_ino, file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "torn" else data[:-9] + b"\xff" + data[-8:])
    reporter = again(quiet, finished)
    if name == "README.md" and damage != "deleted":  # a card may be edited
        assert stages(reporter) == []
        return
    here = name == "output.safetensors" and damage != "deleted"  # the shard of the work directory is the same file
    assert items(reporter) == (["quantize 4.0: lm_head.linear"] if here else [])
    assert stages(reporter) == (["quantize 4.0"] if here else []) + ["compile 4.0"]
    assert contents(finished / "out-4.0") == contents(quiet.outputs[4.0])
    assert (shards.stat().st_ino == inode) == (not here)  # whoever else has the damaged file keeps it
    assert stages(again(quiet, finished)) == []


def test_a_stray_shard_is_not_taken_for_a_part_of_the_model(quiet: Quiet, finished: Path) -> None:
    shutil.copy(finished / "out-4.0" / "output.safetensors", finished / "out-4.0" / "output-00001-of-00002.safetensors")
    with pytest.raises(UsageError, match=r"holds output-00001-of-00002\.safetensors, not written there by exl2ray"):
        again(quiet, finished)


def test_another_bitrate_may_take_the_place_of_the_first(quiet: Quiet, tmp_path: Path) -> None:
    """Also from a new work directory; the shards of another model stay where they are."""
    out = tmp_path / "out"
    run(quiet.model, tmp_path / "a", compile_full=str(out), bits=(4.0,))
    run(quiet.model, tmp_path / "b", compile_full=str(out), bits=(5.0,))
    assert contents(out) == contents(quiet.outputs[5.0])
    run(quiet.model, tmp_path / "a", compile_full=str(out), bits=(4.0,))
    assert contents(out) == contents(quiet.outputs[4.0])
    other = write_model(tmp_path / "other", seed=5)
    with pytest.raises(UsageError, match=r"holds output\.safetensors, made from another model") as caught:
        run(other, tmp_path / "c", compile_full=str(out))
    assert "choose another directory" in caught.value.hint
    for text in ("{", "[]", '{"source": 1}'):
        (out / ".exl2ray.json").write_text(text)
        with pytest.raises(UsageError, match="not written there by exl2ray"):
            run(quiet.model, tmp_path / "c", compile_full=str(out))
    assert not (tmp_path / "c").exists()
    assert (out / "output.safetensors").read_bytes() == (quiet.outputs[4.0] / "output.safetensors").read_bytes()


def quant_records(work: Path) -> list[dict[str, Any]]:
    paths = (work / "quant" / "4.0" / "records").glob("*.json")
    return [r for r in (json.loads(p.read_text())["record"] for p in paths) if r["files"]]


def test_packed_tensors_are_hashed_once(quiet: Quiet, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When they are put into shards; and once more by a later run, which looks whether they are intact there."""
    hashed: list[str] = []
    real, real_pieces = LocalStore.sha256, pieces.pieces_sha256
    monkeypatch.setattr(LocalStore, "sha256", lambda self, rel: hashed.append(rel) or real(self, rel))
    tensors = [n for r in quant_records(finished / "work") for n in files_of(r)]
    run(quiet.model, finished / "new", compile_full=str(finished / "new-out"))
    assert sorted(rel for rel in hashed if "/tensors/" in rel) == sorted(tensors)
    hashed.clear()
    monkeypatch.setattr(pieces, "pieces_sha256", lambda ref, *a: hashed.append(ref.rel) or real_pieces(ref, *a))
    run(quiet.model, finished / "new", compile_full=str(finished / "new-out"))
    assert sorted(rel for rel in hashed if "/tensors/" in rel) == sorted(tensors)


def test_an_output_that_was_killed_half_way_is_ours(quiet: Quiet, finished: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (finished / "out-4.0" / name).unlink()
    with (finished / "out-4.0" / "output.safetensors").open("r+b") as f:
        f.truncate(1000)
    shutil.rmtree(finished / "work")
    again(quiet, finished)
    assert contents(finished / "out-4.0") == contents(quiet.outputs[4.0])


def test_a_lost_output_is_written_again(quiet: Quiet, finished: Path) -> None:
    shutil.rmtree(finished / "out-4.0")
    (finished / "work" / "measurement.json").unlink()
    assert items(again(quiet, finished)) == []
    assert contents(finished / "out-4.0") == contents(quiet.outputs[4.0])
    assert (finished / "work" / "measurement.json").read_bytes() == (quiet.work / "measurement.json").read_bytes()


def test_damaged_tensors_are_quantised_again(quiet: Quiet, finished: Path) -> None:
    """And nothing else: what comes after depends on the same bytes."""
    weights(finished / "work", "model.layers.1.self_attn").flip()
    reporter = again(quiet, finished)
    assert items(reporter) == ["quantize 4.0: model.layers.1.self_attn"]
    assert any("model.layers.1.self_attn" in m and "computed again" in m for m in messages(reporter, "note"))
    assert contents(finished / "out-4.0") == contents(quiet.outputs[4.0])


def test_a_lost_record_is_measured_again(quiet: Quiet, finished: Path) -> None:
    (record,) = (finished / "work" / "measure" / "records").glob("model.layers.0.mlp.*")
    record.unlink()
    assert items(again(quiet, finished)) == ["measure: model.layers.0.mlp"]
    assert contents(finished / "out-5.0") == contents(quiet.outputs[5.0])


def test_starting_over_deletes_only_what_is_ours(quiet: Quiet, finished: Path) -> None:
    (finished / "work" / "notes.txt").write_text("mine")
    (finished / "work" / "measure" / "mine.bin").write_bytes(b"mine")
    reporter = again(quiet, finished, no_resume=True, bits=(4.0,))
    assert len(items(reporter)) == 2 * len(MODULES) + 1
    assert (finished / "work" / "notes.txt").read_text() == "mine"
    assert (finished / "work" / "measure" / "mine.bin").exists()
    assert not (finished / "work" / "quant" / "5.0").exists()
    assert contents(finished / "out-4.0") == contents(quiet.outputs[4.0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_stop_between_two_commits(quiet: Quiet, tmp_path: Path, number: signal.Signals) -> None:
    class Stopping(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "item" and fields["done"] == 2:
                os.kill(os.getpid(), number)

    settings = {"compile_full": str(tmp_path / "out")}
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="stopped") as caught:
        convert(recipe(quiet.model, tmp_path / "work", **settings), Stopping())
    assert f"-o {tmp_path / 'work'}" in caught.value.hint
    assert caught.value.exit_code == 130
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert not (tmp_path / "work" / "driver.lock").exists()
    _, reporter = run(quiet.model, tmp_path / "work", **settings)
    measured = [i for i in items(reporter) if i.startswith("measure")]
    assert 1 <= len(measured) <= 2
    assert contents(tmp_path / "out") == contents(quiet.outputs[4.0])
