"""Every kind of bad input: a typed error that names the file, tensor or flag, and no work wasted before it."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import Quiet, contents, items, logged, messages, recipe, run
from tiny_models import edit_config, edit_tensors, write_model
from tokenizers import Tokenizer

from exl2ray.convert import dry_run
from exl2ray.driver.policy import Limits
from exl2ray.errors import (
    BudgetError,
    CalibrationError,
    FormatError,
    JobMismatchError,
    SourceError,
    StoreError,
    UnknownArchitectureError,
    UsageError,
)
from exl2ray.events import Silent
from exl2ray.store import local

Tensors = dict[str, torch.Tensor]
DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def model(llama: Path, tmp_path: Path) -> Path:
    """A copy that the test may damage."""
    return Path(shutil.copytree(llama, tmp_path / "model"))


def refused(error: type[Exception], match: str, model: Path, tmp_path: Path, **changes: Any) -> None:
    """The conversion is refused before anything is written."""
    with pytest.raises(error, match=match):
        run(model, tmp_path / "work", compile_full=str(tmp_path / "out"), **changes)
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "out").exists()


# ---- the source -------------------------------------------------------------------------------------------------------


def test_no_directory(tmp_path: Path) -> None:
    refused(UsageError, r"nowhere: does not exist", tmp_path / "nowhere", tmp_path)


def test_no_config(model: Path, tmp_path: Path) -> None:
    (model / "config.json").unlink()
    refused(SourceError, r"config\.json is missing", model, tmp_path)


def test_config_is_not_json(model: Path, tmp_path: Path) -> None:
    (model / "config.json").write_text('{"architectures": [')
    refused(SourceError, r"config\.json: not valid JSON", model, tmp_path)


def test_two_architectures(model: Path, tmp_path: Path) -> None:
    edit_config(model, architectures=["LlamaForCausalLM", "MistralForCausalLM"])
    refused(SourceError, r"config\.json: architectures has 2 names", model, tmp_path)


def test_unknown_architecture(model: Path, tmp_path: Path) -> None:
    edit_config(model, architectures=["GPTNeoXForCausalLM"], model_type="gpt_neox")
    refused(UnknownArchitectureError, r"GPTNeoXForCausalLM", model, tmp_path)


def test_missing_setting(model: Path, tmp_path: Path) -> None:
    edit_config(model, num_hidden_layers=None)
    refused(SourceError, r"num_hidden_layers", model, tmp_path)


def test_no_weights(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(SourceError, r"no \*\.safetensors file", model, tmp_path)


def test_missing_tensor(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda t: t.__delitem__(DOWN))
    refused(SourceError, r"model\.layers\.1\.mlp\.down_proj\.weight", model, tmp_path)


def test_wrong_shape(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda t: t.update({DOWN: torch.zeros(64, 64).half()}))
    refused(SourceError, r"down_proj\.weight.*\(64, 64\).*\(64, 96\)", model, tmp_path)


def test_missing_shard(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, lambda t: t.__delitem__(DOWN))
    index = {"metadata": {}, "weight_map": {DOWN: "model-00002-of-00002.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(SourceError, r"model-00002-of-00002\.safetensors, which is missing", model, tmp_path)


@pytest.mark.parametrize("keep", [4, 100, -1])
def test_truncated_shard(model: Path, tmp_path: Path, keep: int) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(SourceError, r"model\.safetensors", model, tmp_path)


@pytest.mark.parametrize("name", [DOWN, "model.layers.0.self_attn.q_proj.weight", "model.embed_tokens.weight"])
def test_nan_weights(model: Path, tmp_path: Path, name: str) -> None:
    def damage(tensors: Tensors) -> None:
        tensors[name][3, 5] = float("nan")

    edit_tensors(model, damage)
    with pytest.raises(SourceError, match=rf"{name} holds 1 NaN"):
        run(model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_values_beyond_float16(model: Path, tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        for key, t in tensors.items():
            tensors[key] = t.bfloat16()
        tensors[DOWN][0, 0] = 1e5

    edit_tensors(model, damage)
    with pytest.raises(SourceError, match=r"down_proj\.weight has 1 values beyond float16"):
        run(model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ---- tokenizer and calibration data -----------------------------------------------------------------------------------


def test_no_tokenizer(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").unlink()
    refused(SourceError, r"tokenizer not found: .*tokenizer\.json", model, tmp_path)


def test_broken_tokenizer(model: Path, tmp_path: Path) -> None:
    (model / "tokenizer.json").write_text("{}")
    refused(SourceError, r"tokenizer\.json: not a tokenizer file", model, tmp_path)


def test_tokenizer_larger_than_the_head(model: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    content = json.loads(tokenizer.to_str())
    content["model"]["vocab"] |= {f"extra {i}": 259 + i for i in range(20)}
    (model / "tokenizer.json").write_text(json.dumps(content))
    refused(SourceError, r"up to id 278 .*needs 279 embedding rows; the model has 272", model, tmp_path)


def test_calibration_file(model: Path, tmp_path: Path) -> None:
    (tmp_path / "data.parquet").write_bytes(b"not parquet")
    refused(CalibrationError, r"data\.parquet", model, tmp_path, cal_dataset=str(tmp_path / "data.parquet"))
    refused(UsageError, r"nothing\.parquet", model, tmp_path, cal_dataset=str(tmp_path / "nothing.parquet"))


def test_rows_longer_than_the_model(model: Path, tmp_path: Path) -> None:
    refused(CalibrationError, r"-l.* 2048 is longer than the 256 positions", model, tmp_path, length=2048, cal_dataset=None)


# ---- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2.0, 2.5, 9.0])
def test_unreachable_bitrate(model: Path, tmp_path: Path, bits: float) -> None:
    with pytest.raises(BudgetError, match=rf"-b {bits:g}: .*2\.5693 \.\. 8\.5693 bits per weight") as refusal:
        run(model, tmp_path / "work", bits=(4.0, bits))
    assert f"nearest that works is -b {2.57 if bits < 4 else 8.57:g}" in refusal.value.hint
    assert not (tmp_path / "work").exists()


def test_measurement_of_another_model(quiet: Quiet, tmp_path: Path) -> None:
    measurement = str(quiet.work / "measurement.json")
    for changes in ({"num_hidden_layers": 3}, {"intermediate_size": 128}, {"family": "Mixtral"}):
        other = write_model(tmp_path / "other", **changes)  # type: ignore[arg-type]
        refused(FormatError, r"-m .*measurement\.json: ", other, tmp_path, measurement=measurement)
        shutil.rmtree(other)


def test_broken_measurement(model: Path, tmp_path: Path) -> None:
    (tmp_path / "m.json").write_text('{"measurement": {}}')
    refused(FormatError, r"m\.json", model, tmp_path, measurement=str(tmp_path / "m.json"))
    refused(FormatError, r"none\.json", model, tmp_path, measurement=str(tmp_path / "none.json"))


# ---- directories ------------------------------------------------------------------------------------------------------


def test_directories_that_cannot_be_made(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file/out"):
        run(model, tmp_path / "work", compile_full=str(tmp_path / "file" / "out"))
    assert not (tmp_path / "work").exists()
    with pytest.raises(StoreError, match=r"file"):
        run(model, tmp_path / "file" / "work")


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_directories_without_permission(model: Path, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"locked"):
        run(model, tmp_path / "work", compile_full=str(tmp_path / "locked" / "out"))
    assert not (tmp_path / "work").exists()
    with pytest.raises(StoreError, match=r"locked"):
        run(model, tmp_path / "locked" / "work")


def test_work_directory_of_somebody_else(model: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").write_text("years of work")
    for no_resume in (False, True):
        with pytest.raises(StoreError, match=r"not a work directory of exl2ray: it has thesis\.tex"):
            run(model, tmp_path / "work", no_resume=no_resume)
    assert contents(tmp_path / "work").keys() == {"thesis.tex"}


def test_output_directory_with_other_weights(quiet: Quiet, tmp_path: Path) -> None:
    """Loaders would read them as a part of the model."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError, match=r"adapter\.safetensors"):
        run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert contents(tmp_path / "out").keys() == {"adapter.safetensors"}


def test_output_directory_with_other_weights_is_refused_at_the_start(quiet: Quiet, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "adapter.safetensors").write_bytes(b"x")
    with pytest.raises(StoreError):
        run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert not (tmp_path / "work" / "quant").exists()


def test_a_bucket_without_cf_is_refused_at_the_start(model: Path) -> None:
    """Shards are streamed into local files."""
    with pytest.raises(UsageError, match="-cf is needed"):
        dry_run(recipe(model, Path("work"), out_dir="s3://bucket/work"), Silent())


# ---- a full disk ------------------------------------------------------------------------------------------------------


def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed write is tried again after some seconds; not in a test."""
    monkeypatch.setattr(Limits.__init__, "__defaults__", (*Limits.__init__.__defaults__[:-1], 0.01))  # type: ignore[misc]
    assert Limits().rest == 0.01


@pytest.mark.parametrize("room", [0, 20_000, 100_000])
def test_disk_fills_up_while_working(quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    """Whatever the moment: one StoreError that says so, and after making room the same command ends with the same bytes."""
    quick_retries(monkeypatch)
    left = [room]
    write_all = local._write_all

    def limited(fd: int, data: Any) -> None:
        left[0] -= len(data)
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_all(fd, data)

    settings = {"compile_full": str(tmp_path / "out")}
    with monkeypatch.context() as full:
        full.setattr(local, "_write_all", limited)
        with pytest.raises(StoreError, match="No space left on device") as caught:
            run(quiet.model, tmp_path / "work", **settings)
    assert "free some space" in caught.value.hint
    assert not (tmp_path / "work" / "driver.lock").exists()
    run(quiet.model, tmp_path / "work", **settings)
    assert contents(tmp_path / "out") == contents(quiet.outputs[4.0])
    if (tmp_path / "work" / "events.jsonl").exists():
        keys = [(f["stage"], f["key"]) for f in logged(tmp_path / "work", "item")]
        assert len(keys) == len(set(keys))


def test_no_room_for_the_output(quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(handle: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr("exl2ray.beneath.reserve", no_room)
        with pytest.raises(StoreError, match="No space left"):
            run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("*.safetensors"))
    _, reporter = run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert {item.partition(" ")[0] for item in items(reporter)} == {"quantize"}  # shards come before it
    assert contents(tmp_path / "out") == contents(quiet.outputs[4.0])


# ---- work directories -------------------------------------------------------------------------------------------------


@pytest.fixture
def work(quiet: Quiet, tmp_path: Path) -> Path:
    """A copy of a finished job's directory."""
    return Path(shutil.copytree(quiet.work, tmp_path / "work"))


def resume(quiet: Quiet, work: Path, model: Path | None = None, **changes: Any) -> Silent:
    """The same command again, in another directory."""
    settings = {"bits": (4.0, 5.0), "compile_full": str(quiet.work.parent / "out-{bpw}")}
    return run(model or quiet.model, work, **{**settings, **changes})[1]


def test_work_directory_of_another_model(quiet: Quiet, work: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=1)
    before = contents(work)
    for reuse in (False, True):
        with pytest.raises(JobMismatchError, match=r"-i: ") as caught:
            resume(quiet, work, other, reuse=reuse, compile_full=str(tmp_path / "{bpw}"))
        assert "-nr" in caught.value.hint
    assert contents(work) == before


def test_the_same_model_may_be_moved(quiet: Quiet, work: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(quiet.model, tmp_path / "moved")
    assert items(resume(quiet, work, moved)) == []


@pytest.mark.parametrize("damage", ["truncated", "edited", "empty"])
def test_corrupted_job(quiet: Quiet, work: Path, damage: str) -> None:
    file = work / "job.json"
    text = file.read_text()
    file.write_text({"truncated": text[: len(text) // 2], "edited": text.replace("128", "256"), "empty": ""}[damage])
    before = contents(work)
    with pytest.raises(StoreError, match=r"job\.json"):
        resume(quiet, work)
    assert contents(work) == before


@pytest.mark.parametrize("damage", ["truncated", "edited", "empty"])
@pytest.mark.parametrize("folder", ["measure", "quant/4.0"])
def test_corrupted_record(quiet: Quiet, work: Path, folder: str, damage: str) -> None:
    (file,) = (work / folder / "records").glob("model.layers.0.mlp.*")
    text = file.read_text()
    edited = text.replace('"seconds":', '"seconds":1', 1)
    file.write_text({"truncated": text[: len(text) // 2], "edited": edited, "empty": ""}[damage])
    with pytest.raises(StoreError, match=r"records/model\.layers\.0\.mlp\.") as caught:
        resume(quiet, work)
    assert "delete this file" in caught.value.hint
    file.unlink()
    stage = "measure" if folder == "measure" else "quantize 4.0"
    assert items(resume(quiet, work)) == [f"{stage}: model.layers.0.mlp"]


def test_damaged_calibration_rows_are_written_again(quiet: Quiet, work: Path) -> None:
    file = work / "calibration.safetensors"
    before = file.read_bytes()
    file.write_bytes(before[:-8] + bytes(8))
    assert items(resume(quiet, work)) == []
    assert file.read_bytes() == before


# ---- links --------------------------------------------------------------------------------------------------------------


def test_links_out_of_the_model(quiet: Quiet, tmp_path: Path) -> None:
    """Nothing starts if a side file is one; weights may be, and a measurement copies nothing."""
    model = Path(shutil.copytree(quiet.model, tmp_path / "model"))
    (tmp_path / "disk").mkdir()
    for name in ("model.safetensors", "generation_config.json"):
        shutil.move(model / name, tmp_path / "disk" / name)
        (model / name).symlink_to(tmp_path / "disk" / name)
    with pytest.raises(SourceError, match=r"generation_config\.json: a link to .*disk"):
        run(model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert not (tmp_path / "work").exists()
    dry_run(recipe(model, tmp_path / "work", output_measurement=str(tmp_path / "m.json")), Silent())
    (model / "generation_config.json").unlink()
    reporter = Silent()
    dry_run(recipe(model, tmp_path / "work", compile_full=str(tmp_path / "out")), reporter)
    assert [m for m in messages(reporter, "warning") if f"model.safetensors to {tmp_path / 'disk'}" in m]
