"""Weights that are stored in FP8 or MXFP4: read as the numbers that they stand for, with the logits of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bounded import exl2ray
from model_folders import (
    Change,
    Tensors,
    edit_config,
    edited,
    our_logits,
    read_weights,
    relative_error,
    transformers_logits,
    write_weights,
)
from tiny_models import write_text
from torch import Tensor

from exl2ray.errors import SourceError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.readahead import ReadAhead
from exl2ray.formats.shards import output_config
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config
from exl2ray.plan.scan import scan_values, stored_names

TOLERANCE = 2e-6


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
    "blocks larger than any matrix": ("block 4096 4096", {**DEEPSEEK, "weight_block_size": [10**30, 1 << 36]}),
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
