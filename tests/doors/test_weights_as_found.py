"""Weights, names and config as tools and hands leave them: the message names the cause, and a remedy that is one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bounded import exl2ray
from model_folders import (
    WHOLE,
    copied,
    edit_config,
    edited,
    our_logits,
    read_weights,
    relative_error,
    renamed,
    transformers_logits,
    write_json,
    write_weights,
)
from oracles import complete_model

from exl2ray.calibration.tokenizer_files import read_tokenizer_files
from exl2ray.errors import FormatError, SourceError
from exl2ray.evaluate.forward import linear_reader, open_model
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.summary import inspect_directory
from exl2ray.model.arch import load_spec

Change = Callable[[Path], Any]
F8 = torch.float8_e4m3fn
HEAD, EMBED = "lm_head.weight", "model.embed_tokens.weight"


def refusal(folder: Path) -> SourceError:
    with pytest.raises(SourceError) as e:
        load_spec(SourceModel(folder))
    assert e.value.hint
    return e.value


# ---- files --------------------------------------------------------------------------------------------------------------


def three_files(folder: Path, pattern: str) -> None:
    tensors = read_weights(folder)
    (folder / WHOLE).unlink()
    for i, part in enumerate([sorted(tensors)[n::3] for n in range(3)], 1):
        write_weights(folder, {n: tensors[n] for n in part}, pattern.format(i))


@pytest.mark.parametrize("pattern", ["model-{:05d}-of-00003.safetensors", "model-{:05d}-of-000003.safetensors",
                                     "model-{:06d}-of-000003.safetensors"])  # fmt: skip
def test_a_shard_is_missing_however_its_siblings_count(pattern: str, folder: Path) -> None:
    three_files(folder, pattern)
    load_spec(SourceModel(folder))
    (folder / pattern.format(2)).unlink()
    assert refusal(folder).hint.endswith(f"fetch {pattern.format(2)}")


def test_weights_in_a_folder_below_config(folder: Path) -> None:
    """Its download was called incomplete."""
    (folder / "bf16").mkdir()
    (folder / WHOLE).rename(folder / "bf16" / WHOLE)
    found = refusal(folder)
    assert "its folder bf16 has some" in found.message
    assert found.hint.startswith("move what is in ")
    (folder / "bf16" / "config.json").write_text((folder / "config.json").read_text())
    assert refusal(folder).hint == f"give that folder: {folder / 'bf16'}"


def test_files_without_a_tensor(folder: Path) -> None:
    """hidden_size was called too large for them."""
    write_weights(folder, {})
    assert "model.safetensors: no tensor in there" in refusal(folder).message


@pytest.mark.parametrize(("dtype", "bits"), [("F4", 4), ("F6_E2M3", 6), ("F8_E4M3FNUZ", 8)])
def test_types_of_the_format_that_hold_quantised_weights(dtype: str, bits: int, folder: Path) -> None:
    """The file was called damaged."""
    header = json.dumps({"a.weight": {"dtype": dtype, "shape": [8], "data_offsets": [0, bits]}}).encode()
    (folder / WHOLE).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * bits)
    found = refusal(folder)
    assert f"dtype {dtype}, in which weights are quantised already" in found.message
    assert "original weights" in found.hint


# ---- FP8 ----------------------------------------------------------------------------------------------------------------


def in_fp8(folder: Path, scale: str, where: str = "", **settings: Any) -> None:
    """Projections cast to FP8, with a block's scale beside each under the name ``scale``; none if it is empty."""

    def change(t: dict[str, torch.Tensor]) -> None:
        for name in [n for n in t if n.endswith("_proj.weight")]:
            if scale:
                t[name.removesuffix("weight") + scale] = torch.ones([-(-n // 48) for n in t[name].shape])
            t[name] = t[name].to(F8)

    edited(change)(folder)
    said = {"quantization_config": {"quant_method": "fp8", **settings}}
    edit_config(folder, **({where: said} if where else said if settings or not scale else {}))


@pytest.mark.parametrize("scale", ["descale", "weight.scale", "weight_quant_scale"])
def test_a_scale_of_another_name_is_not_left_out(scale: str, folder: Path) -> None:
    """Without quantization_config the bare codes were taken for the weights."""
    in_fp8(folder, scale)
    found = refusal(folder)
    assert f"no weight_scale_inv or weight_scale; model.layers.0.mlp.down_proj.{scale} is not known as one" in found.message


def test_what_the_text_part_of_config_says_of_fp8_counts(folder: Path) -> None:
    in_fp8(folder, "", where="text_config")
    assert "there is no weight_scale_inv or weight_scale" in refusal(folder).message


def test_blocks_that_the_text_part_of_config_names(folder: Path) -> None:
    """64 rows in blocks of 48 are two, as in blocks of 32."""
    in_fp8(folder, "weight_scale_inv", where="text_config", weight_block_size=[48, 48])
    source = SourceModel(folder)
    assert any("a scale per 48 x 48 block" in n for n in source.notes), source.notes


def test_a_scale_in_float64(folder: Path, base: Path) -> None:
    in_fp8(folder, "weight_scale_inv", weight_block_size=[48, 48])
    edited(lambda t: t.update({n: w.double() for n, w in t.items() if "scale" in n}))(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    wanted = SourceModel(base).load(name).to(F8).float()
    assert torch.equal(SourceModel(folder).load(name).float(), wanted)


# ---- config.json --------------------------------------------------------------------------------------------------------


def test_a_resized_embedding_that_config_does_not_know(folder: Path) -> None:
    edited(lambda t: t.update({n: torch.cat([t[n], t[n][:16]]) for n in (HEAD, EMBED)}))(folder)
    assert refusal(folder).hint == 'embedding and head were resized: set "vocab_size": 288 in config.json'
    edit_config(folder, vocab_size=288)
    assert relative_error(our_logits(folder), transformers_logits(folder)) < 3e-6


def test_a_shared_embedding_has_to_fit_the_head_too(tied: Path, tmp_path: Path) -> None:
    """`plan` found no problem, and the conversion ended when it came to the head."""
    folder = copied(tied, tmp_path / "model")
    edited(lambda t: t.update({EMBED: torch.cat([t[EMBED], t[EMBED][:16]])}))(folder)
    found = refusal(folder)
    assert f"{EMBED} has shape (288, 64), expected (272, 64)" in found.message
    assert 'set "vocab_size": 288' in found.hint
    edit_config(folder, vocab_size=288)
    assert relative_error(our_logits(folder), transformers_logits(folder)) < 3e-6


def test_a_head_of_other_rows_than_the_embedding(folder: Path) -> None:
    edited(lambda t: t.update({HEAD: torch.cat([t[HEAD], t[HEAD][:16]])}))(folder)
    assert "vocab_size" not in refusal(folder).hint


def test_tokens_without_rows(folder: Path) -> None:
    edit_config(folder, vocab_size=300)
    assert "without resizing the embedding" in refusal(folder).hint


@pytest.mark.parametrize("value", [[1], "default", 5])
def test_rope_parameters_that_are_no_object(value: Any, folder: Path) -> None:
    """They were ignored, unlike a rope_scaling of that kind."""
    edit_config(folder, rope_parameters=value)
    assert "rope_parameters is" in refusal(folder).message


# ---- names --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.lm_head.weight", "output.weight", "model.embed_out.weight"])
def test_a_head_of_another_name_is_not_called_shared(name: str, folder: Path) -> None:
    """The hint was to tie the head to the embedding, which makes another model."""
    renamed(folder, lambda n: name if n == HEAD else n)
    assert refusal(folder).hint == f"{name} looks like the head: if it is, rename it to {HEAD}"
    edited(lambda t: t.pop(name))(folder)
    assert '"tie_word_embeddings": true' in refusal(folder).hint


def test_biases_that_config_does_not_know(folder: Path) -> None:
    bias = "model.layers.{}.self_attn.{}_proj.bias"
    sizes = {"q": 64, "k": 32, "v": 32, "o": 64}
    edited(lambda t: t.update({bias.format(i, x): torch.ones(n) for i in range(2) for x, n in sizes.items()}))(folder)
    warnings = load_spec(SourceModel(folder)).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("biases are stored, model.layers.0.self_attn.k_proj.bias and 7 more")
    assert "attention_bias" in warnings[0]
    edit_config(folder, attention_bias=True)
    assert load_spec(SourceModel(folder)).warnings == ()


def test_biases_that_config_alone_has(folder: Path) -> None:
    edit_config(folder, attention_bias=True, mlp_bias=True)
    error = refusal(folder)
    assert "q_proj.bias is missing" in error.message
    assert error.hint == 'if the model has no such biases, set "attention_bias": false in config.json'


FORMS = {
    "pruned": ("weight_orig", "weight_mask"),
    "weight norm": ("weight_g", "weight_v"),
    "parametrised": ("parametrizations.weight.original0", "parametrizations.weight.original1"),
}


@pytest.mark.parametrize("form", FORMS)
def test_layers_in_another_form_are_told(form: str, folder: Path) -> None:
    layer = "model.layers.1.mlp.up_proj"
    tensors = read_weights(folder)
    weight = tensors.pop(f"{layer}.weight")
    write_weights(folder, tensors | {f"{layer}.{name}": weight.clone() for name in FORMS[form]})
    error = refusal(folder)
    assert error.message.endswith(f"{layer}.weight is missing")
    assert all(words in error.hint for words in (f"{layer} has ", *FORMS[form], "remove_parametrizations"))


@pytest.mark.parametrize("family", ["MixtralForCausalLM", "Qwen3MoeForCausalLM"])
def test_experts_as_transformers_holds_them(family: str, tmp_path: Path) -> None:
    """save_pretrained(DIR, save_original_format=False), which transformers loads as anything else."""
    model = complete_model(family, tmp_path / "model").model
    folder = tmp_path / "fused"
    model.save_pretrained(folder, save_original_format=False, max_shard_size="100KB")
    single = SourceModel(tmp_path / "model")
    fused = SourceModel(folder)
    assert fused.names() == single.names()
    assert all(torch.equal(fused.load(n), single.load(n)) for n in single.names())
    assert fused.weights_fingerprint() == single.weights_fingerprint()
    assert relative_error(our_logits(folder), transformers_logits(folder)) < 2e-6
    assert load_spec(fused).warnings == load_spec(single).warnings
    lost = fused.file(fused.names()[3])  # half of a layer's experts
    lost.unlink()
    assert f"model.safetensors.index.json names {lost.name}, which is missing" in refusal(folder).message
    (folder / "model.safetensors.index.json").unlink()
    found = refusal(folder)
    assert found.message.endswith(f"{folder}: {lost.name} is missing")
    assert found.hint.endswith(f"fetch {lost.name}")


def test_experts_in_one_tensor_of_another_form(tmp_path: Path) -> None:
    """Every matrix of every expert was called missing."""
    folder = tmp_path / "model"
    model = complete_model("MixtralForCausalLM", folder).model
    model.save_pretrained(folder, save_original_format=False)
    edited(lambda t: t.update({n: w.transpose(1, 2) for n, w in t.items() if "experts." in n}))(folder)
    found = refusal(folder)
    assert "stored as one tensor, model.layers.0.mlp.experts.down_proj" in found.message
    assert "is missing" not in found.message
    assert "save_original_format=True" in found.hint


def test_linears_as_programs_hold_them_that_run_models(folder: Path) -> None:
    def fuse(t: dict[str, torch.Tensor]) -> None:
        for i in range(2):
            for of, parts in (("self_attn.qkv", "qkv"), ("mlp.gate_up", ("gate", "up"))):
                room = f"model.layers.{i}.{of.partition('.')[0]}."
                fused = torch.cat([t.pop(f"{room}{part}_proj.weight") for part in parts])
                t[f"model.layers.{i}.{of}_proj.weight"] = fused

    edited(fuse)(folder)
    found = refusal(folder)
    assert "stored as one tensor, model.layers.0.mlp.gate_up_proj.weight" in found.message
    assert "is missing" not in found.message
    assert "save_pretrained" in found.hint


def test_weights_that_zero_3_did_not_gather(folder: Path) -> None:
    """Each of them was called empty, and config.json broken."""
    edited(lambda t: t.update({n: torch.empty(0) for n in t if n != "model.norm.weight"}))(folder)
    found = refusal(folder)
    assert "20 of 21 tensors are empty, e.g. lm_head.weight: training with DeepSpeed (ZeRO-3)" in found.message
    assert "stage3_gather_16bit_weights_on_model_save" in found.hint
    (folder / "global_step7").mkdir()
    (folder / "global_step7" / "zero_pp_rank_0_mp_rank_00_optim_states.pt").touch()
    assert refusal(folder).hint.startswith("make safetensors of it: python -m deepspeed.utils.zero_to_fp32")
    exl2ray("plan", "-i", folder, "-b", "4").ends_with(3, "20 of 21 tensors are empty")


# ---- a vocabulary beside tokenizer.json ---------------------------------------------------------------------------------


def test_a_tokenizer_model_that_is_none(folder: Path) -> None:
    path = folder / "tokenizer.model"
    for content, good in ((b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02" * 9, True), (b"IQ== 0\nIg== 1\n", True),
                          (b"<html>", False), (b"", False), (b"\0" * 99, False)):  # fmt: skip
        path.write_bytes(content)
        assert (read_tokenizer_files(folder).warnings == ()) == good, content
    write_json(folder / "tokenizer_config.json", {})
    exl2ray("plan", "-i", folder, "-b", "4", "-l", "128", "-ml", "128").ends_with(0, "tokenizer.model: neither", "delete it")


# ---- EXL2 directories that are damaged ----------------------------------------------------------------------------------


def packed_linear(folder: Path, rows: int = 64, **changes: torch.Tensor) -> None:
    """An EXL2 directory with the first q_proj in 4 bits, of ``rows`` input features."""
    key = "model.layers.0.self_attn.q_proj"
    parts = {"q_weight": torch.zeros(rows // 8, 64, dtype=torch.int32), "q_scale": torch.zeros(1, 8, dtype=torch.int32),
             "q_scale_max": torch.ones(1).half(), "q_groups": torch.tensor([4, 0], dtype=torch.int16),
             "q_invperm": torch.arange(rows, dtype=torch.int32), **changes}  # fmt: skip
    spare = torch.ones(1)
    edited(lambda t: t.update({f"{key}.{n}": w for n, w in parts.items()} | {"x": t.pop(f"{key}.weight", spare)}))(folder)
    edit_config(folder, quantization_config={"quant_method": "exl2", "bits": 4.0})


def test_a_damaged_linear_names_its_folder_and_what_shows_more(folder: Path) -> None:
    packed_linear(folder, q_invperm=torch.zeros(64, dtype=torch.int32))
    with pytest.raises(FormatError, match="q_invperm is not a permutation") as e:
        Exl2Model(folder).linear("model.layers.0.self_attn.q_proj")
    assert e.value.message.startswith(f"{folder / 'model.safetensors'}: ")
    assert f"exl2ray verify {folder}" in e.value.hint
    packed_linear(folder, q_groups=torch.tensor([9, 0], dtype=torch.int16))
    with pytest.raises(FormatError, match=r"model\.safetensors: .*group 0 of width 9") as e:
        inspect_directory(folder)
    assert f"exl2ray verify {folder}" in e.value.hint
    packed_linear(folder)
    edited(lambda t: t.pop("model.layers.0.self_attn.q_proj.q_scale"))(folder)
    with pytest.raises(FormatError, match=r"no tensor .*q_proj\.q_scale") as e:
        inspect_directory(folder)
    assert e.value.hint


def test_a_linear_that_is_not_as_config_has_it(base: Path, folder: Path) -> None:
    """It was a NumericError without a folder and without a hint."""
    first = load_spec(SourceModel(base)).modules[1].linear("q_proj")
    spec = load_spec(SourceModel(base))
    read = linear_reader(torch.device("cpu"))
    packed_linear(folder)
    assert read(spec, first, Exl2Model(folder))[0].shape == (64, 64)
    shutil.copytree(base, folder, dirs_exist_ok=True)
    packed_linear(folder, rows=32)
    with pytest.raises(FormatError, match=r"q_proj has \(32, 64\) rows and columns, by config.json it has \(64, 64\)") as e:
        read(spec, first, Exl2Model(folder))
    assert "put back the one" in e.value.hint


def test_figures_of_a_model_that_config_cuts_say_so(folder: Path, tmp_path: Path) -> None:
    """Perplexity, and KL beside a source that is cut alike, are those of another model, and nothing in them shows it."""
    assert open_model(folder).notes == ()
    edit_config(folder, num_hidden_layers=1)
    np.save(tmp_path / "ids.npy", np.arange(3, 243).reshape(2, 120))
    run = exl2ray("eval", folder, "--tokens", tmp_path / "ids.npy", "--device", "cpu", "--json", seconds=60)
    run.ends_with(0, f"{folder}: the weights have 2 layers, config.json says 1")


def test_a_table_that_ends_before_its_tokens_do(folder: Path) -> None:
    """Tokens without a row were read as token 0: another model, and no word."""
    edited(lambda t: t.update({EMBED: t[EMBED][:200]}))(folder)
    assert f"{EMBED} has 200 rows, but vocab_size in config.json is 272" in refusal(folder).message
    edited(lambda t: t.update({EMBED: torch.cat([t[EMBED], t[EMBED]])}))(folder)  # 400 rows: padding
    load_spec(SourceModel(folder))


def test_a_table_of_positions_that_ends_early(families: Callable[..., Path]) -> None:
    folder = families("GPTBigCode", num_attention_heads=2, n_inner=96)
    load_spec(SourceModel(folder))
    edited(lambda t: t.update({"transformer.wpe.weight": t["transformer.wpe.weight"][:100]}))(folder)
    assert "wpe.weight has 100 rows, but the longest text in config.json is 256" in refusal(folder).message


@pytest.mark.parametrize(
    ("scaling", "told"),
    [({"factor": 4.0}, True), ({"factor": 4.0, "type": None}, True), ({"factor": 4.0, "rope_type": "default"}, True),
     ({"factor": 1.0}, False), ({}, False), ({"factor": 4.0, "type": "linear"}, False),
     ({"factor": 4.0, "rope_type": "dynamic"}, False), ({"factor": "x"}, False)],
)  # fmt: skip
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_a_factor_of_rope_without_a_type(key: str, scaling: dict[str, Any], told: bool, folder: Path) -> None:
    """Nobody applies it, and nobody said so."""
    edit_config(folder, **{"rope_parameters": None, key: {"rope_theta": 10000.0, **scaling}})
    assert any("a factor" in w and "no type" in w for w in load_spec(SourceModel(folder)).warnings) == told
