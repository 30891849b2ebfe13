"""How large a model directory is: bytes of its weight files, bits per weight of its linears."""

from __future__ import annotations

import math
from dataclasses import dataclass

from exl2ray.errors import FormatError, SourceError
from exl2ray.evaluate.forward import OpenModel
from exl2ray.evaluate.gguf import GgufModel
from exl2ray.formats.exl2 import QUANTIZED_SUFFIXES
from exl2ray.model.spec import LinearSpec

FLOAT_BITS = {"F16": 16, "BF16": 16, "F32": 32}


@dataclass(frozen=True)
class ModelSize:
    """file_bytes: all weight files. linears_bpw: stored bits of the linears without the head, per weight, the figure
    that a conversion's ``-b`` is about. head_bpw: the same of the head. file_bpw: bits of the files per parameter,
    where a head tied to the embedding counts no parameters of its own."""

    file_bytes: int
    parameters: int
    linears_bpw: float
    head_bpw: float
    file_bpw: float


def model_size(model: OpenModel) -> ModelSize:
    """Sizes from headers and file sizes alone. Raises SourceError or FormatError for tensors that are missing."""
    linears = [x for m in model.spec.modules if m.kind != "head" for x in m.linears]
    heads = [x for m in model.spec.modules if m.kind == "head" for x in m.linears]
    file_bytes = sum(f.file_bytes for f in model.source.files.values())
    parameters = _parameters(model)
    return ModelSize(file_bytes, parameters, _bpw(model, linears), _bpw(model, heads), 8 * file_bytes / parameters)


def _bpw(model: OpenModel, linears: list[LinearSpec]) -> float:
    """Bits per weight over padded widths, as allocation counts both (converter-algorithm section 10)."""
    return sum(_bits(model, x) for x in linears) / sum(x.in_features * x.padded_out for x in linears)


def _bits(model: OpenModel, linear: LinearSpec) -> float:
    source = model.source
    if f"{linear.key}.q_weight" in source:
        names = [linear.key + suffix for suffix in QUANTIZED_SUFFIXES]
        if f"{linear.key}.bias" in source:
            names.append(f"{linear.key}.bias")
        return 8 * sum(source.nbytes(name) for name in names)
    biases = linear.out_features if linear.has_bias else 0
    if isinstance(source, GgufModel):
        bias = 0.0 if linear.bias is None else linear.out_features * source.stored_bits(linear.bias.name)
        return linear.in_features * linear.padded_out * source.stored_bits(linear.weight.name) + bias
    dtype = source.dtype(linear.weight.name)
    if dtype not in FLOAT_BITS:
        error = FormatError if model.quantized else SourceError
        raise error(f"{model.path}: tensor {linear.weight.name} has dtype {dtype}; F16, BF16 or F32 is needed")
    return FLOAT_BITS[dtype] * (linear.in_features * linear.padded_out + biases)


def _parameters(model: OpenModel) -> int:
    spec, source = model.spec, model.source
    linears = [x for x in spec.linears if not (spec.tied and x.input_group == "head")]
    count = sum(x.in_features * x.out_features + (x.out_features if x.has_bias else 0) for x in linears)
    plain = [p.stored.name for m in spec.modules for p in m.plain] + [c.source_name for c in spec.copied]
    return count + sum(math.prod(source.shape(name)) for name in plain)
