"""Families that need BOS are calibrated on rows that begin with it; others, and the plain algorithm, on rows as they are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import write_model, write_text

from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.rows import Rows, begun_with, builtin_rows
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.datasets import pass_rows, sources_of
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.recipe import Recipe

BOS = 1


def rows_of(model: Path, **recipe: object) -> Rows:
    lengths = {"length": 128, "measurement_length": 128, "dataset_rows": 3, "measurement_rows": 2}
    asked = Recipe(str(model), str(model / "work"), (4.0,), **{**lengths, **recipe})  # type: ignore[arg-type]
    source = SourceModel(model)
    spec = load_spec(source)
    with (
        load_tokenizer(str(model), source.config, spec.hyper.vocab_size) as tokenizer,
        CalibrationData(sources_of(asked), tokenizer) as data,
    ):
        return pass_rows(asked, "quantize", tokenizer, spec.hyper.vocab_size, spec, data)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gemma") / "model", "Gemma", num_hidden_layers=1, head_dim=32)


@pytest.mark.parametrize("own_text", [False, True])
def test_every_row_of_a_family_that_needs_bos_begins_with_it(own_text: bool, gemma: Path, tmp_path: Path) -> None:
    text = {"cal_dataset": str(write_text(tmp_path / "text.jsonl"))} if own_text else {}
    plain, begun = rows_of(gemma, quality="reference", **text), rows_of(gemma, **text)
    assert begun.ids[:, 0].tolist() == [BOS] * len(begun.ids)
    assert (plain.ids[:, 0] != BOS).any()
    assert torch.equal(begun.ids[:, 1:], plain.ids[:, 1:])
    assert (begun.kinds, begun.digest, begun.notes) == (plain.kinds, plain.digest, plain.notes)


def test_other_families_keep_their_rows(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", num_hidden_layers=1)
    assert torch.equal(rows_of(model).ids, rows_of(model, quality="reference").ids)


def test_a_bos_that_the_model_does_not_have_is_put_nowhere(gemma: Path) -> None:
    source = SourceModel(gemma)
    spec = load_spec(source)
    asked = Recipe(str(gemma), "work", (4.0,), length=128, measurement_length=128)
    with (
        load_tokenizer(str(gemma), source.config, spec.hyper.vocab_size) as tokenizer,
        CalibrationData([], tokenizer) as data,
    ):
        beyond = replace(spec, hyper=replace(spec.hyper, bos_token_id=spec.hyper.vocab_size))
        found = pass_rows(asked, "measure", tokenizer, spec.hyper.vocab_size, beyond, data)
        usual = builtin_rows(tokenizer, "measure", 128, 0, spec.hyper.vocab_size, max_positions=256)
        assert torch.equal(found.ids, usual.ids)


def test_rows_of_noise_have_no_bos() -> None:
    rows = Rows(torch.tensor([[5, 6], [-1, -1]]), ("web", "noise"), "built-in")
    assert begun_with(rows, BOS).ids.tolist() == [[BOS, 6], [-1, -1]]
