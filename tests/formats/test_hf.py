"""Source models: lazy reading against the safetensors library, fingerprints, config spellings."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from exl2ray.errors import FormatError, SourceError
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.hfconfig import config_value, legacy_config
from exl2ray.formats.tensorfile import TensorFile, read_tensor

CONFIG = {"architectures": ["LlamaForCausalLM"], "hidden_size": 4}


def model_directory(path: Path, shards: dict[str, dict[str, torch.Tensor]], config: object = CONFIG) -> Path:
    path.mkdir(exist_ok=True)
    for name, tensors in shards.items():
        save_file(tensors, path / name)
    (path / "config.json").write_text(json.dumps(config))
    return path


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.uint8]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_reads_what_the_library_wrote(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {}
    for i in range(8):
        shape = tuple(int(n) for n in rng.integers(0, 6, rng.integers(0, 4)))
        tensors[f"t{i}.ü"] = torch.from_numpy(np.array(rng.normal(size=shape) * 50)).to(DTYPES[i % len(DTYPES)])
    path = tmp_path_factory.mktemp("r") / "t.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    f = TensorFile(path)
    assert set(f.tensors) == set(tensors)
    for name, t in tensors.items():
        assert read_tensor(f.tensors[name]).dtype == t.dtype
        assert torch.equal(read_tensor(f.tensors[name]), t)
        if t.dim():
            a, b = sorted(int(x) for x in rng.integers(-7, 8, 2))
            assert torch.equal(read_tensor(f.tensors[name], slice(a, b)), t[a:b])


def test_float8_and_bool_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 5).to(torch.float8_e4m3fn), "b": torch.tensor([True, False])}
    save_file(tensors, tmp_path / "t.safetensors")
    f = TensorFile(tmp_path / "t.safetensors")
    assert torch.equal(read_tensor(f.tensors["a"]).view(torch.uint8), tensors["a"].view(torch.uint8))
    assert torch.equal(read_tensor(f.tensors["b"]), tensors["b"])


def test_model_over_several_shards(tmp_path: Path) -> None:
    shards = {f"model-{i}.safetensors": {f"w{i}": torch.full((4, 2), float(i))} for i in range(3)}
    path = model_directory(tmp_path / "m", shards)
    (path / ".cache.safetensors").write_bytes(b"not a shard")
    (path / "old.safetensors").mkdir()
    m = SourceModel(path)
    assert m.names() == ["w0", "w1", "w2"]
    assert "w1" in m
    assert "w9" not in m
    assert (m.shape("w2"), m.dtype("w2"), m.nbytes("w2")) == ((4, 2), "F32", 32)
    assert m.file("w2").name == "model-2.safetensors"
    assert m.architecture == "LlamaForCausalLM"
    assert torch.equal(m.load("w2", slice(1, 3)), torch.full((2, 2), 2.0))
    with pytest.raises(SourceError, match="'w9'"):
        m.load("w9")
    with pytest.raises(SourceError, match="step 1"):
        m.load("w2", slice(0, 4, 2))


def test_reading_a_file_that_shrank_is_an_error_not_a_crash(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m", {"a.safetensors": {"w": torch.zeros(5000)}})
    m = SourceModel(path)
    with (path / "a.safetensors").open("r+b") as f:
        f.truncate(1000)
    with pytest.raises(SourceError, match=r"a\.safetensors: tensor 'w': the file ends"):
        m.load("w")
    with pytest.raises(SourceError, match=r"a\.safetensors: tensor 'w'"):
        m.fingerprint()
    (path / "a.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be read"):
        m.load("w")


def test_what_an_index_names_and_no_file_has_is_kept_apart(tmp_path: Path) -> None:
    path = model_directory(tmp_path / "m", {"model-1.safetensors": {"w": torch.zeros(2)}})
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors"}}))
    assert (SourceModel(path).names(), SourceModel(path).absent, SourceModel(path).notes) == (["w"], {}, [])
    index.write_text(json.dumps({"weight_map": {"w": "model-1.safetensors", "v": "../model-2.safetensors"}}))
    assert SourceModel(path).absent == {"v": "../model-2.safetensors"}
    assert Exl2Model(path).names() == ["w"]  # a stale index of the source is normal there


def test_exl2_model_raises_format_errors(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"1234")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FormatError, match="4 bytes"):
        Exl2Model(tmp_path)


def test_fingerprint_notices_changes(tmp_path: Path) -> None:
    tensors = {"w": torch.arange(20_000.0), "v": torch.zeros(3)}
    path = model_directory(tmp_path / "m", {"a.safetensors": tensors})
    first = SourceModel(path)
    base, base_v = first.fingerprint(), first.fingerprint(["v"])
    assert SourceModel(path).fingerprint() == base
    assert first.fingerprint(["v", "w"]) == first.fingerprint(["w", "v"]) != base_v

    changes = {
        "values": {**tensors, "w": tensors["w"] + 1},
        "dtype": {**tensors, "w": tensors["w"].view(torch.int32)},
        "shape": {**tensors, "w": tensors["w"].reshape(2, -1)},
        "name": {"x": tensors["w"], "v": tensors["v"]},
        "surplus": {**tensors, "x": torch.zeros(1)},
    }
    prints = {base}
    for changed in changes.values():
        save_file(changed, path / "a.safetensors")
        model = SourceModel(path)
        prints.add(model.fingerprint())
        assert model.fingerprint(["v"]) == base_v
    assert len(prints) == 1 + len(changes)
    save_file({**tensors, "v": torch.ones(3)}, path / "a.safetensors")
    assert SourceModel(path).fingerprint(["v"]) != base_v

    save_file(tensors, path / "a.safetensors")
    assert SourceModel(path).fingerprint() == base
    (path / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": 8}))
    assert SourceModel(path).fingerprint() != base


# -- config spellings ----------------------------------------------------------------------------------------------


def config(architecture: str = "LlamaForCausalLM", **keys: object) -> dict[str, object]:
    return {"architectures": [architecture], **keys}


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SLIDING, FULL = "sliding_attention", "full_attention"
QWEN_VL = "Qwen2_5_VLForConditionalGeneration"

# config, keys that must be added or changed at top level
SPELLINGS = {
    "old spelling stays": (config(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **LLAMA3}), {}),
    "theta": (config(rope_parameters={"rope_type": "default", "rope_theta": 1e6}), {"rope_theta": 1e6}),
    "null theta": (config(rope_theta=None, rope_parameters={"rope_theta": 7.0}), {"rope_theta": 7.0}),
    "llama3": (
        config(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}),
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    ),
    "partial rotary": (
        config("Glm4ForCausalLM", rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
        {"partial_rotary_factor": 0.5},
    ),
    "longrope": (
        config(
            "Phi3ForCausalLM",
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "long_factor": [2.0],
                "short_factor": [1.0],
                "original_max_position_embeddings": 4096,
            },
        ),
        {
            "rope_theta": 1e4,
            "original_max_position_embeddings": 4096,
            "rope_scaling": {
                "rope_type": "longrope",
                "long_factor": [2.0],
                "short_factor": [1.0],
                "original_max_position_embeddings": 4096,
            },
        },
    ),
    "both selectors": (
        config(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2.0}),
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "mrope": (
        config(QWEN_VL, rope_parameters={"rope_type": "default", "mrope_section": [1, 2], "rope_theta": 1e6}),
        {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}},
    ),
    "mrope rewritten by transformers 4.57": (
        config(QWEN_VL, rope_scaling={"type": "default", "rope_type": "default", "mrope_section": [1, 2]}),
        {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}},
    ),
    "cohere 2": (config("Cohere2ForCausalLM", layer_types=([SLIDING] * 3 + [FULL]) * 2), {"sliding_window_pattern": 4}),
    "no full layer": (
        config("Cohere2ForCausalLM", layer_types=[SLIDING] * 2, sliding_window_pattern=4),
        {},
    ),
    "no full layer, no pattern": (
        config("Cohere2ForCausalLM", layer_types=[SLIDING] * 2),
        {"sliding_window_pattern": 3},
    ),
    "layer types of others": (config("Qwen2ForCausalLM", layer_types=[FULL, FULL]), {}),
    "starcoder 2": (config("Starcoder2ForCausalLM", norm_epsilon=1e-5), {"layer_norm_epsilon": 1e-5}),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_legacy_config(case: str) -> None:
    source, added = SPELLINGS[case]
    before = json.dumps(source)
    assert legacy_config(source) == {**source, **added}
    assert json.dumps(source) == before
    assert legacy_config(legacy_config(source)) == legacy_config(source)


def test_gemma_3_multimodal() -> None:
    text = {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            SLIDING: {"rope_type": "default", "rope_theta": 1e4},
        },
        "layer_types": ([SLIDING] * 5 + [FULL]) * 2,
        "tie_word_embeddings": True,
        "final_logit_softcapping": None,
    }
    source = config("Gemma3ForConditionalGeneration", text_config=text)
    out = legacy_config(source)
    assert out["sliding_window_pattern"] == 6
    assert out["tie_word_embeddings"] is True
    assert "final_logit_softcapping" not in out
    assert out["text_config"]["rope_theta"] == 1e6
    assert out["text_config"]["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert "rope_theta" not in text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (config(rope_theta=1e4, rope_parameters={"rope_theta": 1e6}), "rope_theta is 10000.0, but"),
        (
            config(rope_scaling={"rope_type": "llama3", **LLAMA3}, rope_parameters={**LLAMA3, "factor": 4.0}),
            "rope_scaling.factor is 8.0",
        ),
        (config(rope_scaling="linear", rope_parameters={"rope_type": "default"}), "rope_scaling is 'linear'; an object"),
        (config(rope_scaling={"type": "yarn", "rope_type": "linear"}), "type 'yarn' and rope_type 'linear'"),
        (config("Cohere2ForCausalLM", layer_types=[FULL, SLIDING, FULL]), "one p > 1"),
        (config("Cohere2ForCausalLM", layer_types=[SLIDING, FULL], sliding_window_pattern=3), "pattern = 3"),
        (config("Cohere2ForCausalLM", layer_types=["full_attention", 3]), "layer_types"),
    ],
)
def test_contradictions_are_refused(source: dict[str, object], message: str) -> None:
    with pytest.raises(SourceError) as e:
        legacy_config(source)
    assert message in str(e.value)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mixtral", "Cohere2", "Gemma2", "Granite"])
def test_configs_of_transformers_keep_their_rotary_settings(kind: str, tmp_path: Path) -> None:
    """A config saved by the installed transformers and rewritten by us loads to the same rotary settings."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, f"{kind}Config")
    rope = {"rope_type": "linear", "factor": 3.0, "rope_theta": 123456.0}
    cls(num_hidden_layers=8, rope_parameters=rope, architectures=[f"{kind}ForCausalLM"]).save_pretrained(tmp_path)
    out = legacy_config(json.loads((tmp_path / "config.json").read_text()))
    assert out["rope_theta"] == 123456.0
    assert {k: out["rope_scaling"][k] for k in ("rope_type", "factor")} == {"rope_type": "linear", "factor": 3.0}
    (tmp_path / "config.json").write_text(json.dumps(out))
    again = cls.from_pretrained(tmp_path)
    assert {k: again.rope_parameters[k] for k in rope} == rope


def test_config_value_follows_the_lookup_rule() -> None:
    c = {"a": None, "b": 2, "text_config": {"a": 1, "c": 3}}
    assert config_value(c, "a", "b") == 2
    assert config_value(c, "a") == 1
    assert config_value(c, "x", "c") == 3
    assert config_value(c, "x") is None
    assert config_value({"text_config": 5}, "x") is None
