"""Estimates reproduce what they are scaled by, and grow as they should."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from header_models import LLAMA, MIXTRAL_8X7B, write_header_model

from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import ModelSpec
from exl2ray.plan.memory import RowSizes
from exl2ray.plan.times import FILES, LOGGED, Times, estimate, logged_for
from exl2ray.plan.work import Work, finishing, forward, measuring, quantizing, seconds, shape_of

ROWS = RowSizes((19, 2048), (115, 2048), 0)
LLAMA_7B = {**LLAMA, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
            "num_key_value_heads": 32, "vocab_size": 32000}  # fmt: skip


@pytest.fixture(scope="module")
def llama_7b(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    return load_spec(SourceModel(write_header_model(tmp_path_factory.mktemp("headers") / "7b", LLAMA_7B, 1)))


def on_h200(spec: ModelSpec, rows: RowSizes = ROWS, bitrates: tuple[str, ...] = ("4.0",), measure: bool = True) -> Times:
    return estimate(spec, rows, bitrates, measure, LOGGED["H200"], "H200", "", whole=False)


def test_logged_layers_come_out_as_they_were_logged(llama_7b: ModelSpec) -> None:
    start, measure, quantize, write = on_h200(llama_7b).stages
    assert (start.stage, write.stage) == ("start", "write")
    assert measure.least_seconds == pytest.approx(32 * (0.338 + 0.622))
    assert quantize.least_seconds == pytest.approx(32 * (0.248 + 0.481) + 0.145)
    assert measure.most_seconds == pytest.approx(measure.least_seconds * FILES["measure"])
    assert (measure.modules, quantize.modules) == (64, 65)


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


def test_between_and_beyond_the_logged_sizes(llama_7b: ModelSpec, llama_70b: Path, tmp_path: Path) -> None:
    large = on_h200(load_spec(SourceModel(llama_70b)))
    assert large.stages[1].least_seconds == pytest.approx(80 * (0.779 + 3.579), rel=1e-6)
    experts = on_h200(load_spec(SourceModel(write_header_model(tmp_path / "moe", MIXTRAL_8X7B, 1))))
    assert on_h200(llama_7b).least_seconds < experts.least_seconds < large.least_seconds
    fewer = on_h200(llama_7b, replace(ROWS, measure=(10, 2048)))
    assert fewer.stages[1].least_seconds < on_h200(llama_7b).stages[1].least_seconds


def test_counts_of_a_layer_by_hand(llama_7b: ModelSpec) -> None:
    """speed-study's table: 16 x 2048 tokens take 4.9 and 8.9 TFLOP in one forward of attention and MLP."""
    attention, mlp = llama_7b.modules[1:3]
    one = forward(shape_of(attention, llama_7b.hyper), 16, 2048)
    assert one.products == 2 * 16 * 2048 * 4 * 4096**2
    assert one.attention == 2 * 16 * 2048**2 * 4096
    assert one.flops == pytest.approx(4.9e12, rel=0.03)
    shape = shape_of(mlp, llama_7b.hyper)
    assert forward(shape, 16, 2048).flops == pytest.approx(8.9e12, rel=0.01)
    measured = measuring(shape, 16, 2048)
    assert measured.hessians == 2 * 16 * 2048 * (4096**2 + 11008**2)
    assert measured.factors == pytest.approx((4096**3 + 11008**3) / 3)
    assert measured.updates == 26 * 4096**2 * 11008 + 14 * 11008**2 * 4096
    # a reference forward, 13 + 13 distinct outputs of gate and up, 17 of down
    assert measured.products == 2 * 16 * 2048 * 4096 * 11008 * (3 + 26 + 17)
    assert measured.weight_bytes == 2 * 3 * 4096 * 11008
    solved = quantizing(shape, 16, 2048, 0)
    assert solved.updates == 2 * 4096**2 * 11008 + 11008**2 * 4096
    assert solved.steps == 4096 + 11008


def test_experts_count_the_tokens_that_reach_them(tmp_path: Path) -> None:
    spec = load_spec(SourceModel(write_header_model(tmp_path / "moe", {**MIXTRAL_8X7B, "num_hidden_layers": 1}, 1)))
    module = spec.modules[2]
    assert module.kind == "moe"
    work = forward(shape_of(module, spec.hyper), 1, 1024)
    assert work.products == pytest.approx(2 * 1024 * 2 * 3 * 4096 * 14336), "two of eight experts"


def test_seconds_add_up() -> None:
    assert seconds(Work(products=700e12)) == pytest.approx(1.0)
    both = Work(products=1e12, search=2e12) + Work(hessians=3e12, weight_bytes=5.0)
    assert seconds(both) == pytest.approx(1 / 700 + 2 / 1.6 + 3 / 767)
    assert both.weight_bytes == 5.0


def test_the_head_is_counted_once_and_logits_for_reported_rows(llama_7b: ModelSpec) -> None:
    head = shape_of(llama_7b.modules[-1], llama_7b.hyper)
    none, some = finishing(head, 115, 2048, 0), finishing(head, 115, 2048, 19)
    assert some.products - none.products == 2 * 2 * 19 * 2048 * 4096 * 32000


@pytest.mark.parametrize(("name", "found"), [("NVIDIA H200", "H200"), ("NVIDIA H200-SXM", "H200"), ("NVIDIA H20", None),
                                             ("NVIDIA GeForce RTX 4090", None)])  # fmt: skip
def test_only_measured_kinds_have_rates(name: str, found: str | None) -> None:
    assert logged_for(name) == found
