"""config.json as it is published: every spelling of rotary settings, names of architectures, files edited by hand.

Frequencies and the factor on the rotated dimensions are those of the family's class in transformers, from the same config.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bounded import exl2ray
from model_folders import edit_config, our_logits, relative_error, transformers_logits

from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.hfconfig import legacy_config
from exl2ray.formats.source.architecture_name import BY_MODEL_TYPE, resolved
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config, resolve_hyper
from exl2ray.model.table import ARCHITECTURES

SIZES: dict[str, Any] = {
    "hidden_size": 256, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 64, "vocab_size": 300, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "norm_epsilon": 1e-5,
    "num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4, "norm_topk_prob": True, "pad_token_id": 0,
}  # fmt: skip
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}
SHORT = {"short_factor": [1.0 + i / 32 for i in range(32)], "long_factor": [1.0 + i for i in range(32)]}
SHORT_24 = {name: values[:24] for name, values in SHORT.items()}
ORIGINAL = {"original_max_position_embeddings": 4096}
MROPE = {"mrope_section": [8, 12, 12]}
FULL, SLIDING = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
# (model_type, what config.json says)
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "nothing": ("llama", {}),
    "theta": ("llama", {"rope_theta": 5e5}),
    "integer theta": ("llama", {"rope_theta": 500000}),
    "null": ("llama", {"rope_scaling": None}),
    "empty": ("llama", {"rope_scaling": {}}),
    "linear by type": ("llama", {"rope_scaling": {"type": "linear", "factor": 4}}),
    "linear by rope_type": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "linear by both": ("llama", {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}}),
    "a null selector": ("llama", {"rope_scaling": {"type": None, "rope_type": "linear", "factor": 2}}),
    "default": ("llama", {"rope_scaling": {"rope_type": "default"}}),
    "default by type": ("llama", {"rope_scaling": {"type": "default"}}),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "dynamic by rope_type": ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    "llama3": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    "llama3 by type": ("llama", {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}),
    "llama3, transformers 5": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "both spellings": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3},
                                 "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "theta inside rope_scaling": ("llama", {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}),
    "theta inside, llama3": ("llama", {"rope_scaling": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}),
    "su": ("phi3", {**ORIGINAL, "rope_scaling": {"type": "su", **SHORT}}),
    "su by rope_type": ("phi3", {**ORIGINAL, "rope_scaling": {"rope_type": "su", **SHORT}}),
    "su of another family": ("llama", {**ORIGINAL, "rope_scaling": {"type": "su", **SHORT}}),
    "su, transformers 5": ("mistral", {"rope_parameters": {"rope_type": "su", "rope_theta": 1e4, **ORIGINAL, **SHORT}}),
    "longrope": ("phi3", {**ORIGINAL, "rope_scaling": {"type": "longrope", **SHORT}}),
    "longrope by rope_type": ("phi3", {**ORIGINAL, "rope_scaling": {"rope_type": "longrope", **SHORT}}),
    "longrope by both": ("phi3", {**ORIGINAL, "rope_scaling": {"rope_type": "longrope", "type": "longrope", **SHORT}}),
    "longrope, transformers 5": ("phi3", {"rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, **ORIGINAL, **SHORT}}),
    "longrope, its length inside": ("llama", {"rope_scaling": {"type": "longrope", **SHORT, **ORIGINAL}}),
    "llama3, its length beside": ("llama", {"rope_theta": 5e5, "original_max_position_embeddings": 1024, "rope_scaling": {
        "rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if "factor" in k}}}),
    "longrope called yarn": ("phi3", {**ORIGINAL, "rope_scaling": {"type": "yarn", **SHORT}}),
    "part of a head": ("phi3", {**ORIGINAL, "partial_rotary_factor": 0.75, "rope_scaling": {"type": "longrope", **SHORT_24}}),
    "part of a head, transformers 5": ("phi3", {**ORIGINAL, "rope_parameters": {
        "rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, **SHORT_24}}),
    "GLM": ("glm4", {}),
    "GLM, a quarter": ("glm4", {"partial_rotary_factor": 0.25}),
    "GLM, transformers 5": ("glm4", {"rope_parameters": {**SLIDING, "partial_rotary_factor": 0.5}}),
    "Gemma 3": ("gemma3_text", {}),
    "Gemma 3, old": ("gemma3_text", {"rope_theta": 1e6, "rope_local_base_freq": 1e4,
                                     "rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    "Gemma 3, by layers": ("gemma3_text", {"rope_parameters": {"full_attention": FULL, "sliding_attention": SLIDING}}),
    "Gemma 3, one type only": ("gemma3_text", {"rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6}, "sliding_attention": None}}),
    "mrope": ("qwen2_vl", {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", **MROPE}}),
    "mrope as default": ("qwen2_vl", {"rope_theta": 1e6, "rope_scaling": {
        "type": "default", "rope_type": "default", **MROPE}}),
    "mrope by both": ("qwen2_vl", {"rope_theta": 1e6, "rope_scaling": {
        "type": "mrope", "rope_type": "default", **MROPE}}),
    "mrope, transformers 5": ("qwen2_5_vl", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, **MROPE}}),
    **{f"{kind}, transformers 5": (kind, {"rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}) for kind in (
        "cohere", "cohere2", "gemma", "gemma2", "granite", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "starcoder2",
    )},
}  # fmt: skip


def rotary(kind: str, config: dict[str, Any]) -> Any:
    """The rotary embedding of a family as transformers builds it from a config.json."""
    cls = type(transformers.AutoConfig.for_model(kind))
    hf = cls.from_dict(json.loads(json.dumps({**config, "model_type": kind})))
    module = importlib.import_module(cls.__module__.replace("configuration_", "modeling_"))
    found = [v for n, v in vars(module).items() if n.endswith("RotaryEmbedding") and v.__module__ == module.__name__]
    return next(v for v in found if "Vision" not in v.__name__)(getattr(hf, "text_config", None) or hf)


@pytest.mark.parametrize("case", ROPES)
def test_rotary_settings(case: str) -> None:
    kind, said = ROPES[case]
    known = json.loads(json.dumps({**SIZES, **said}).replace('"su"', '"longrope"'))  # transformers knows the new name only
    wanted = rotary(kind, known)
    config = {**SIZES, **said, "architectures": [BY_MODEL_TYPE[kind]]}
    hyper = resolve_hyper(ARCHITECTURES[BY_MODEL_TYPE[kind]], config)
    pairs = [(hyper.rope, "inv_freq", "attention_scaling")]
    if hyper.local_rope is not None:
        kinds = ((hyper.rope, "full_attention"), (hyper.local_rope, "sliding_attention"))
        pairs = [(rope, f"{layers}_inv_freq", f"{layers}_attention_scaling") for rope, layers in kinds]
    for rope, frequencies, scaling in pairs:
        assert rope is not None
        found = torch.tensor(rope.inv_freq)
        assert torch.allclose(found, getattr(wanted, frequencies).float(), rtol=1e-5, atol=0)
        assert rope.magnitude == pytest.approx(getattr(wanted, scaling), abs=1e-6)
    # The output's config.json says it once more, in the spelling that the loader reads, and means the same.
    written = loader_config(ARCHITECTURES[BY_MODEL_TYPE[kind]], config)
    again = resolve_hyper(ARCHITECTURES[BY_MODEL_TYPE[kind]], {**written, "architectures": config["architectures"]})
    assert (again.rope, again.local_rope) == (hyper.rope, hyper.local_rope)
    selectors = [k for k in ("type", "rope_type") if (written.get("rope_scaling") or {}).get(k)]
    assert len(selectors) < 2
    # So does transformers, which reads rope_scaling before rope_parameters.
    theirs = rotary(kind, written)
    for name, buffer in wanted.named_buffers():
        assert torch.allclose(getattr(theirs, name), buffer, rtol=1e-6, atol=0), name


REFUSED_ROPES: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "theta twice": ("llama", {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 1e4}},
                    ("rope_theta is 500000.0", "says 10000.0")),
    "theta twice, old name": ("llama", {"rope_theta": 5e5, "rope_scaling": {"rope_theta": 1e4}},
                              ("rope_scaling says 10000.0",)),
    "llama3 without its length": ("llama", {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
                                  ("original_max_position_embeddings is missing", "8192 in Llama 3.1")),
    "yarn without its length": ("qwen2", {"rope_scaling": {"type": "yarn", "factor": 4.0}},
                                ("copy rope_scaling from config.json",)),
    "two lengths, llama3": ("llama", {"original_max_position_embeddings": 4096, "rope_scaling": {
        "rope_type": "llama3", **LLAMA3}}, ("original_max_position_embeddings is 1024, but the one beside", "says 4096")),
    "two lengths, longrope": ("phi3", {"original_max_position_embeddings": 2048, "rope_scaling": {
        "type": "longrope", **SHORT, **ORIGINAL}}, ("is 2048, but rope_scaling says 4096",)),
    "unknown": ("llama", {"rope_scaling": {"type": "ntk-by-hand", "factor": 2.0}}, ("'ntk-by-hand' is unknown", "yarn")),
    "two kinds": ("llama", {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2.0}},
                  ("type 'linear' and rope_type",)),
    "another local base": ("gemma3_text", {"rope_local_base_freq": 2e4}, ("loader uses 10000",)),
    "scaled local": ("gemma3_text", {"rope_parameters": {
        "full_attention": FULL, "sliding_attention": {**FULL, "rope_theta": 1e4}}},
                     ("rope_type is 'linear'", "scales no RoPE of sliding layers")),
    "a factor in quotes": ("llama", {"rope_scaling": {"type": "linear", "factor": "2.0"}}, ("write 2.0 without the quotes",)),
    "theta in quotes": ("llama", {"rope_theta": "500000"}, ("write 500000 without the quotes",)),
    "a size in quotes": ("llama", {"hidden_size": "256"}, ("write 256 without the quotes",)),
    "a flag in quotes": ("llama", {"tie_word_embeddings": "false"}, ("write false without the quotes",)),
    "by layers under the old name": ("gemma3_text", {"rope_scaling": {"full_attention": FULL}}, ("call it rope_parameters",)),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED_ROPES)
def test_rotary_settings_that_cannot_run(case: str) -> None:
    kind, said, words = REFUSED_ROPES[case]
    name = BY_MODEL_TYPE[kind]
    with pytest.raises(SourceError) as e:
        resolve_hyper(ARCHITECTURES[name], {**SIZES, **said, "architectures": [name]})
    for word in words:
        assert word in str(e.value), str(e.value)


def test_a_share_of_a_head_that_transformers_does_not_read_is_told(folder: Path) -> None:
    said = "the loader rotates 8 of 16 dimensions of a head"
    assert not load_spec(SourceModel(folder)).warnings
    edit_config(folder, partial_rotary_factor=0.5)
    assert any(said in w and "rotates all in a LlamaForCausalLM" in w for w in load_spec(SourceModel(folder)).warnings)
    for kind in ("phi3", "glm4"):  # they read it
        assert "partial_rotary_factor" in dict(ARCHITECTURES[BY_MODEL_TYPE[kind]].defaults)
        assert rotary(kind, {**SIZES, "partial_rotary_factor": 0.5}).inv_freq.numel() == 16


def test_what_the_loader_needs_of_a_length_is_where_it_looks() -> None:
    """Beside rope_scaling for longrope, inside it for the others."""
    for case, beside, length in (("longrope, its length inside", True, 4096), ("llama3, its length beside", False, 1024)):
        written = loader_config(ARCHITECTURES["LlamaForCausalLM"], {
            **SIZES, **ROPES[case][1], "architectures": ["LlamaForCausalLM"]})  # fmt: skip
        assert (written if beside else written["rope_scaling"])["original_max_position_embeddings"] == length


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters", ""])
def test_a_base_that_transformers_passes_over_is_told(place: str, folder: Path) -> None:
    """Who makes the context of a model longer adds rope_scaling to what transformers 5 wrote."""
    linear = {"rope_type": "linear", "factor": 2.0}
    base = {"rope_type": "default", "rope_theta": 5e5}
    edit_config(folder, rope_theta=5e5 if not place else None, rope_parameters=base,
                rope_scaling={**linear, "rope_theta": 5e5} if place == "rope_scaling" else linear)  # fmt: skip
    warnings = load_spec(SourceModel(folder)).warnings
    same = relative_error(our_logits(folder), transformers_logits(folder)) < 2e-6
    assert same == (not warnings) == (place != "rope_parameters")
    assert same or "rope_theta 500000.0, which is used" in warnings[0]
    edit_config(folder, rope_parameters=None, rope_scaling=linear, rope_theta=5e5)
    wanted = transformers_logits(folder)
    edit_config(folder, **loader_config(ARCHITECTURES["LlamaForCausalLM"], {
        **json.loads((folder / "config.json").read_text()), "rope_parameters": base, "rope_theta": None}))  # fmt: skip
    assert relative_error(transformers_logits(folder), wanted) < 2e-6  # the output


def test_old_and_new_name_of_longrope_together() -> None:
    both = {"type": "su", "rope_type": "longrope", **SHORT}
    said = {**SIZES, "architectures": ["Phi3ForCausalLM"], **ORIGINAL, "rope_scaling": both}
    assert legacy_config(said)["rope_scaling"]["rope_type"] == "longrope"


# ---- architectures -----------------------------------------------------------------------------------------------------


def test_every_family_has_a_model_type() -> None:
    assert set(BY_MODEL_TYPE.values()) == set(ARCHITECTURES)


# architectures in config.json -> words of the note; the model is the same Llama
NAMES: dict[str, tuple[Any, str]] = {
    "absent": (None, "architectures is absent"),
    "empty": ([], "architectures is absent"),
    "derived": (["MyLlamaForCausalLM"], "'MyLlamaForCausalLM', which loaders do not know"),
    "in a case of old": (["LLaMAForCausalLM"], "'LLaMAForCausalLM', which loaders do not know"),
    "a string": ("LlamaForCausalLM", ""),
    "twice": (["LlamaForCausalLM", "LlamaForCausalLM"], ""),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_of_architectures(case: str, folder: Path) -> None:
    names, said = NAMES[case]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": names}))
    source = SourceModel(folder)
    assert source.architecture == "LlamaForCausalLM"
    warnings = load_spec(source).warnings
    assert any(said in w for w in warnings) if said else not warnings
    if case != "a string":
        assert relative_error(our_logits(folder), transformers_logits(folder)) < 2e-6


def test_another_family_than_model_type_says_is_told() -> None:
    config, notes = resolved({"architectures": ["LlamaForCausalLM"], "model_type": "mistral"}, "config.json")
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "model_type 'mistral' says MistralForCausalLM" in notes[0]
    assert resolved({"architectures": ["YiForCausalLM"], "model_type": "llama"}, "config.json")[1] == []


@pytest.mark.parametrize(
    ("said", "written"),
    [("torch.bfloat16", "bfloat16"), ("auto", None), ("BF16", "bfloat16"), ("fp16", "float16"), ("float32", "float32"),
     ("float8_e4m3fn", "float8_e4m3fn"), (None, None)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_names_of_dtypes_are_such_that_transformers_loads_the_result(
    key: str, said: str | None, written: str | None, folder: Path
) -> None:
    config = {**json.loads((folder / "config.json").read_text()), "dtype": said}
    config[key] = config.pop("dtype")
    out = loader_config(ARCHITECTURES["LlamaForCausalLM"], {**config, "vision_config": {key: said}})
    assert (out.get(key), out.pop("vision_config").get(key)) == (written, written)
    (folder / "config.json").write_text(json.dumps(out))
    assert transformers.AutoConfig.from_pretrained(folder).dtype == (getattr(torch, written) if written else None)


# ---- the file ----------------------------------------------------------------------------------------------------------

FILES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "trailing comma": (lambda t: t.rstrip().rstrip("}").rstrip() + ",\n}\n", ("config.json", "a trailing comma before line")),
    "comment": (lambda t: "{ // edited\n" + t.lstrip()[1:], ("a comment at line 1",)),
    "single quotes": (lambda t: "{'a': 1}", ("single quotes at line 1",)),
    "empty": (lambda t: "", ("is empty",)),
    "web page": (lambda t: "<!DOCTYPE html><html></html>", ("a web page",)),
    "cut off": (lambda t: t[: len(t) // 2], ("config.json", "line")),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_no_json(case: str, folder: Path) -> None:
    change, words = FILES[case]
    path = folder / "config.json"
    path.write_text(change(path.read_text()))
    exl2ray("plan", "-i", folder, "-b", "4").ends_with(3, *words)


def test_a_byte_order_mark(folder: Path) -> None:
    path = folder / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    edit = SourceModel(folder).config
    path.write_bytes(path.read_bytes()[3:])
    assert SourceModel(folder).config == edit
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    assert relative_error(our_logits(folder), transformers_logits(folder)) < 2e-6
