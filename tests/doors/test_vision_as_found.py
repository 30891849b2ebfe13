"""Models that see, as versions of transformers save them, and what ExLlamaV2 wants of them before it loads anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bounded import exl2ray
from model_folders import write_json
from oracles import ORACLES
from tiny_models import byte_tokenizer, write_text

from exl2ray.formats.hfconfig import legacy_config
from exl2ray.formats.vision import PREPROCESSOR, PROCESSOR, needs_preprocessor, vision_doubt, vision_files

PLAIN: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "rescale_factor": 1 / 255}
GEMMA = {**PLAIN, "size": {"height": 224, "width": 224}, "image_processor_type": "Gemma3ImageProcessor"}
PIXTRAL = {**PLAIN, "size": {"longest_edge": 1024}, "patch_size": 14, "image_processor_type": "PixtralImageProcessor"}
QWEN = {
    **PLAIN, "size": {"shortest_edge": 3136, "longest_edge": 1003520}, "patch_size": 14, "temporal_patch_size": 2,
    "merge_size": 2, "image_processor_type": "Qwen2VLImageProcessor",
}  # fmt: skip
PIXELS = {"min_pixels": 3136, "max_pixels": 1003520}
SEES = "Gemma3ForConditionalGeneration"
CONFIGS: dict[str, dict[str, Any]] = {
    "gemma": {"architectures": [SEES], "vision_config": {"model_type": "siglip_vision_model"}},
    "pixtral": {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {"model_type": "pixtral"}},
    "qwen": {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "vision_config": {"patch_size": 14}},
    "other": {"architectures": ["LlamaForCausalLM"], "vision_config": {"model_type": "clip"}},
    "text": {"architectures": ["Gemma3ForCausalLM"]},
}


def made(folder: Path, kind: str) -> dict[str, Any] | None:
    found = vision_files(folder, CONFIGS[kind])
    assert set(found) <= {PREPROCESSOR}
    return json.loads(found[PREPROCESSOR]) if found else None


@pytest.mark.parametrize(
    ("kind", "saved", "expected"),
    [("gemma", GEMMA, GEMMA), ("pixtral", PIXTRAL, PIXTRAL), ("qwen", QWEN, {**QWEN, **PIXELS}),
     ("qwen", {**QWEN, "min_pixels": 100, "max_pixels": None}, {**QWEN, **PIXELS, "min_pixels": 100}),
     ("gemma", {**GEMMA, "image_processor_type": "Gemma3ImageProcessorFast"}, GEMMA), ("other", GEMMA, GEMMA)],
)  # fmt: skip
def test_what_transformers_5_saves_in_one_file_becomes_the_file_that_is_read(
    kind: str, saved: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    write_json(tmp_path / PROCESSOR, {"processor_class": "Some", "image_processor": saved})
    assert made(tmp_path, kind) == expected
    assert vision_doubt(tmp_path, CONFIGS[kind]) is None


def test_a_file_that_is_read_stays_as_it_is(tmp_path: Path) -> None:
    write_json(tmp_path / PROCESSOR, {"image_processor": GEMMA})
    for kind, stored in (("gemma", GEMMA), ("qwen", {**QWEN, **PIXELS}),
                         ("pixtral", {**PIXTRAL, "image_processor_type": "PixtralImageProcessorFast"})):  # fmt: skip
        write_json(tmp_path / PREPROCESSOR, stored)
        assert made(tmp_path, kind) is None
        assert vision_doubt(tmp_path, CONFIGS[kind]) is None


def test_a_file_of_an_earlier_version_gets_what_it_lacks(tmp_path: Path) -> None:
    write_json(tmp_path / PREPROCESSOR, {**QWEN, "image_processor_type": "Qwen2VLImageProcessorFast"})
    assert made(tmp_path, "qwen") == {**QWEN, **PIXELS}


@pytest.mark.parametrize(
    ("kind", "stored", "said"),
    [("gemma", None, "is missing"), ("other", None, "is missing"), ("qwen", {}, "lacks image_processor_type Qwen2VL"),
     ("gemma", {**GEMMA, "image_processor_type": "CLIPImageProcessor"}, "lacks image_processor_type Gemma3ImageProcessor,"),
     ("gemma", {**GEMMA, "image_mean": None}, "lacks image_mean,")],
)  # fmt: skip
def test_what_cannot_be_made_is_told(kind: str, stored: dict[str, Any] | None, said: str, tmp_path: Path) -> None:
    if stored is not None:
        write_json(tmp_path / PREPROCESSOR, stored)
    assert made(tmp_path, kind) is None
    doubt = vision_doubt(tmp_path, CONFIGS[kind])
    assert said in str(doubt)
    assert "first publisher" in str(doubt)


def test_models_without_a_tower_need_nothing(tmp_path: Path) -> None:
    write_json(tmp_path / PROCESSOR, {"image_processor": GEMMA})
    for config in (CONFIGS["text"], {}, {"vision_config": None}, {"vision_config": [], "architectures": None}):
        assert not needs_preprocessor(config)
        assert vision_files(tmp_path, config) == {}
        assert vision_doubt(tmp_path, config) is None


@pytest.mark.parametrize("content", ["", "[]", '{"image_processor": 5}', "{"])
@pytest.mark.parametrize("name", [PREPROCESSOR, PROCESSOR])
def test_broken_files_make_nothing(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert vision_files(tmp_path, CONFIGS["other"]) == {}


def test_settings_of_a_tower_in_the_older_spelling() -> None:
    axial = {"rope_theta": 10000.0, "rope_type": "axial"}
    pixtral = {"model_type": "pixtral", "rope_parameters": axial}
    tower = legacy_config({**CONFIGS["pixtral"], "vision_config": pixtral})["vision_config"]
    assert repr(tower["rope_theta"]) == "10000"
    assert tower["rope_parameters"] == axial
    assert legacy_config(CONFIGS["qwen"])["vision_config"] == {"patch_size": 14, "spatial_patch_size": 14}
    stated = {"patch_size": 14, "spatial_patch_size": 7, "rope_theta": 5.0, "rope_parameters": axial}
    assert legacy_config({**CONFIGS["qwen"], "vision_config": stated})["vision_config"] == stated


def test_a_model_that_sees_is_converted_and_sound(tmp_path: Path) -> None:
    model, target = tmp_path / "model", tmp_path / "out"
    ORACLES[SEES](model)
    byte_tokenizer().save(str(model / "tokenizer.json"))
    text = write_text(tmp_path / "text.jsonl")
    few = ("-b", "5", "-c", text, "-l", "128", "-ml", "128", "-r", "2", "-mr", "1", "--device", "cpu")
    exl2ray("plan", "-i", model, *few).ends_with(0, f"{PREPROCESSOR} is missing, and ExLlamaV2 loads no model")
    write_json(model / PROCESSOR, {"image_processor": GEMMA})
    places = ("-o", tmp_path / "work", "-cf", target)
    quick = ("--executor", "inline", "--quality", "reference", "--evaluate", "never")
    done = exl2ray("convert", "-i", model, *places, *few, *quick, seconds=120)
    done.ends_with(0)
    assert PREPROCESSOR not in done.text
    assert json.loads((target / PREPROCESSOR).read_text()) == GEMMA
    exl2ray("verify", target, "-i", model).ends_with(0, "sound")
    exl2ray("convert", "-i", model, *places, *few, *quick, seconds=120).ends_with(0)
    assert not (model / PREPROCESSOR).exists()
