"""What is inside an EXL2 directory: bits per linear, per layer and in total, sizes, and the conversion's settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from exl2ray.errors import FormatError
from exl2ray.formats.exl2 import QUANTIZED_SUFFIXES, Exl2Model, groups_layout
from exl2ray.formats.layout import GroupLayout
from exl2ray.formats.source.folder import Folder
from exl2ray.formats.source.quantised import kind

LAYER = re.compile(r".*\.layers\.(\d+)\.")


@dataclass(frozen=True)
class LinearSummary:
    """One packed linear."""

    key: str
    in_features: int
    out_features: int  # stored columns, padded to 32
    total_bits: int  # all q_* tensors and the bias
    nbytes: int  # the same as stored
    layout: str  # e.g. "32 x 4b/32 + 224 x 3b/64": rows x width / group size
    has_bias: bool

    @property
    def bits_per_weight(self) -> float:
        return self.total_bits / (self.in_features * self.out_features)

    @property
    def layer(self) -> int | None:
        """Decoder layer index; None for the head."""
        m = LAYER.match(self.key)
        return int(m[1]) if m else None


@dataclass(frozen=True)
class DirectorySummary:
    """A directory, from its headers."""

    path: Path
    architecture: str
    settings: Mapping[str, Any]  # quantization_config of config.json, empty if there is none
    linears: tuple[LinearSummary, ...]  # in layer order, the head last
    plain_tensors: int
    plain_bytes: int  # embeddings, norms, routers, vision towers
    files: Mapping[str, int]  # shard name -> bytes
    parameters: int  # a head tied to the embedding counts none of its own

    @property
    def file_bpw(self) -> float:
        """Bits of the weight files per parameter."""
        return 8 * self.total_bytes / self.parameters

    @property
    def total_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def decoder_bpw(self) -> float:
        """Mean bits per weight over the decoder's linears, the quantity that ``-b`` asks for; 0 if there are none."""
        return mean_bpw(x for x in self.linears if x.layer is not None)

    @property
    def head_bpw(self) -> float:
        """Bits per weight of the quantised head; 0 if it is not quantised."""
        return mean_bpw(x for x in self.linears if x.layer is None)

    def layer_bpw(self) -> dict[int, float]:
        """Mean bits per weight of each decoder layer."""
        layers = sorted({x.layer for x in self.linears if x.layer is not None})
        return {i: mean_bpw(x for x in self.linears if x.layer == i) for i in layers}


def inspect_directory(path: str | Path) -> DirectorySummary:
    """Summarise an EXL2 directory; reads headers and group tables only. Raises FormatError if it is not sound."""
    model = Exl2Model(path)
    keys = model.keys()
    if not keys:
        nothing = ("a model without quantised weights", "")
        what, bits = kind(map(model.info, model.names()), model.config, Folder(path)) or nothing
        hint = "inspect shows EXL2 models only"
        raise FormatError(f"{path}: {what}{bits}, not an EXL2 one: holds no quantised linear", hint)
    linears = tuple(sorted((_linear(model, key) for key in keys), key=_order))
    quantized = {key + s for key in keys for s in (*QUANTIZED_SUFFIXES, ".bias")}
    plain = [n for n in model.names() if n not in quantized]
    settings = model.config.get("quantization_config")
    tied = bool(model.config.get("tie_word_embeddings"))
    own = [x for x in linears if not (tied and x.layer is None)]
    weights = sum(x.in_features * x.out_features + x.out_features * x.has_bias for x in own)
    return DirectorySummary(
        path=model.path,
        architecture=model.architecture,
        settings=settings if isinstance(settings, dict) else {},
        linears=linears,
        plain_tensors=len(plain),
        plain_bytes=sum(model.nbytes(n) for n in plain),
        files={name: f.file_bytes for name, f in model.files.items()},
        parameters=max(1, weights + sum(math.prod(model.shape(n)) for n in plain)),
    )


def described(summary: DirectorySummary) -> dict[str, Any]:
    """Its ``quantization_config``, with what the first versions of ExLlamaV2 did not write as far as the tensors tell."""
    settings = dict(summary.settings)
    told = {"quant_method": "exl2", "version": "", "bits": round(summary.decoder_bpw, 4)}
    for key, value in {**told, "head_bits": round(summary.head_bpw) or 16, "calibration": dict[str, Any]()}.items():
        settings.setdefault(key, value)
    return settings


def layout_text(layout: GroupLayout) -> str:
    """Rows x width / group size for each run of equal groups, in stored order."""
    runs = groupby(zip(layout.bits, layout.rows, strict=True))
    return " + ".join(f"{rows * len(list(group))} x {bits}b/{rows}" for (bits, rows), group in runs)


def mean_bpw(linears: Iterable[LinearSummary]) -> float:
    """Bits per weight over several linears, weighted by their size; 0 for none."""
    chosen = list(linears)
    weights = sum(x.in_features * x.out_features for x in chosen)
    return sum(x.total_bits for x in chosen) / weights if weights else 0.0


def _linear(model: Exl2Model, key: str) -> LinearSummary:
    q_shape, groups = model.shape(f"{key}.q_weight"), model.load(f"{key}.q_groups")
    if len(q_shape) != 2 or 0 in q_shape or groups.dtype != torch.int16 or groups.dim() != 1:
        found = f"q_weight {list(q_shape)}, q_groups {groups.dtype} {list(groups.shape)}"
        raise model.damaged(key, FormatError(f"{key}: illegal shapes or dtypes: {found}"))
    try:
        layout = groups_layout(groups.tolist(), q_shape[0], key)
    except FormatError as e:
        raise model.damaged(key, e) from e
    names = [key + s for s in QUANTIZED_SUFFIXES]
    has_bias = f"{key}.bias" in model
    return LinearSummary(
        key=key,
        in_features=layout.in_features,
        out_features=q_shape[1],
        total_bits=layout.total_bits(q_shape[1], has_bias),
        nbytes=sum(model.nbytes(n) for n in names) + (model.nbytes(f"{key}.bias") if has_bias else 0),
        layout=layout_text(layout),
        has_bias=has_bias,
    )


def _order(linear: LinearSummary) -> tuple[bool, int, list[int | str]]:
    """Layer order, then natural order of names, so that expert 10 comes after expert 9."""
    parts: list[int | str] = [int(p) if i % 2 else p for i, p in enumerate(re.split(r"(\d+)", linear.key))]
    return linear.layer is None, linear.layer or 0, parts
