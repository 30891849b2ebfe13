"""Whole conversions of tiny models: what comes out, what is done again, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import (
    MEASURED,
    QUANTISED,
    Quiet,
    assert_sound,
    contents,
    items,
    logged,
    messages,
    quantised_bytes,
    recipe,
    run,
    shapes,
    stages,
)
from exl2_numpy import dequantize_numpy
from safetensors.torch import load_file
from shard_places import files_of, weights
from tiny_models import VOCAB, write_model

from exl2ray.calibration.soundness import Baseline
from exl2ray.convert import OutputSummary, convert, dry_run
from exl2ray.errors import (
    CalibrationError,
    Interrupted,
    JobMismatchError,
    NumericError,
    StoreError,
    UsageError,
)
from exl2ray.evaluate.compare import evaluate
from exl2ray.evaluate.record import Evaluation, Figure
from exl2ray.events import Silent
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.measurement import check_against, read_measurement
from exl2ray.publish.card import add_evaluation
from exl2ray.quant.qparams import head_option
from exl2ray.result_warnings import output_warnings
from exl2ray.steps.producing import judge
from exl2ray.store import pieces
from exl2ray.store.local import LocalStore

MODULES = [f"model.layers.{i}.{half}" for i in range(2) for half in ("self_attn", "mlp")]


# ---- what comes out ---------------------------------------------------------------------------------------------------


def test_output_is_a_sound_model(quiet: Quiet) -> None:
    for bits, output in quiet.outputs.items():
        assert_sound(quiet.model, output)
        config = json.loads((output / "config.json").read_text())
        quantisation = config["quantization_config"]
        assert quantisation["quant_method"] == "exl2"
        assert (quantisation["bits"], quantisation["head_bits"]) == (bits, 6)
        assert quantisation["calibration"] == {"rows": QUANTISED, "length": 128, "dataset": "calibration.jsonl"}
        assert config["rope_theta"] == 10000.0  # also where transformers 5 writes rope_parameters only
        assert (output / "tokenizer.json").read_bytes() == (quiet.model / "tokenizer.json").read_bytes()
        assert not list(output.glob("*.index.json"))


def test_weights_are_close_to_the_source(quiet: Quiet) -> None:
    source = load_file(quiet.model / "model.safetensors")
    errors = {}
    for bits, output in quiet.outputs.items():
        model = Exl2Model(output)
        assert set(model.keys()) == set(shapes(quiet.model))
        total = 0.0
        for key, shape in shapes(quiet.model).items():
            w = source[f"{key}.weight"].T.float()
            decoded = torch.from_numpy(dequantize_numpy(model.linear(key)))[:, : shape.out_features].float()
            relative = float((decoded - w).norm() / w.norm())
            assert 0 < relative < 0.35, key
            total += relative
        errors[bits] = total
        for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.1.input_layernorm.weight"):
            assert torch.equal(model.load(name), source[name])
    assert errors[5.0] < 0.7 * errors[4.0]


def test_reported_perplexities_are_those_of_the_directories(quiet: Quiet) -> None:
    """Both models, run from their files on the calibration rows."""
    ids = load_file(quiet.work / "calibration.safetensors")["quantize"][:MEASURED]
    for out in quiet.summary.outputs:
        assert out.directory is not None
        result = evaluate(out.directory, quiet.model, ids, "cpu")
        assert result.reference_nll is not None
        assert out.calibration_perplexity == pytest.approx(result.nll.exp().value, rel=2e-3)
        assert out.reference_perplexity == pytest.approx(result.reference_nll.exp().value, rel=2e-3)


def test_bytes_are_what_the_allocation_predicted(quiet: Quiet) -> None:
    measurement = read_measurement(quiet.work / "measurement.json")
    keys = set(shapes(quiet.model))
    weights = sum(s.in_features * s.padded_out for k, s in shapes(quiet.model).items() if k != "lm_head")
    for fields, out in zip(logged(quiet.work, "allocated"), quiet.summary.outputs, strict=True):
        lists = [options for p in measurement.profiles for options in p.slots()]
        chosen = [options[c].total_bits for options, c in zip(lists, fields["choice"], strict=True)]
        head = head_option(6).total_bits(64, 288)
        assert quantised_bytes(quiet.outputs[out.bits], keys) * 8 == sum(chosen) + head
        assert out.achieved_bpw == pytest.approx(sum(chosen) / weights)
        assert out.bits - 0.3 < out.achieved_bpw <= out.bits
        assert fields["gap"] < 1e-3
        assert out.file_bytes == sum(p.stat().st_size for p in quiet.outputs[out.bits].glob("*.safetensors"))


def test_measurement_file_is_complete(quiet: Quiet) -> None:
    measurement = read_measurement(quiet.summary.measurement)
    expected = [*MODULES, "model.norm.norm", "lm_head.linear"]
    assert [p.entry_key for p in measurement.profiles] == expected
    assert measurement.last_module_idx == 6
    by_role: dict[str, dict[str, list[Any]]] = {m: {} for m in MODULES}
    for key, shape in shapes(quiet.model).items():
        if key != "lm_head":
            module, role = key.rsplit(".", 1)
            by_role[module].setdefault(role, []).append(shape)
    check_against(measurement, expected, by_role)
    accuracies = [o.accuracy for p in measurement.profiles for options in p.slots() for o in options]
    assert len(accuracies) == 2 * (19 + 17)
    assert 0.8 < min(accuracies) < max(accuracies) < 1


def test_events_tell_the_story(quiet: Quiet) -> None:
    names = [name for name, _ in quiet.reporter.events if name != "note"]
    assert names[0] == "start"
    assert names[-1] == "done"
    done = [s for s in stages(quiet.reporter) if not s.startswith("compile")]
    assert done == ["measure", "quantize 4.0", "quantize 5.0"]
    assert sorted(items(quiet.reporter)) == sorted(
        [f"measure: {m}" for m in MODULES]
        + [f"quantize {b}: {m}" for b in ("4.0", "5.0") for m in [*MODULES, "lm_head.linear"]]
    )
    ended = [f["stage"] for name, f in quiet.reporter.events if name == "end"]
    assert set(stages(quiet.reporter)) == set(ended)


def test_a_second_conversion_elsewhere_gives_the_same_bytes(quiet: Quiet, tmp_path: Path) -> None:
    """Another directory, a copy of the model, one bitrate at a time: nothing of that is in the output."""
    model = tmp_path / "copy"
    shutil.copytree(quiet.model, model)
    run(model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(quiet.outputs[4.0])
    assert (tmp_path / "work" / "measurement.json").read_bytes() == (quiet.work / "measurement.json").read_bytes()


@pytest.mark.parametrize("family", ["Mixtral", "Cohere", "Qwen2"])
def test_other_kinds_of_blocks(family: str, tmp_path: Path) -> None:
    """Experts, a parallel block with tied embeddings, biases."""
    tied = {"tie_word_embeddings": True} if family == "Cohere" else {}
    model = write_model(tmp_path / "model", family, **tied)
    summary, _ = run(model, tmp_path / "work", bits=(4.5,), compile_full=str(tmp_path / "out"))
    assert_sound(model, tmp_path / "out")
    out = summary.outputs[0]
    assert out.achieved_bpw <= 4.5
    ids = load_file(tmp_path / "work" / "calibration.safetensors")["quantize"][:MEASURED]
    result = evaluate(tmp_path / "out", model, ids, "cpu")
    assert result.kl is not None
    assert result.kl.value < 0.5
    # `evaluate` puts BOS before the rows of Cohere, as its definition wants.
    assert result.nll.exp().value == pytest.approx(out.calibration_perplexity, rel=0.1 if tied else 5e-3)


def test_source_of_several_shards_in_bfloat16(llama: Path, tmp_path: Path) -> None:
    import transformers

    model = tmp_path / "model"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    loaded.save_pretrained(model, max_shard_size="60KB")
    shutil.copy(llama / "tokenizer.json", model)
    assert len(list(model.glob("*.safetensors"))) > 1
    run(model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert_sound(model, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_shards_keep_to_the_limit(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", vocab_size=12000)  # 1.5 MB of embeddings in float16, 0.6 MB of head
    summary, _ = run(model, tmp_path / "work", compile_full=str(tmp_path / "out"), shard_size=1)
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors")}
    count = len(sizes)
    assert count >= 2
    assert sorted(sizes) == [f"output-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert sorted(summary.outputs[0].files) == sorted(str(tmp_path / "out" / n) for n in sizes)
    # A single tensor above the limit has a shard of its own; the others stay below it (headers are small).
    assert sum(size > 1.01 * (1 << 20) for size in sizes.values()) == 1
    assert_sound(model, tmp_path / "out")
    run(model, tmp_path / "work", compile_full=str(tmp_path / "out"), shard_size=0, reuse=True)
    assert [p.name for p in (tmp_path / "out").glob("*.safetensors")] == ["output.safetensors"]
    assert_sound(model, tmp_path / "out")


def test_without_cf_the_shards_are_in_the_work_directory(quiet: Quiet, tmp_path: Path) -> None:
    summary, _ = run(quiet.model, tmp_path / "work")
    assert summary.outputs[0].directory is None
    (file,) = summary.outputs[0].files
    assert Path(file).is_relative_to(tmp_path / "work")
    assert Path(file).read_bytes() == (quiet.outputs[4.0] / "output.safetensors").read_bytes()
    _, reporter = run(quiet.model, tmp_path / "work")
    assert items(reporter) == []
    summary, _ = run(quiet.model, tmp_path / "work", bits=(4.0, 5.0), reuse=True)
    for out in summary.outputs:
        (file,) = out.files
        assert Path(file).read_bytes() == (quiet.outputs[out.bits] / "output.safetensors").read_bytes()


def test_builtin_calibration_text(llama: Path, tmp_path: Path) -> None:
    summary, _ = run(llama, tmp_path / "work", compile_full=str(tmp_path / "out"), cal_dataset=None)
    assert_sound(llama, tmp_path / "out")
    rows = load_file(tmp_path / "work" / "calibration.safetensors")
    assert {name: tuple(t.shape) for name, t in rows.items()} == {"measure": (19, 128), "quantize": (115, 128)}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["calibration"] == {"rows": 115, "length": 128, "dataset": "(default)"}
    result = evaluate(tmp_path / "out", llama, rows["quantize"][:19], "cpu")
    assert summary.outputs[0].calibration_perplexity == pytest.approx(result.nll.exp().value, rel=2e-3)


def test_too_little_calibration_text(llama: Path, tmp_path: Path) -> None:
    for changes, flag in (({"dataset_rows": 500}, r"-r 500"), ({"measurement_rows": 500}, r"-mr 500")):
        with pytest.raises(CalibrationError, match=flag):
            run(llama, tmp_path / "work", **changes)
    assert not (tmp_path / "work").exists()


def test_reference_states(quiet: Quiet, tmp_path: Path) -> None:
    """--propagate reference: other tensors than the default, a sound model, resumed without work."""
    settings = {"compile_full": str(tmp_path / "out"), "propagate": "reference"}
    summary, first = run(quiet.model, tmp_path / "work", **settings)
    assert_sound(quiet.model, tmp_path / "out")
    assert summary.outputs[0].calibration_perplexity == pytest.approx(
        quiet.summary.outputs[0].calibration_perplexity, rel=0.1
    )
    before = contents(tmp_path / "out")
    assert before["output.safetensors"] != contents(quiet.outputs[4.0])["output.safetensors"]
    assert len(items(first)) >= len(MODULES) * 2 + 1
    again, second = run(quiet.model, tmp_path / "work", **settings)
    assert items(second) == []
    assert again.outputs == summary.outputs
    assert contents(tmp_path / "out") == before


# ---- measurements -----------------------------------------------------------------------------------------------------


def test_measuring_only_and_reusing_the_file(quiet: Quiet, tmp_path: Path) -> None:
    summary, reporter = run(quiet.model, tmp_path / "a", output_measurement=str(tmp_path / "sub" / "m.json"))
    assert summary.outputs == ()
    assert stages(reporter) == ["measure"]
    file = tmp_path / "sub" / "m.json"
    assert summary.measurement == str(file)
    assert file.read_bytes() == (quiet.work / "measurement.json").read_bytes()
    _, reporter = run(quiet.model, tmp_path / "b", measurement=str(file), compile_full=str(tmp_path / "out"))
    assert "measure" not in stages(reporter)
    found, expected = contents(tmp_path / "out"), contents(quiet.outputs[4.0])
    assert found.pop("README.md") != expected.pop("README.md")  # the card says where the measurement came from
    assert found == expected


def test_a_conversion_goes_on_where_measuring_stopped(quiet: Quiet, tmp_path: Path) -> None:
    """`measure -o W`, then `convert -o W -b 5.0 -cf OUT`: no setting was decided before, so none has changed."""
    work = tmp_path / "work"
    convert(recipe(quiet.model, work, output_measurement=str(work / "measurement.json")), Silent())
    reporter = Silent()
    convert(recipe(quiet.model, work, bits=(5.0,), compile_full=str(tmp_path / "out")), reporter)
    assert "measure" not in [f.get("stage") for name, f in reporter.events if name == "stage"]
    assert (tmp_path / "out" / "output.safetensors").read_bytes() == (quiet.outputs[5.0] / "output.safetensors").read_bytes()
    with pytest.raises(JobMismatchError, match="-b"):
        convert(recipe(quiet.model, work, bits=(4.0,), compile_full=str(tmp_path / "out")), Silent())


def test_measurement_into_a_directory(quiet: Quiet, tmp_path: Path) -> None:
    (tmp_path / "measured").mkdir()
    run(quiet.model, tmp_path / "work", output_measurement=str(tmp_path / "measured"))
    assert (tmp_path / "measured" / "measurement.json").read_bytes() == (quiet.work / "measurement.json").read_bytes()


def test_the_summary_names_a_measurement_that_exists(quiet: Quiet, tmp_path: Path) -> None:
    summary, _ = run(
        quiet.model, tmp_path / "w", measurement=str(quiet.work / "measurement.json"), compile_full=str(tmp_path / "o")
    )
    assert Path(summary.measurement).is_file()


# ---- resuming ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(quiet: Quiet, tmp_path: Path) -> Path:
    """A copy of the quiet work directory, which thinks that it was made for outputs below tmp_path."""
    settings = {"bits": (4.0, 5.0), "compile_full": str(tmp_path / "out-{bpw}")}
    shutil.copytree(quiet.work, tmp_path / "work")
    run(quiet.model, tmp_path / "work", reuse=True, **settings)
    return tmp_path


def again(quiet: Quiet, root: Path, **changes: Any) -> Silent:
    settings = {"bits": (4.0, 5.0), "compile_full": str(root / "out-{bpw}")}
    return run(quiet.model, root / "work", **{**settings, **changes})[1]


def test_a_work_directory_may_be_moved(quiet: Quiet, finished: Path) -> None:
    assert contents(finished / "out-4.0") == contents(quiet.outputs[4.0])
    assert contents(finished / "out-5.0") == contents(quiet.outputs[5.0])


def test_a_finished_job_computes_nothing(quiet: Quiet, finished: Path) -> None:
    before = contents(finished / "work" / "quant"), contents(finished / "out-4.0")
    reporter = again(quiet, finished)
    assert items(reporter) == []
    assert [s for s in stages(reporter) if not s.startswith("compile")] == []
    assert (contents(finished / "work" / "quant"), contents(finished / "out-4.0")) == before


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
    assert [o["calibration_perplexity"] for o in done["outputs"]] == [
        o.calibration_perplexity for o in quiet.summary.outputs
    ]


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


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"head_bits": 4}, "-hb: 6 -> 4"),
        ({"bits": (4.0,)}, r"-b: \[4.0, 5.0\] -> \[4.0\]"),
        ({"shard_size": 1}, "-ss: 8192 -> 1"),
        ({"length": 256}, "-l: 128 -> 256"),
        ({"seed": 3}, "--seed: 0 -> 3"),
        ({"damping": 0.05}, "--damping: 0.12 -> 0.05"),
        ({"rope_alpha": 2.0}, "-ra: null -> 2.0"),
    ],
)
def test_changed_settings_are_refused(quiet: Quiet, finished: Path, changes: dict[str, Any], flag: str) -> None:
    before = contents(finished)
    with pytest.raises(JobMismatchError, match=flag):
        again(quiet, finished, **changes)
    assert contents(finished) == before


def test_reuse_keeps_the_measurement(quiet: Quiet, finished: Path) -> None:
    reporter = again(quiet, finished, reuse=True, head_bits=4)
    assert items(reporter) == ["quantize 4.0: lm_head.linear", "quantize 5.0: lm_head.linear"]
    assert_sound(quiet.model, finished / "out-4.0")
    reporter = again(quiet, finished, reuse=True, bits=(4.5,), compile_full=str(finished / "out"))
    assert {i.split(":")[0] for i in items(reporter)} == {"quantize 4.5"}
    assert_sound(quiet.model, finished / "out")


def test_reuse_with_longer_quantisation_rows_keeps_the_measurement(quiet: Quiet, finished: Path) -> None:
    reporter = again(quiet, finished, reuse=True, length=256)
    assert not any(i.startswith("measure") for i in items(reporter))


@pytest.mark.parametrize("changes", [{"measurement_length": 256}, {"seed": 1}, {"damping": 0.2}, {"rope_scale": 2.0}])
def test_reuse_does_not_cover_what_the_measurement_depends_on(
    quiet: Quiet, finished: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(JobMismatchError):
        again(quiet, finished, reuse=True, **changes)


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


# ---- refusals ---------------------------------------------------------------------------------------------------------


def test_output_directory_must_not_be_the_source(llama: Path, tmp_path: Path) -> None:
    before = contents(llama)
    (tmp_path / "link").symlink_to(llama)
    for changes in ({"compile_full": str(llama)}, {"compile_full": str(tmp_path / "link")}):
        with pytest.raises(UsageError, match=r"is the source model"):
            run(llama, tmp_path / "work", **changes)
    with pytest.raises(UsageError, match=r"is the source model"):
        run(llama, llama)
    assert contents(llama) == before
    assert not (tmp_path / "work").exists()


def test_dry_run_writes_nothing(llama: Path, tmp_path: Path) -> None:
    reporter = Silent()
    dry_run(recipe(llama, tmp_path / "work", compile_full=str(tmp_path / "out")), reporter)
    assert list(tmp_path.iterdir()) == []
    assert any("nothing was computed" in m for m in messages(reporter, "note"))


def test_two_drivers_on_one_directory(quiet: Quiet, tmp_path: Path) -> None:
    class Second(Silent):
        def event(self, name: str, **fields: Any) -> None:
            super().event(name, **fields)
            if name == "item" and fields["done"] == 1 and fields["stage"] == "measure":
                with pytest.raises(StoreError, match="driver"):
                    run(quiet.model, tmp_path / "work")
                self.refused = True

    reporter = Second()
    convert(recipe(quiet.model, tmp_path / "work", output_measurement=str(tmp_path / "m.json")), reporter)
    assert reporter.refused
    assert (tmp_path / "m.json").read_bytes() == (quiet.work / "measurement.json").read_bytes()


# ---- perplexity limits ------------------------------------------------------------------------------------------------


class Judge:
    """`judge` needs nothing of a job; what does not stop it is a warning."""

    def __call__(self, after: float | None, before: float | None) -> list[str]:
        out = OutputSummary(4.0, 3.99, "/out", ("/out/output.safetensors",), 1000, after, before)
        judge([out])
        return output_warnings(after, before, Baseline(50000, 20000.0, 100000))


@pytest.mark.parametrize(("after", "before"), [(12.0, 10.0), (30.0, 29.0), (100.0, 40.0), (5000.0, 2000.0), (900.0, 800.0)])
def test_perplexities_that_pass(after: float, before: float) -> None:
    assert Judge()(after, before) == []


@pytest.mark.parametrize(("after", "before"), [(30.1, 10.0), (99.0, 29.9)])
def test_perplexities_that_are_suspicious(after: float, before: float) -> None:
    (message,) = Judge()(after, before)
    assert f"{after:.4g}" in message
    assert f"{before:.4g}" in message


@pytest.mark.parametrize(
    ("after", "before"), [(None, 10.0), (101.0, 10.0), (1001.0, 900.0), (1001.0, 500.0), (20001.0, 2000.0), (None, None)]
)
def test_perplexities_of_broken_models(after: float | None, before: float | None) -> None:
    with pytest.raises(NumericError, match="the quantised model is broken") as caught:
        Judge()(after, before)
    assert "/out/output.safetensors" in caught.value.hint
    assert "4 bpw" in caught.value.message


def test_a_broken_model_is_an_error_that_keeps_the_files(
    quiet: Quiet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exl2ray.result_warnings.BROKEN_RATIO", 0.5)
    for _ in range(2):  # a resume says the same
        with pytest.raises(NumericError, match=r"calibration perplexity \d+.*of the source model \d+"):
            run(quiet.model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert contents(tmp_path / "out") == contents(quiet.outputs[4.0])


def test_vocabulary_of_the_tiny_model_is_no_multiple_of_32() -> None:
    """What makes the padding of the head part of every test here."""
    assert VOCAB % 32
