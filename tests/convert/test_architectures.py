"""Every family of the table through a whole conversion at 4 bpw: names, soundness, config, and distance to the source.

The models are random (tests/oracles.py), so the perplexity is about that of guessing. What shows a wrong tensor is the KL
divergence from the source, as a share of that of the source from guessing: 4 bpw cost up to 0.13 of it on these models;
swapping k and v, gate and up or two layers cost 0.22 or more where tried. Subtler errors of
the forward pass are found in tests/model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_helpers import assert_sound, messages, recipe, run
from evaluation import evaluate
from oracles import VOCAB, complete_model
from safetensors.torch import load_file
from tiny_models import write_text

from exl2ray.convert import Summary
from exl2ray.errors import JobMismatchError
from exl2ray.events import Silent
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.tensorfile import TensorFile
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config, resolve_hyper
from exl2ray.model.table import ARCHITECTURES
from exl2ray.plan.compose import Wishes, compose
from exl2ray.quant import measure_moe
from exl2ray.quant.measure_moe import describe_coverage
from exl2ray.store.open import open_store
from exl2ray.store.records import Records

ROWS, LENGTH = 4, 128
IDS = torch.randint(3, VOCAB, (2, 64), generator=torch.Generator().manual_seed(5))
KL_SHARE = 0.2  # see the module docstring
QUANTISED = ("q_weight", "q_invperm", "q_scale", "q_scale_max", "q_groups")


@dataclass(frozen=True)
class Converted:
    model: Path
    output: Path
    work: Path
    summary: Summary
    reporter: Silent
    information: float  # KL divergence of the source's predictions from the uniform distribution, nats per token


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("calibration") / "rows.jsonl")


@pytest.fixture(scope="module")
def converted(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Converted]:
    """A conversion per family, made once."""

    @cache
    def get(name: str) -> Converted:
        root = tmp_path_factory.mktemp(name)
        logits = complete_model(name, root / "model").run(IDS)[1].log_softmax(-1)
        information = float((logits.exp() * (logits + math.log(VOCAB))).sum(-1).mean())
        summary, reporter = run(
            root / "model", root / "work", compile_full=str(root / "out"), cal_dataset=str(text),
            dataset_rows=ROWS, measurement_rows=ROWS, length=LENGTH, measurement_length=LENGTH,
        )  # fmt: skip
        return Converted(root / "model", root / "out", root / "work", summary, reporter, information)

    return get


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_conversion_is_sound_and_close_to_its_source(name: str, converted: Callable[[str], Converted]) -> None:
    c = converted(name)
    assert_sound(c.model, c.output)
    assert [o.bits for o in c.summary.outputs] == [4.0]
    assert 3.7 < c.summary.outputs[0].achieved_bpw <= 4.0
    result = evaluate(c.output, c.model, IDS, "cpu")
    assert result.kl is not None
    assert 0 < result.kl.value < KL_SHARE * c.information
    assert math.isfinite(result.perplexity.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_output_has_the_names_that_the_loader_demands(
    name: str, converted: Callable[[str], Converted], architectures: dict[str, Any]
) -> None:
    """Modules as the description says, each with exactly the tensors of its kind, and the copied ones besides."""
    c = converted(name)
    spec = load_spec(SourceModel(c.model))
    entry = next(a for a in architectures["architectures"] if a["arch"] == (ARCHITECTURES[name].loads_as or name))
    linears = {x.key: x.has_bias for x in spec.linears}
    norm_bias = spec.arch.norm.bias
    wanted = {x.output_name for x in spec.copied}
    for role, value in entry["tensors"].items():
        if value is None or (role in ("q_norm", "k_norm") and not spec.hyper.qk_norm):
            continue
        for layer in range(spec.hyper.num_layers):
            for expert in range(max(spec.hyper.num_experts, 1)):
                module = value["output"].replace("{L}", str(layer)).replace("{E}", str(expert))
                assert (module in linears) == (role.endswith("_proj") or role == "lm_head"), role
                parts = ["weight"]
                if module in linears:
                    parts = [*QUANTISED, *(["bias"] if linears[module] else [])]
                elif norm_bias and role.startswith(("norm_", "final_norm")):
                    parts = ["weight", "bias"]
                wanted.update(f"{module}.{part}" for part in parts)
    found = {n for shard in c.output.glob("*.safetensors") for n in TensorFile(shard).tensors}
    assert found == wanted
    source = SourceModel(c.model)
    for x in spec.copied:
        written = next(s for s in c.output.glob("*.safetensors") if x.output_name in TensorFile(s).tensors)
        assert torch.equal(load_file(written)[x.output_name], source.load(x.source_name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_planned_bytes_are_those_of_the_files(name: str, converted: Callable[[str], Converted], text: Path) -> None:
    """`exl2ray plan` with the measurement: to the byte; without it between its bounds."""
    c = converted(name)
    sizes = (p.stat().st_size for p in sorted(c.output.glob("*.safetensors")))
    files, settings = tuple(sizes), {"cal_dataset": str(text), "dataset_rows": ROWS, "measurement_rows": ROWS}
    for measurement in (str(c.work / "measurement.json"), None):
        job = recipe(c.model, Path(""), out_dir="", measurement=measurement, **settings)
        report = compose(job, Wishes(), bits_given=True, say=print)
        assert report.problems == []
        (planned,) = report.sizes
        assert planned.files == (files if measurement else ())
        assert planned.low_bytes <= sum(files) <= planned.high_bytes


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_written_config_describes_the_same_model(name: str, converted: Callable[[str], Converted]) -> None:
    """Also without the keys that only transformers 5 reads."""
    c = converted(name)
    source = load_spec(SourceModel(c.model))
    written = json.loads((c.output / "config.json").read_text())
    loaded = ARCHITECTURES[name].loads_as or name
    assert written["architectures"] == [loaded]
    assert {k: v for k, v in written.items() if k != "quantization_config"} == loader_config(
        source.arch, SourceModel(c.model).config
    )
    for level in (written, written.get("text_config", {})):
        for key in ("rope_parameters", "layer_types"):
            level.pop(key, None)
    hyper = resolve_hyper(ARCHITECTURES[loaded], written)
    assert replace(hyper, rope_kind="") == replace(source.hyper, rope_kind="")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("CohereForCausalLM", {"rope_theta": 500000.0, "logit_scale": 0.3, "layer_norm_eps": 1e-5}),
        ("Glm4ForCausalLM", {"partial_rotary_factor": 0.5, "head_dim": 32, "rope_theta": 10000.0}),
        (
            "Gemma2ForCausalLM",
            {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 24},
        ),
        ("Gemma3ForCausalLM", {"sliding_window_pattern": 2, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
        ("Starcoder2ForCausalLM", {"layer_norm_epsilon": 1e-5}),
    ],
)  # fmt: skip
def test_keys_that_the_loader_reads_are_written(
    name: str, expected: dict[str, Any], converted: Callable[[str], Converted]
) -> None:
    written = json.loads((converted(name).output / "config.json").read_text())
    assert {k: written.get(k) for k in expected} == expected


def test_differences_of_the_loader_are_warned_of_by_name(converted: Callable[[str], Converted]) -> None:
    def warned(name: str) -> str:
        found = messages(converted(name).reporter, "warning")
        return "\n".join(m for m in found if not m.startswith("the source model has perplexity"))  # random weights

    for name, text in {
        "Qwen3ForCausalLM": "q/k norm: the loader subtracts the mean",
        "Cohere2ForCausalLM": "positions: the loader applies RoPE on every layer",
        "DbrxForCausalLM": "clip_qkv: the loader does not clamp",
        "Gemma2ForCausalLM": "sliding window: the loader lets a query see one key more",
        "Gemma3ForCausalLM": "written as Gemma3ForConditionalGeneration",
        "Qwen2VLForConditionalGeneration": "RoPE: the loader rounds the inverse frequencies",
    }.items():
        assert text in warned(name), name
    assert warned("GraniteForCausalLM") == ""  # its multiplier differs on biases only, and there are none


def test_coverage_of_experts_is_told_and_kept(converted: Callable[[str], Converted]) -> None:
    c = converted("MixtralForCausalLM")
    stored = Records(open_store(str(c.work)))
    records = {kind: stored.scan(kind).values() for kind in ("measure", "quant/4.0")}
    for kind, found in records.items():
        payloads = {r.key: r.payload for r in found if "block_sparse_moe" in r.key}
        assert len(payloads) == 2, kind
        for payload in payloads.values():
            experts = payload["profile"]["extra"]["experts"] if kind == "measure" else payload["experts"]
            assert sum(e["tokens"] for e in experts) == 2 * ROWS * LENGTH
            assert payload["notes"][0].endswith(describe_coverage(experts))
    told = messages(c.reporter, "note")
    assert sum("4 experts: " in note for note in told) == 4  # two layers, two passes


def test_all_experts_is_part_of_the_job(
    converted: Callable[[str], Converted], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    c = converted("MixtralForCausalLM")
    settings: dict[str, Any] = {
        "compile_full": str(tmp_path / "out"), "cal_dataset": str(text),
        "dataset_rows": ROWS, "measurement_rows": ROWS, "length": LENGTH, "measurement_length": LENGTH,
    }  # fmt: skip
    monkeypatch.setattr(measure_moe, "STARVED_SHARE", 4.0)  # everything counts as starved
    _, reporter = run(c.model, tmp_path / "work", moe_all_experts=True, **settings)
    assert_sound(c.model, tmp_path / "out")
    plain, every = (load_file(p / "output.safetensors") for p in (c.output, tmp_path / "out"))
    key = "model.layers.0.block_sparse_moe.experts.0.w1.q_invperm"
    assert not torch.equal(plain[key], every[key])  # another Hessian, another order
    shared = [f"model.layers.0.block_sparse_moe.experts.{e}.w1.q_invperm" for e in range(4)]
    assert all(torch.equal(every[k], every[shared[0]]) for k in shared)  # all tokens, the same for every expert
    warned = [m for m in messages(reporter, "warning") if "4 of 4 experts got less than" in m]
    assert len(warned) == 4
    with pytest.raises(JobMismatchError, match="--moe-all-experts"):
        run(c.model, tmp_path / "work", **settings)
