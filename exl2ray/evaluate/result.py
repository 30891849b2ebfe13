"""What an evaluation found: perplexity, KL divergence, agreement and size of one model directory: bytes of its weight files,
bits per weight of its linears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exl2ray.errors import FormatError, SourceError
from exl2ray.evaluate.forward import OpenModel
from exl2ray.evaluate.gguf_model import GgufModel
from exl2ray.evaluate.metrics import Estimate, Quantile, Scores
from exl2ray.formats.exl2 import QUANTIZED_SUFFIXES
from exl2ray.model.spec import LinearSpec

FLOAT_BITS = {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}


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
    """Bits per weight over padded widths, as allocation counts both."""
    return sum(_bits(model, x) for x in linears) / sum(x.padded_weights for x in linears)


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
        return linear.padded_weights * source.stored_bits(linear.weight.name) + bias
    dtype = source.dtype(linear.weight.name)
    if dtype not in FLOAT_BITS:
        error = FormatError if model.quantized else SourceError
        raise error(f"{model.path}: tensor {linear.weight.name} has dtype {dtype}; F16, BF16, F32 or F64 is needed")
    return FLOAT_BITS[dtype] * (linear.padded_weights + biases)


def _parameters(model: OpenModel) -> int:
    spec, source = model.spec, model.source
    linears = [x for x in spec.linears if not (spec.tied and x.input_group == "head")]
    count = sum(x.weights + (x.out_features if x.has_bias else 0) for x in linears)
    plain = [p.stored.name for m in spec.modules for p in m.plain] + [c.source_name for c in spec.copied]
    return count + sum(math.prod(source.shape(name)) for name in plain)


@dataclass(frozen=True)
class KindResult:
    """The figures of one kind of text, as in ``EvalResult``."""

    predictions: int
    nll: Estimate
    kl: Estimate | None
    top1: Estimate | None

    def to_json(self) -> dict[str, Any]:
        figures = {"perplexity": self.nll.exp(), "kl": self.kl, "top1_agreement": self.top1}
        return {"predictions": self.predictions, **{n: None if e is None else e.to_json() for n, e in figures.items()}}


@dataclass(frozen=True)
class EvalResult:
    """One model on one set of rows. Fields with None need a reference.

    nll: mean negative log-likelihood in nats per token. kl: mean KL(reference || model) in nats per token. top1, top5:
    agreement with the reference, see ``metrics``. nll_increase: nll minus the reference's, whose standard error is that
    of the difference per row and so much smaller than either one's. rows, length: of the tokens given; bos: whether
    BOS was put in front of each row. predictions: tokens that count. seconds: of this model's own forward pass and of
    comparing it; reference_seconds: of the reference's forward pass, shared by all models compared with it. positions:
    the figures of every single prediction, if asked for. kl_tail: quantiles of the KL of single predictions. kinds: by kind
    of text, where the rows have kinds. weights: hash of the model's tensors (`SourceModel.weights_fingerprint`), which tells
    what the figures are of; None for GGUF files.
    """

    model: Path
    reference: Path | None
    rows: int
    length: int
    predictions: int
    bos: bool
    nll: Estimate
    reference_nll: Estimate | None
    nll_increase: Estimate | None
    kl: Estimate | None
    top1: Estimate | None
    top5: Estimate | None
    size: ModelSize
    seconds: float
    reference_seconds: float | None
    warnings: tuple[str, ...] = ()
    positions: Scores | None = field(default=None, repr=False, compare=False)
    kl_tail: Mapping[str, Quantile] = field(default_factory=dict)
    kinds: Mapping[str, KindResult] = field(default_factory=dict)
    weights: str | None = None

    @property
    def perplexity(self) -> Estimate:
        return self.nll.exp()

    @property
    def reference_perplexity(self) -> Estimate | None:
        return self.reference_nll.exp() if self.reference_nll is not None else None

    def to_json(self) -> dict[str, Any]:
        """Everything but ``positions``, as JSON values (`results.schema.json`); figures are {"value", "standard_error"} or
        null, quantiles {"value", "low", "high"}."""
        figures = {
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "nll": self.nll,
            "nll_increase": self.nll_increase,
            "kl": self.kl,
            "top1_agreement": self.top1,
            "top5_agreement": self.top5,
        }
        return {
            "model": str(self.model),
            "reference": None if self.reference is None else str(self.reference),
            "rows": self.rows,
            "length": self.length,
            "predictions": self.predictions,
            "bos": self.bos,
            **{name: None if e is None else e.to_json() for name, e in figures.items()},
            "kl_tail": {name: q.to_json() for name, q in self.kl_tail.items()},
            "kinds": {name: k.to_json() for name, k in self.kinds.items()},
            "file_bytes": self.size.file_bytes,
            "linears_bpw": self.size.linears_bpw,
            "head_bpw": self.size.head_bpw,
            "file_bpw": self.size.file_bpw,
            "weights": self.weights,
            "seconds": self.seconds,
            "reference_seconds": self.reference_seconds,
            "warnings": list(self.warnings),
        }
