"""Estimates reproduce what they are scaled by, and grow as they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from header_models import LLAMA, MIXTRAL_8X7B, write_header_model

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.times import FILES, LOGGED, Times, estimate, far_below, logged_for
from exl2ray.plan.worker_memory import RowSizes
from exl2ray.tune.estimate import a_module_at_a_time, as_a_whole

ROWS = RowSizes((19, 2048), (115, 2048), 0)
LLAMA_7B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000}  # fmt: skip


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return load_spec(SourceModel(write_header_model(tmp_path_factory.mktemp("headers") / "7b", LLAMA_7B, 1)))


def on_h200(spec: ModelSpec, rows: RowSizes = ROWS, bitrates: tuple[str, ...] = ("4.0",), measure: bool = True) -> Times:
    return estimate(spec, rows, bitrates, measure, LOGGED["H200"], "H200", "", whole=False)


def test_logged_layers_come_out_as_they_were_logged(llama_70b: Path) -> None:
    spec = load_spec(SourceModel(llama_70b))
    start, measure, quantize, write = on_h200(spec).stages
    assert (start.stage, write.stage) == ("start", "write")
    assert measure.least_seconds == pytest.approx(80 * (0.779 + 3.579), rel=1e-6)
    assert quantize.least_seconds == pytest.approx(80 * (0.619 + 2.665) + 0.284, rel=0.005)  # its head has other tokens
    assert measure.most_seconds == pytest.approx(measure.least_seconds * FILES["measure"])
    assert (measure.modules, quantize.modules) == (160, 161)


def test_seconds_per_weight_hold_for_another_shape_of_the_log(llama_7b: ModelSpec) -> None:
    """A 7B layer took 0.338 + 0.622 s to measure, 0.248 + 0.481 s to quantise, its head 0.145 s (docs/log.md)."""
    _, measure, quantize, _ = on_h200(llama_7b).stages
    assert measure.least_seconds == pytest.approx(32 * (0.338 + 0.622), rel=0.1)
    assert quantize.least_seconds == pytest.approx(32 * (0.248 + 0.481) + 0.145, rel=0.1)


def test_only_what_will_be_done_counts(llama_7b: ModelSpec) -> None:
    assert [s.stage for s in on_h200(llama_7b, measure=False).stages] == ["start", "quantize 4.0", "write"]
    assert [s.stage for s in on_h200(llama_7b, bitrates=()).stages] == ["start", "measure"]
    two = on_h200(llama_7b, bitrates=("3.0", "4.0"))
    assert two.least_seconds > on_h200(llama_7b).least_seconds + 20


def test_a_whole_conversion_lies_within_the_estimate(tmp_path: Path) -> None:
    """docs/log.md: 8 layers of a 7B shape in 24.2 s, 30.4 s with kernels to compile; under Ray 15 to 20 s more."""
    spec = load_spec(SourceModel(write_header_model(tmp_path / "8", {**LLAMA_7B, "num_hidden_layers": 8}, 1)))
    rows = replace(ROWS, reported=19)
    found = estimate(spec, rows, ("4.0",), True, LOGGED["H200"], "H200", "", whole=False, written_bytes=1_170_000_000)
    assert found.least_seconds < 24.2 < 30.4 < found.most_seconds
    assert found.most_seconds < 40
    with_ray = estimate(spec, rows, ("4.0",), True, LOGGED["H200"], "H200", "", whole=False, ray=True)
    assert with_ray.stages[0].least_seconds == found.stages[0].least_seconds + 15


def test_more_weights_take_longer(llama_7b: ModelSpec, llama_70b: Path, tmp_path: Path) -> None:
    experts = on_h200(load_spec(SourceModel(write_header_model(tmp_path / "moe", MIXTRAL_8X7B, 1))))
    large = on_h200(load_spec(SourceModel(llama_70b)))
    assert on_h200(llama_7b).least_seconds < experts.least_seconds < large.least_seconds


def test_fewer_timed_rows_make_a_range(llama_7b: ModelSpec) -> None:
    """A probe on CPUs times as many rows as it has time for."""
    some = [replace(t, rows=5) for t in LOGGED["H200"]]
    _, measure, quantize, _ = estimate(llama_7b, ROWS, ("4.0",), True, some, "CPU", "", whole=True).stages
    assert measure.most_seconds == pytest.approx(measure.least_seconds * 19 / 5)
    assert quantize.most_seconds == pytest.approx(quantize.least_seconds * 115 / 5)


def test_small_layers_are_told(llama_7b: ModelSpec, tmp_path: Path) -> None:
    small = {**LLAMA_7B, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 4}
    assert not far_below(llama_7b)
    assert far_below(load_spec(SourceModel(write_header_model(tmp_path / "small", small, 1))))


@pytest.mark.parametrize(("name", "found"), [("NVIDIA H200", "H200"), ("NVIDIA H200-SXM", "H200"), ("NVIDIA H20", None),
                                             ("NVIDIA GeForce RTX 4090", None)])  # fmt: skip
def test_only_measured_kinds_have_rates(name: str, found: str | None) -> None:
    assert logged_for(name) == found


SMOLLM2 = {**LLAMA, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
           "num_key_value_heads": 3, "vocab_size": 49152}  # fmt: skip


def test_tuning_takes_what_it_took(llama_7b: ModelSpec, tmp_path: Path) -> None:
    small = load_spec(SourceModel(write_header_model(tmp_path / "small", SMOLLM2, 1)))
    assert as_a_whole(small, 4_000_000).seconds == pytest.approx(85, rel=0.15)
    assert as_a_whole(llama_7b, 1_000_000).seconds == pytest.approx(200, rel=0.25)
    assert a_module_at_a_time(llama_7b, 1_000_000, 250 << 30).seconds > 1.3 * as_a_whole(llama_7b, 1_000_000).seconds
