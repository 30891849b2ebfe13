"""Weights as people store them: other names, indexes and copies, more or fewer layers, FP8 and MXFP4.

What converts gives the logits of transformers on the same folder. Where transformers would begin with random weights (names
with the marks of a wrapper), those of the folder as it was before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import exl2ray
from model_folders import (
    WHOLE,
    Tensors,
    copied,
    edit_config,
    our_logits,
    read_weights,
    relative_error,
    renamed,
    transformers_logits,
    write_json,
    write_sharded,
    write_weights,
)
from tiny_models import write_text
from torch import Tensor

from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.readahead import ReadAhead
from exl2ray.formats.shards import output_config
from exl2ray.formats.side_files import side_files
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config
from exl2ray.plan.scan import scan_values, stored_names

TOLERANCE = 2e-6
Change = Callable[[Path], Any]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def edited(change: Callable[[Tensors], Any]) -> Change:
    def apply(f: Path) -> None:
        tensors = read_weights(f)
        change(tensors)
        write_weights(f, tensors)

    return apply


def resharded(parts: int = 2, indexed: int | None = None, index: bool = True) -> Change:
    """In ``parts`` files, with an index of ``indexed``."""

    def apply(f: Path) -> None:
        tensors = read_weights(f)
        (f / WHOLE).unlink()
        if indexed is not None:
            write_sharded(f, tensors, indexed)
            kept = (f / "model.safetensors.index.json").read_text()
            for file in f.glob("model-*.safetensors"):
                file.unlink()
        write_sharded(f, tensors, parts, index)
        if indexed is not None:
            (f / "model.safetensors.index.json").write_text(kept)

    return apply


def then(*changes: Change) -> Change:
    def apply(f: Path) -> None:
        for change in changes:
            change(f)

    return apply


def old_index(f: Path) -> None:
    """Whole weights, beside an index of shards that are gone."""
    weight_map = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(read_weights(f))}
    write_json(f / "model.safetensors.index.json", {"weight_map": weight_map})


def two_shardings(f: Path) -> None:
    """The index names two shards; three older ones lie beside, with other values."""
    tensors = read_weights(f)
    (f / WHOLE).unlink()
    write_sharded(f, {n: t * 0.5 for n, t in tensors.items()}, 3)
    write_sharded(f, tensors, 2)


def whole_and_shards(f: Path) -> None:
    write_sharded(f, {n: t * 0.5 for n, t in read_weights(f).items()}, 2)


def adapter_beside(f: Path) -> None:
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    write_weights(f, {name: torch.ones(8, 64)}, "adapter_model.safetensors")
    write_json(f / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 8})


def another_layer(f: Path) -> None:
    edited(lambda t: t.update({n.replace("layers.1.", "layers.2."): w.clone() for n, w in t.items() if "layers.1." in n}))(f)


# What is changed -> (change, what has to be said; "": nothing). transformers gives the same logits.
LOADED: dict[str, tuple[Change, str]] = {
    "as saved": (lambda f: None, ""),
    "shards": (resharded(), ""),
    "shards without index": (resharded(index=False), ""),
    "index of gone shards": (old_index, "index.json is out of date, ignored"),
    "index of Mistral's files": (then(resharded(), lambda f: write_json(
        f / "consolidated.safetensors.index.json", {"weight_map": {"x": "consolidated-00001-of-00001.safetensors"}})), ""),
    "second copy in shards": (whole_and_shards, "a second copy of the weights, ignored"),
    "two shardings": (two_shardings, "model-00002-of-00003.safetensors and 1 more: a second copy"),
    "variant": (lambda f: write_weights(f, {n: t * 2 for n, t in read_weights(f).items()}, "model.fp16.safetensors"),
                "model.fp16.safetensors: a second copy"),
    "consolidated beside": (lambda f: write_weights(f, {"wte.weight": torch.ones(4, 4)}, "consolidated.safetensors"),
                            "consolidated.safetensors: weights in another layout beside the model; left out"),
    "adapter beside": (adapter_beside, "an adapter beside the model; it is not applied"),
    "more layers than configured": (another_layer, "the weights have 3 layers, config.json says 2"),
    "layers of MTP": (then(another_layer, lambda f: edit_config(f, num_nextn_predict_layers=1)), ""),
    "no prefix": (lambda f: renamed(f, lambda n: n.removeprefix("model.")), ""),
    "prefix twice": (lambda f: renamed(f, lambda n: "model." + n), ""),
    "stale quantization_config of FP8": (lambda f: edit_config(f, quantization_config=None, compression_config={}), ""),
    "buffers": (edited(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})), ""),
    "float32": (edited(lambda t: t.update({n: w.float() for n, w in t.items()})), ""),
    "bfloat16": (edited(lambda t: t.update({n: w.bfloat16() for n, w in t.items()})), ""),
}  # fmt: skip
TIED: dict[str, tuple[Change, str]] = {
    "as saved": (lambda f: None, ""),
    "only the head stored": (edited(lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")})), ""),
    "both stored": (edited(lambda t: t.update({HEAD: t[EMBED].clone()})), ""),
    "both stored, with other values": (edited(lambda t: t.update({HEAD: t[EMBED].flip(0)})), ""),
    "class without head": (then(lambda f: edit_config(f, architectures=["LlamaModel"]),
                                lambda f: renamed(f, lambda n: n.removeprefix("model."))), "by its model_type 'llama'"),
}  # fmt: skip
ALL_LOADED = [("base", n) for n in LOADED] + [("tied", n) for n in TIED]


@pytest.mark.parametrize(("model", "case"), ALL_LOADED)
def test_what_transformers_loads_is_read_alike(model: str, case: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    change, said = (LOADED if model == "base" else TIED)[case]
    folder = copied(request.getfixturevalue(model), tmp_path / "model")
    change(folder)
    if case in ("adapter beside", "shards without index"):  # it wants the adapter's model from the Hub, and an index
        wanted = transformers_logits(request.getfixturevalue(model))
    else:
        wanted = transformers_logits(folder)
    assert relative_error(our_logits(folder), wanted) < TOLERANCE
    warnings = load_spec(SourceModel(folder)).warnings
    assert any(said in w for w in warnings) if said else not warnings, warnings


def inner(n: str) -> str:
    return n.replace("layers.0.", "layers.0._orig_mod.").replace("layers.1.", "layers.1._checkpoint_wrapped_module.")


MARKED: dict[str, Callable[[str], str]] = {
    "torch.compile": lambda n: "_orig_mod." + n,
    "torch.compile of layers": inner,
    "DistributedDataParallel": lambda n: "module." + n,
    "both": lambda n: "module._orig_mod." + n,
    "FSDP": lambda n: "_fsdp_wrapped_module." + n.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
    "merged PEFT": lambda n: "base_model.model." + n,
    "merged PEFT with base layers": lambda n: "base_model.model." + n.replace("q_proj.weight", "q_proj.base_layer.weight"),
    "text part of a larger model": lambda n: "language_model." + n,
    "its new layout": lambda n: n.replace("model.", "model.language_model.", 1),
    "another root": lambda n: "transformer." + n.removeprefix("model."),
}


@pytest.fixture(scope="session")
def base_logits(base: Path) -> Tensor:
    return our_logits(base)


@pytest.mark.parametrize("case", MARKED)
def test_names_with_marks_and_prefixes(case: str, folder: Path, base_logits: Tensor) -> None:
    renamed(folder, MARKED[case])
    assert relative_error(our_logits(folder), base_logits) == 0
    stale = {MARKED[case](n): "model-00001-of-00001.safetensors" for n in read_weights(folder)}
    write_json(folder / "model.safetensors.index.json", {"weight_map": stale})
    assert relative_error(our_logits(folder), base_logits) == 0


# ---- what cannot be read -----------------------------------------------------------------------------------------------


def without_shard(f: Path) -> None:
    resharded(3)(f)
    (f / "model-00002-of-00003.safetensors").unlink()


def cut(f: Path, **sizes: int) -> None:
    edit_config(f, **sizes)

    def change(t: Tensors) -> None:
        for name, w in t.items():
            t[name] = w[:, :86] if "down_proj" in name else w[:86] if "up_proj" in name or "gate_proj" in name else w

    edited(change)(f)


def two_copies(f: Path) -> None:
    tensors = read_weights(f)
    (f / WHOLE).unlink()
    for parts in (2, 3):
        write_sharded(f, tensors, parts, index=False)


def lora_inside(t: Tensors) -> None:
    t["model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(8, 64)


# What is wrong -> (change, words of the message and hint)
REFUSED: dict[str, tuple[Change, tuple[str, ...]]] = {
    "missing shard": (without_shard, ("model-00002-of-00003.safetensors", "missing", "download is incomplete")),
    "missing shard, no index": (then(without_shard, lambda f: (f / "model.safetensors.index.json").unlink()),
                                ("fetch model-00002-of-00003.safetensors",)),
    "fewer layers": (edited(lambda t: [t.pop(n) for n in list(t) if "layers.1." in n]),
                     ("the weights have 1 layers, config.json says 2", "num_hidden_layers")),
    "no head": (edited(lambda t: t.pop("lm_head.weight")), ("lm_head.weight is missing", '"tie_word_embeddings": true')),
    "head of a classifier": (edited(lambda t: t.update({"score.weight": t.pop(HEAD)[:2]})),
                             ("lm_head.weight is missing", "gives scores, not one for words")),
    "no embedding": (edited(lambda t: t.pop("model.embed_tokens.weight")), ("model.embed_tokens.weight is missing",)),
    "weights of another family": (lambda f: renamed(f, lambda n: n.replace("input_layer", "ln").replace("embed_", "w")),
                                  ("not those of a LlamaForCausalLM", "lm_head.weight")),
    "two copies, no telling": (two_copies, ("mixes two copies of the weights",)),
    "adapter inside": (edited(lora_inside), ("1 tensors of an adapter that is not merged", "merge_and_unload")),
    "two models": (edited(lambda t: t.update({"a.b." + n.removeprefix("model."): t[n].clone() for n in list(t)} | {
        "c.d." + n.removeprefix("model."): t.pop(n) for n in list(t)})), ("weights of 2 models, under 'a.b.' and 'c.d.'",)),
    "sizes no multiple of 32": (lambda f: cut(f, intermediate_size=86),
                                ("model.layers.0.mlp.down_proj has 86 input features", "EXL2 needs multiples of 32")),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_weights_that_cannot_be_converted(case: str, folder: Path) -> None:
    change, words = REFUSED[case]
    change(folder)
    run = exl2ray("plan", "-i", folder, "-b", "3")
    run.ends_with(3, *words)
    assert "check architectures" not in run.text


def test_sizes_no_multiple_of_32_hide_nothing_else(folder: Path, tmp_path: Path) -> None:
    cut(folder, intermediate_size=86)
    (folder / "tokenizer.json").unlink()
    exl2ray("convert", "-i", folder, "-o", tmp_path / "w", "-b", "3", "--dry-run").ends_with(
        3, "has 86 input features", "EXL2 needs multiples of 32", "tokenizer"
    )


def test_an_adapter_and_foreign_settings_stay_out_of_the_output(folder: Path) -> None:
    adapter_beside(folder)
    for name in ("quantize_config.json", "hf_quant_config.json", "model.safetensors.index.json"):
        write_json(folder / name, {"weight_map": {}})
    assert side_files(folder) == ["generation_config.json", "tokenizer.json"]


# ---- FP8 and MXFP4 -----------------------------------------------------------------------------------------------------

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float64)
FP4 = torch.cat((FP4, -FP4))


def block_scale(w: Tensor, high: int, wide: int) -> Tensor:
    """Largest value of every block over 448, (ceil(n / high), ceil(k / wide)) float32."""
    n, k = w.shape
    padded = torch.zeros(-(-n // high) * high, -(-k // wide) * wide)
    padded[:n, :k] = w.abs()
    return padded.reshape(-(-n // high), high, -(-k // wide), wide).amax((1, 3)) / 448


def spread(scale: Tensor, high: int, wide: int, shape: Any) -> Tensor:
    return scale.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]


def fp8(w: Tensor, form: str) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """(codes, scales by the end of their names, values float64) of a matrix, as one kind of publisher stores it."""
    w = w.float()
    if form.startswith("block"):
        high, wide = (int(x) for x in form.split()[1:])
        scale = block_scale(w, high, wide).clamp(min=1e-8)
        factor, ends = spread(scale, high, wide, w.shape), {"weight_scale_inv": scale}
    elif form == "channel":
        scale = (w.abs().amax(1, keepdim=True) / 448).bfloat16()
        factor, ends = scale.float().expand_as(w), {"weight_scale": scale, "input_scale": torch.ones(1)}
    elif form == "channel flat":
        scale = w.abs().amax(1) / 448
        factor, ends = scale[:, None].expand_as(w), {"weight_scale": scale}
    elif form == "exponents":
        scale = block_scale(w, 32, 32).log2().ceil().exp2()
        factor, ends = spread(scale, 32, 32, w.shape), {"weight_scale_inv": scale.to(torch.float8_e8m0fnu)}
    else:
        scale = w.abs().max() / 448
        name = "weight_scale_inv" if form == "tensor inv" else "weight_scale"
        factor, ends = scale.expand_as(w), {name: scale.reshape(()) if form == "tensor inv" else scale.reshape(1)}
    codes = (w / factor).to(E5M2 if form == "e5m2" else E4M3)
    return codes, ends, codes.double() * factor.double()


def store_fp8(f: Path, form: str, config: dict[str, Any] | None) -> Tensors:
    """Writes every projection in FP8; returns the values that they stand for, float64."""
    out, values = {}, {}
    for name, w in read_weights(f).items():
        if "_proj" not in name:
            out[name] = w.bfloat16()
            continue
        codes, ends, values[name] = fp8(w, form)
        out |= {name: codes, **{name.removesuffix("weight") + end: t for end, t in ends.items()}}
    write_weights(f, out)
    edit_config(f, quantization_config=config, dtype="bfloat16")
    return values


DEEPSEEK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
FORMS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "blocks of DeepSeek": ("block 32 32", DEEPSEEK),
    "blocks larger than the matrix": ("block 128 128", {**DEEPSEEK, "weight_block_size": [128, 128]}),
    "blocks that do not fit evenly": ("block 80 40", {**DEEPSEEK, "weight_block_size": [80, 40]}),
    "blocks without a word": ("block 32 32", {"quant_method": "fp8"}),
    "exponents as scales": ("exponents", {**DEEPSEEK, "scale_fmt": "ue8m0"}),
    "a scale per tensor, Mistral": ("tensor inv", {**DEEPSEEK, "weight_block_size": None, "activation_scheme": "static"}),
    "a scale per tensor, compressed-tensors": ("tensor", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "a scale per row": ("channel", {"quant_method": "compressed-tensors", "format": "float-quantized"}),
    "a scale per row, FBGEMM": ("channel flat", {"quant_method": "fbgemm_fp8"}),
    "ModelOpt": ("tensor", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "E5M2": ("e5m2", {"quant_method": "fp8"}),
}


@pytest.mark.parametrize("case", FORMS)
def test_fp8_is_read_as_the_numbers_it_stands_for(case: str, folder: Path) -> None:
    values = store_fp8(folder, *FORMS[case])
    source = SourceModel(folder)
    assert sorted(source.names()) == sorted(n for n in source.names() if "scale" not in n)
    exact_in_float32 = FORMS[case][0] in ("exponents", "channel")
    for name, wanted in values.items():
        assert (source.dtype(name), source.shape(name)) == ("BF16", tuple(wanted.shape))
        assert source.nbytes(name) == 2 * wanted.numel()
        found = source.load(name)
        nearest = wanted.bfloat16()
        if exact_in_float32:
            assert torch.equal(found, nearest)
        else:  # rounded to float32 before: a value in the middle may go the other way
            assert float((found != nearest).float().mean()) < 1e-3
            assert float((found.double() - wanted).abs().max() / wanted.abs().max()) < 2**-8
        for rows in (slice(0, 1), slice(7, 50), slice(-5, None), slice(3, 3)):
            assert torch.equal(source.load(name, rows), found[rows])
    spec = load_spec(source)
    assert any("stored in" in w and "FP8" in w for w in spec.warnings)
    assert scan_values(source, stored_names(spec)) == []
    written = output_config(loader_config(spec.arch, source.config), 3.0, 6, 8, 256, None)
    assert written["quantization_config"]["quant_method"] == "exl2"
    assert "fp8" not in json.dumps(written)


@pytest.mark.parametrize("case", ["blocks of DeepSeek", "blocks larger than the matrix", "a scale per tensor, Mistral"])
def test_fp8_gives_the_logits_of_transformers(case: str, folder: Path) -> None:
    from transformers import FineGrainedFP8Config

    form, config = FORMS[case]
    store_fp8(folder, form, config)
    settings = FineGrainedFP8Config(weight_block_size=(config or {}).get("weight_block_size"), dequantize=True)
    model = __import__("transformers").AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, quantization_config=settings
    )
    ours = SourceModel(folder)
    state = model.state_dict()
    compared = [n for n in ours.names() if "_proj" in n]
    assert len(compared) == 14
    for name in compared:
        assert torch.equal(ours.load(name), state[name]), name


def test_a_cast_to_fp8_without_scales(folder: Path) -> None:
    """Somebody's ``.to(torch.float8_e4m3fn)``: transformers takes the codes as values."""
    edited(lambda t: t.update({n: w.to(E4M3) for n, w in t.items() if "_proj" in n}))(folder)
    assert relative_error(our_logits(folder), transformers_logits(folder)) < TOLERANCE


UP = "model.layers.0.mlp.up_proj.weight"
BROKEN_FP8: dict[str, tuple[Change, tuple[str, ...]]] = {
    "no scale": (edited(lambda t: t.pop(UP + "_scale_inv")), ("up_proj.weight", "its scale is missing")),
    "scale of another shape": (edited(lambda t: t.update({UP + "_scale_inv": torch.ones(5, 7)})),
                               ("up_proj.weight", "[5, 7]", "weight_block_size")),
    "scale of integers": (edited(lambda t: t.update({UP + "_scale_inv": torch.ones(3, 2).int()})),
                          ("up_proj.weight_scale_inv", "I32")),
    "NaN": (edited(lambda t: t[UP].view(torch.uint8).fill_(127)), ("up_proj.weight", "NaN")),
    "an infinite scale": (edited(lambda t: t[UP + "_scale_inv"].fill_(torch.inf)), ("up_proj.weight", "beyond float16")),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_FP8)
def test_broken_fp8_is_named(case: str, folder: Path) -> None:
    store_fp8(folder, *FORMS["blocks of DeepSeek"])
    change, words = BROKEN_FP8[case]
    change(folder)
    exl2ray("plan", "-i", folder, "-b", "4", "-l", "128", "-ml", "128").ends_with(3, *words)


def mxfp4(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(pairs (n, k / 2) uint8, exponents (n, k / 32) uint8, values float64)."""
    n, k = w.shape
    groups = w.double().reshape(n, k // 32, 32)
    exponent = (groups.abs().amax(-1) / 6).log2().ceil().clamp(-127, 127)
    scaled = groups / exponent.exp2()[..., None]
    codes = (scaled[..., None] - FP4).abs().argmin(-1).to(torch.uint8)
    values = (FP4[codes.long()] * exponent.exp2()[..., None]).reshape(n, k)
    pairs = codes.reshape(n, k // 2, 2)
    return pairs[..., 0] | pairs[..., 1] << 4, (exponent + 127).to(torch.uint8), values


@pytest.mark.parametrize(("end", "scale_end", "method"), [
    ("weight_packed", "weight_scale", "compressed-tensors"),
    ("weight", "weight_scale", "quark"),
    ("weight_blocks", "weight_scales", "mxfp4"),
])  # fmt: skip
def test_mxfp4_is_read_as_the_numbers_it_stands_for(end: str, scale_end: str, method: str, folder: Path) -> None:
    out, values = {}, {}
    for name, w in read_weights(folder).items():
        if "_proj" not in name:
            out[name] = w
            continue
        stem = name.removesuffix("weight")
        pairs, exponents, values[name] = mxfp4(w.float())
        if end == "weight_blocks":
            pairs = pairs.reshape(*exponents.shape, 16)
        out |= {stem + end: pairs, stem + scale_end: exponents}
    write_weights(folder, out)
    edit_config(folder, quantization_config={"quant_method": method}, dtype="bfloat16")
    source = SourceModel(folder)
    for name, wanted in values.items():
        assert torch.equal(source.load(name), wanted.bfloat16())  # powers of two: nothing is rounded
        assert torch.equal(source.load(name, slice(3, 41)), wanted.bfloat16()[3:41])
    assert any("stored in MXFP4" in w for w in load_spec(source).warnings)
    assert our_logits(folder).isfinite().all()


def test_reading_ahead_and_fingerprints_of_fp8(folder: Path) -> None:
    store_fp8(folder, *FORMS["blocks of DeepSeek"])
    source, name = SourceModel(folder), "model.layers.0.mlp.up_proj.weight"
    ahead = ReadAhead(source, allocate=lambda n: torch.empty(n, dtype=torch.uint8), threads=2)
    ahead.fetch([name])
    assert torch.equal(ahead.load(name), source.load(name))
    before = source.fingerprint()
    edited(lambda t: t[name + "_scale_inv"].mul_(2))(folder)
    assert SourceModel(folder).fingerprint() != before


def test_a_block_of_a_group_reads_rows_of_fp8(folder: Path) -> None:
    """Members of a group read parts of a tensor; put together they are the whole, wherever the cut is."""
    store_fp8(folder, *FORMS["blocks that do not fit evenly"])
    source, name = SourceModel(folder), "model.layers.0.mlp.up_proj.weight"
    for members in (2, 3, 5, 7):
        size = -(-96 // members)
        parts = [source.load(name, slice(i * size, min(96, (i + 1) * size))) for i in range(members)]
        assert torch.equal(torch.cat(parts), source.load(name))


def test_fp8_of_a_scale_that_belongs_to_an_error_type(folder: Path) -> None:
    store_fp8(folder, *FORMS["blocks of DeepSeek"])
    with pytest.raises(SourceError, match="step 1"):
        SourceModel(folder).load("model.layers.0.mlp.up_proj.weight", slice(0, 8, 2))


def test_a_model_in_fp8_converts(folder: Path, tmp_path: Path) -> None:
    store_fp8(folder, *FORMS["blocks of DeepSeek"])
    text = write_text(tmp_path / "text.parquet")
    where = ("-o", tmp_path / "work", "-cf", tmp_path / "out", "-c", text, "-l", "128", "-ml", "128", "-r", "2", "-mr", "2")
    flags = ("-b", "4", "--device", "cpu", "--quality", "reference", "--evaluate", "never")
    run = exl2ray("convert", "-i", folder, *where, *flags, seconds=60)
    run.ends_with(0, "stored in FP8")
    exl2ray("verify", tmp_path / "out", "-i", folder).ends_with(0, "sound")
