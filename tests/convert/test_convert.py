"""Whole conversions of tiny models: what comes out."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import (
    MEASURED,
    MODULES,
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
from evaluation import evaluate
from exl2_numpy import dequantize_numpy
from safetensors.torch import load_file
from tiny_models import VOCAB, write_model

from exl2ray.convert import convert
from exl2ray.errors import CalibrationError, JobMismatchError
from exl2ray.evaluate.forward import run_model
from exl2ray.events import Silent
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.measurement import check_against, read_measurement
from exl2ray.quant.qparams import head_option


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
        head = head_option(6).layout(64).total_bits(288)
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


def test_what_was_imported_is_left_out_of_collections_while_it_runs(llama: Path, tmp_path: Path) -> None:
    frozen = []

    class Counting(Silent):
        def event(self, name: str, **fields: Any) -> None:
            if name == "item":
                frozen.append(gc.get_freeze_count())

    convert(recipe(llama, tmp_path / "work"), Counting())
    assert min(frozen) > 10_000
    assert gc.get_freeze_count() == 0
    gc.freeze()
    try:
        convert(recipe(llama, tmp_path / "work"), Silent())
        assert gc.get_freeze_count() > 10_000  # what the program had frozen itself stays so
    finally:
        gc.unfreeze()


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


# ---- measurements ------------------------------------------------------------------------------------------------------


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


def test_vocabulary_of_the_tiny_model_is_no_multiple_of_32() -> None:
    """What makes the padding of the head part of every test here."""
    assert VOCAB % 32


def test_numbers_that_json_has_not_in_keys_that_nobody_reads(llama: Path, tmp_path: Path) -> None:
    """``time_step_limit`` of hybrid models, settings of a vision tower: what Python wrote, all can read afterwards."""
    model = Path(shutil.copytree(llama, tmp_path / "model"))
    text = (model / "config.json").read_text().rstrip().removesuffix("}")
    unread = '"time_step_limit": [0.0, Infinity], "vision": {"floor": -Infinity, "mean": NaN}, "note": "NaN"'
    (model / "config.json").write_text(f"{text}, {unread}}}")
    (model / "tokenizer_config.json").write_text('{"model_max_length": Infinity}')
    _, reporter = run(model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    written = (tmp_path / "out" / "config.json").read_text()
    config = json.loads(written, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert config["time_step_limit"] == [0.0, float("inf")]
    assert config["vision"] == {"floor": float("-inf"), "mean": None}
    assert config["note"] == "NaN"
    told = [m for m in messages(reporter, "warning") if "vision.mean is NaN" in m]
    assert len(told) == 1
    assert "time_step_limit.1 is Infinity (a model made from it has 1e999)" in told[0]
    assert_sound(model, tmp_path / "out")
    assert run_model(tmp_path / "out", torch.tensor([[3, 4, 5]]), "cpu").states.shape[:2] == (1, 3)
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    run(model, tmp_path / "work", compile_full=str(tmp_path / "out"))
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before, "written again"
