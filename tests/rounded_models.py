"""Tiny EXL2 models, rounded to the nearest integer: there is much to gain by tuning, and they are written in no time."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from exl2ray.formats.hf import SourceModel
from exl2ray.formats.shards import TensorEntry, output_config, write_config, write_shards
from exl2ray.model.arch import load_spec
from exl2ray.model.hyper import loader_config
from exl2ray.model.weights import output_tensors, read_linear, read_plain
from exl2ray.quant.gptq import quantize_reference
from exl2ray.quant.pack import pack, pad_columns
from exl2ray.quant.qparams import parse

OPTION = "0.4:4b_32g/0.6:3b_32g"


def write_rounded(source_dir: Path, target: Path, option: str = OPTION) -> Path:
    """An EXL2 model of all linears at ``option``, in random act-order."""
    source = SourceModel(source_dir)
    spec = load_spec(source)
    entries: list[TensorEntry] = []
    for i, entry in enumerate(output_tensors(spec)):
        if entry.plain is not None:
            entries.append(TensorEntry.of(entry.name, read_plain(spec, entry.plain, source)))
        if entry.linear is None:
            continue
        weight, bias = read_linear(spec, entry.linear, source)
        perm = torch.randperm(len(weight), generator=torch.Generator().manual_seed(i))
        layout = parse(option).layout(len(weight))
        packed = pack(entry.linear.key, quantize_reference(pad_columns(weight.float()), perm, None, layout), bias)
        entries += [TensorEntry.of(name, tensor) for name, tensor in packed.tensors().items()]
    write_shards(target, entries)
    shutil.copy(source_dir / "tokenizer.json", target)
    write_config(target, output_config(loader_config(spec.arch, source.config), 3.5, 6, 1, 128, None))
    return target
