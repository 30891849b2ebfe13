"""Structural check of an EXL2 directory: every rule of the format that the directory alone can show.

Where ExLlamaV2's writer and its loader differ, the loader decides. Nothing is raised for broken content: each broken rule
is a ``Problem``. ``q_weight`` is judged by dtype and shape, everything smaller by content as well, so a check reads little
more than the embeddings. This file reads the directory; ``verify_rules.py`` has the rules about the model as a whole.

| rule | what it is about |
|---|---|
| file | directory, shard or header unreadable; a tensor in two files |
| config | config.json, quantization_config |
| side-file | tokenizer.json, preprocessor_config.json are there; what loaders read beside them is JSON |
| linear | tensors of one quantised linear: dtypes, shapes, groups, permutation, bias |
| block | all-or-none quantisation and completeness of attention, MLP and expert blocks; matching widths |
| layer | layers that are missing or differ from the others |
| router | MoE router missing, quantised, or of the wrong shape |
| fused | leftovers of fused source tensors, which loaders prefer to the quantised ones |
| plain | dtype, shape or values of unquantised tensors |
| head | lm_head, embedding, final norm |
| expected | differences from the shapes that the caller expects |
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from exl2ray.errors import Exl2RayError, FormatError
from exl2ray.formats import verify_rules
from exl2ray.formats.exl2 import NOT_SAID, QUANTIZED_SUFFIXES, PackedLinear, check_linear
from exl2ray.formats.hf import weight_files
from exl2ray.formats.hfconfig import read_config
from exl2ray.formats.json_file import read_json_object
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.source.kinds import look_at_output
from exl2ray.formats.source.model_shards import gaps
from exl2ray.formats.tensorfile import DTYPES, MAX_TENSORS, TensorFile, TensorInfo
from exl2ray.formats.verify_rules import Directory, Problem
from exl2ray.formats.vision import PREPROCESSOR, needs_preprocessor

READ_BY_LOADERS = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json", "generation_config.json")


def verify_directory(path: str | Path, expected: Mapping[str, LinearShape] | None = None) -> list[Problem]:
    """All problems of the EXL2 directory ``path``; an empty list means that no rule is broken.

    ``expected`` maps the output key of every linear of the model to its shape; with it, missing and surplus linears,
    wrong sizes and wrong biases are found too.
    """
    d = Directory(Path(path))
    finding = look_at_output(d.path)
    if finding is not None:
        d.add("file", "; ".join(finding), file=str(path))
        return d.problems
    if not _read_files(d):
        return d.problems
    _check_config(d)
    _check_side_files(d)
    _check_linears(d)
    verify_rules.check_quantized(d)
    verify_rules.check_blocks(d)
    verify_rules.check_layers(d)
    verify_rules.check_routers(d)
    verify_rules.check_fused(d)
    verify_rules.check_sizes(d)
    verify_rules.check_plain(d)
    verify_rules.check_head(d)
    if expected is not None:
        verify_rules.check_expected(d, expected)
    if d.follows:
        shards = ", ".join(d.without[:3]) + (" ..." if len(d.without) > 3 else "")
        d.add("file", f"with it layers, modules or tensors are missing, in {d.follows} places", file=shards)
    return d.problems


def _read_files(d: Directory) -> bool:
    """Reads the headers of all shards; False if there is none."""
    try:
        files = weight_files(d.path, FormatError)
    except Exl2RayError as e:
        d.problems.append(Problem.of_error(d.path, "", "file", e))
        return False
    for name in gaps([f.name for f in files]):
        d.without.append(name)
        d.add("file", "missing; fetch it", file=name)
    for path in files:
        try:
            tensors = TensorFile(path, FormatError).tensors
        except Exl2RayError as e:
            d.without.append(path.name)
            d.problems.append(Problem.of_error(d.path, path.name, "file", e))
            continue
        if len(d.tensors) + len(tensors) > MAX_TENSORS:
            d.add("file", f"more than {MAX_TENSORS} tensors up to here; this file and the next were not read", file=path.name)
            return True
        for name, info in tensors.items():
            if name in d.tensors:
                d.add("file", f"also in {d.tensors[name].file.name}; which one counts is undefined", name, path.name)
            d.tensors[name] = info
    return True


def _check_config(d: Directory) -> None:
    try:
        d.config = read_config(d.path / "config.json", FormatError)
    except Exl2RayError as e:
        d.problems.append(Problem.of_error(d.path, "config.json", "config", e))
        return
    q = d.config.get("quantization_config")
    if q is None:
        d.add("config", f"quantization_config is missing: {NOT_SAID}", file="config.json")
    elif not isinstance(q, dict):
        d.add("config", "quantization_config is not an object", file="config.json")
    elif q.get("quant_method") != "exl2":
        d.add("config", f"quant_method is {str(q.get('quant_method'))[:40]!r}, not 'exl2'", file="config.json")
    else:
        for key, kind in (("bits", (int, float)), ("head_bits", int), ("version", str), ("calibration", dict)):
            if not isinstance(q.get(key), kind):
                d.add("config", f"quantization_config.{key} is {str(q.get(key))[:40]}", file="config.json")


def _check_side_files(d: Directory) -> None:
    needed = ["tokenizer.json", *([PREPROCESSOR] if needs_preprocessor(d.config) else [])]
    for name in dict.fromkeys((*needed, *READ_BY_LOADERS)):
        try:
            if os.path.isfile(d.path / name):
                read_json_object(d.path / name, FormatError, odd=True)
            elif name in needed:
                d.add("side-file", "missing", file=name)
        except FormatError as e:
            d.problems.append(Problem.of_error(d.path, name, "side-file", e))


def _check_linears(d: Directory) -> None:
    keys = {n.removesuffix(s) for n in d.tensors for s in QUANTIZED_SUFFIXES if n.endswith(s)}
    for key in sorted(keys):
        missing = [s[1:] for s in QUANTIZED_SUFFIXES if key + s not in d.tensors]
        if missing:
            d.missing("linear", f"missing {', '.join(missing)}", key)
            continue
        try:
            q_weight = _header_only(d.tensors[f"{key}.q_weight"])
            q_scale, q_scale_max, q_groups, q_invperm = (d.load(key + s) for s in QUANTIZED_SUFFIXES[1:])
            bias = d.load(f"{key}.bias") if f"{key}.bias" in d.tensors else None
        except FormatError as e:
            d.add("linear", e.message, key)
            continue
        p = PackedLinear(key, q_weight, q_scale, q_scale_max, q_groups, q_invperm, bias)
        problems = check_linear(p)
        for message in problems:
            d.add("linear", message, key, d.tensors[f"{key}.q_weight"].file.name)
        if not problems:
            d.linears[key] = p


def _header_only(info: TensorInfo) -> torch.Tensor:
    return torch.empty(info.shape, dtype=DTYPES[info.dtype], device="meta")
