"""--rotate through whole conversions: an ordinary model of the same quality and size, with an identity of its own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from convert_helpers import assert_sound, contents, items, messages, recipe, run
from evaluation import evaluate
from safetensors.torch import load_file
from tiny_models import write_model

from exl2ray.errors import JobMismatchError, UsageError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.measurement import read_measurement
from exl2ray.model.arch import load_spec
from exl2ray.model.rotated import rotated
from exl2ray.model.weights import read_plain
from exl2ray.plan.compose import Wishes, compose
from exl2ray.terminal.flags import stored_settings

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
IDENTITY = {"method": "hadamard-1", "seed": 0}


@dataclass(frozen=True)
class Pair:
    """A model with tied embeddings, converted with and without --rotate."""

    model: Path
    root: Path
    notes: list[str]

    def work(self, name: str) -> Path:
        return self.root / f"{name}-work"

    def out(self, name: str) -> Path:
        return self.root / f"{name}-out"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    root = tmp_path_factory.mktemp("rotation")
    model = write_model(root / "model", "Llama", hidden_size=96, head_dim=32, tie_word_embeddings=True, attention_bias=True)
    run(model, root / "plain-work", compile_full=str(root / "plain-out"))
    _, reporter = run(model, root / "turned-work", compile_full=str(root / "turned-out"), rotate=True)
    return Pair(model, root, messages(reporter, "note"))


def divergence(model: Path, output: Path, vocabulary: int) -> float:
    ids = torch.randint(3, vocabulary, (8, 128), generator=torch.Generator().manual_seed(1))
    kl = evaluate(output, model, ids, "cpu").kl
    assert kl is not None
    return kl.value


def test_output_is_an_ordinary_model(pair: Pair) -> None:
    """The loader finds what it finds in any other model; the tied head has become one of its own."""
    assert_sound(pair.model, pair.out("turned"))
    plain, turned = (json.loads((pair.out(n) / "config.json").read_text()) for n in ("plain", "turned"))
    assert plain["tie_word_embeddings"] is True
    assert turned.pop("tie_word_embeddings") is False
    assert turned["quantization_config"].pop("rotation") == IDENTITY
    assert {**turned, "tie_word_embeddings": True} == plain
    tensors = [load_file(pair.out(n) / "output.safetensors") for n in ("plain", "turned")]
    assert {k: v.shape for k, v in tensors[0].items() if ".q_" not in k} == {
        k: v.shape for k, v in tensors[1].items() if ".q_" not in k
    }
    source = SourceModel(pair.model)
    spec = rotated(load_spec(source))
    for module in spec.modules:
        for p in module.plain:
            assert torch.equal(tensors[1][p.output_name], read_plain(spec, p, source))
            assert not torch.equal(tensors[1][p.output_name], tensors[0][p.output_name])
    o_bias = "model.layers.0.self_attn.o_proj.bias"
    assert not torch.allclose(tensors[1][o_bias], tensors[0][o_bias], atol=0.1)


def test_quality_is_comparable_at_equal_bits(pair: Pair) -> None:
    """Random weights have no outliers that a rotation could spread: about as good as without."""
    plain, turned = (divergence(pair.model, pair.out(n), 250) for n in ("plain", "turned"))
    assert 0 < turned < 1.5 * plain


def test_planned_bytes_are_those_of_the_file(pair: Pair) -> None:
    job = recipe(pair.model, Path(""), out_dir="", rotate=True, measurement=str(pair.work("turned") / "measurement.json"))
    report = compose(job, Wishes(), bits_given=True, say=print)
    assert report.problems == []
    assert report.sizes[0].files == ((pair.out("turned") / "output.safetensors").stat().st_size,)


def test_the_flag_is_part_of_job_card_and_measurement(pair: Pair) -> None:
    job = json.loads((pair.work("turned") / "job.json").read_text())["job"]
    assert job["identity"]["rotate"] is True
    assert "rotate" not in json.loads((pair.work("plain") / "job.json").read_text())["job"]["identity"]
    assert stored_settings(str(pair.work("turned")))["rotate"] is True
    assert "--rotate" in (pair.out("turned") / "README.md").read_text()
    assert "--rotate" not in (pair.out("plain") / "README.md").read_text()
    assert any("rotated" in note for note in pair.notes)
    assert read_measurement(pair.work("turned") / "measurement.json").rotation == IDENTITY
    assert read_measurement(pair.work("plain") / "measurement.json").rotation is None


def test_same_bytes_again_and_after_a_loss(pair: Pair, tmp_path: Path) -> None:
    """Repeated, nothing is computed; with records of both passes lost, what is computed again is the same."""
    work, settings = tmp_path / "work", {"compile_full": str(tmp_path / "out"), "rotate": True}
    run(pair.model, work, **settings)
    assert contents(tmp_path / "out") == contents(pair.out("turned"))
    assert items(run(pair.model, work, **settings)[1]) == []
    for folder, name in (("measure", "model.layers.1.mlp.*"), ("quant/4.0", "model.layers.1.self_attn.*")):
        (record,) = (work / folder / "records").glob(name)
        record.unlink()
    reporter = run(pair.model, work, **settings)[1]
    assert sorted(items(reporter)) == ["measure: model.layers.1.mlp", "quantize 4.0: model.layers.1.self_attn"]
    assert contents(tmp_path / "out") == contents(pair.out("turned"))


@pytest.mark.parametrize(("name", "rotate"), [("plain", True), ("turned", False)])
def test_another_setting_is_refused_on_resume(pair: Pair, name: str, rotate: bool) -> None:
    before = contents(pair.work(name))
    for reuse in (False, True):
        with pytest.raises(JobMismatchError, match="--rotate: "):
            run(pair.model, pair.work(name), compile_full=str(pair.out(name)), rotate=rotate, reuse=reuse)
    assert contents(pair.work(name)) == before


def test_a_measurement_is_used_for_what_was_measured_only(pair: Pair, tmp_path: Path) -> None:
    def given(name: str, **changes: Any) -> Any:
        return run(pair.model, tmp_path / "work", measurement=str(pair.work(name) / "measurement.json"), **changes)

    with pytest.raises(UsageError, match="measured without --rotate") as caught:
        given("plain", rotate=True)
    assert "leave out --rotate" in caught.value.hint
    with pytest.raises(UsageError, match="measured with --rotate") as caught:
        given("turned")
    assert "give --rotate" in caught.value.hint
    given("turned", rotate=True, compile_full=str(tmp_path / "out"))
    same = [load_file(d / "output.safetensors") for d in (tmp_path / "out", pair.out("turned"))]
    assert all(torch.equal(same[0][k], same[1][k]) for k in same[1])


@pytest.mark.parametrize("propagate", ["quantized", "reference"])
def test_mixture_of_experts_with_everything_on(propagate: str, tmp_path: Path) -> None:
    """Routers rotated too: else tokens would go to other experts, and the divergence be that of a random model."""
    model = write_model(tmp_path / "model", "Mixtral")
    settings: dict[str, Any] = {"quality": "balanced", "allocation": "module", "propagate": propagate}
    run(model, tmp_path / "plain", compile_full=str(tmp_path / "plain-out"), **settings)
    run(model, tmp_path / "turned", compile_full=str(tmp_path / "turned-out"), rotate=True, **settings)
    assert_sound(model, tmp_path / "turned-out")
    plain, turned = (divergence(model, tmp_path / f"{n}-out", 250) for n in ("plain", "turned"))
    assert 0 < turned < 1.5 * plain


def test_a_family_that_cannot_be_rotated_is_refused_at_once(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", "Cohere")
    with pytest.raises(UsageError, match="--rotate: CohereForCausalLM cannot be rotated: its LayerNorm") as caught:
        run(model, tmp_path / "work", rotate=True)
    assert "leave out --rotate" in caught.value.hint
    assert not (tmp_path / "work").exists()


def test_demo_model(tmp_path: Path) -> None:
    """Trained, so its distance from the source means something: with these few rows KL is 0.0055 rotated and not rotated."""
    settings: dict[str, Any] = {"measurement_rows": 4, "dataset_rows": 6, "quality": "balanced"}
    run(DEMO, tmp_path / "work", compile_full=str(tmp_path / "out"), rotate=True, **settings)
    assert_sound(DEMO, tmp_path / "out")
    tokens = torch.from_numpy(np.load(DEMO / "eval-tokens.npy").astype(np.int64))[: 8 * 256].view(8, 256)
    kl = evaluate(tmp_path / "out", DEMO, tokens, "cpu").kl
    assert kl is not None
    assert 0 < kl.value < 0.01
