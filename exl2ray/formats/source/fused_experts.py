"""Experts of a layer in one tensor, as transformers 5 holds them and may save them: read as the matrices they are made of.

``experts.gate_up_proj`` is (experts, 2 I, H), of each expert first the gate, then up; ``experts.down_proj`` (experts, H, I).
Each matrix is one range of the bytes, so that nothing is copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from exl2ray.formats.tensorfile import TensorInfo

STORED = re.compile(r"(.*\.)(mlp|block_sparse_moe)\.experts\.(gate_up_proj|down_proj)(?:\.weight)?")
# Of families that store each expert by itself: where a layer has them, and what gate, up and down are called.
SINGLE = {
    "MixtralForCausalLM": ("block_sparse_moe", "w1", "w3", "w2"),
    "Qwen3MoeForCausalLM": ("mlp", "gate_proj", "up_proj", "down_proj"),
}
PLAIN = ("BF16", "F16", "F32", "F64")
MOST_EXPERTS = 100_000  # of all layers; the largest models have 15,000


def single_experts(tensors: Mapping[str, TensorInfo], config: Mapping[str, Any]) -> dict[str, TensorInfo]:
    """``tensors`` with each matrix of each expert by the name that the family gives it, and routers likewise. What has other
    shapes than the above stays as it is."""
    names = SINGLE.get(str((config.get("architectures") or [""])[0]))
    out = dict(tensors)
    if names is None:
        return out
    layers: dict[tuple[str, str], dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        found = STORED.fullmatch(name)
        if found:
            layers.setdefault((found[1], found[2]), {})[found[3]] = info
    fused = {where: pair for where, parts in layers.items() if (pair := _fitting(parts)) is not None}
    if sum(down.shape[0] for _, down in fused.values()) > MOST_EXPERTS:
        return out
    for (layer, block), (both, down) in fused.items():
        for info in (both, down):
            del out[info.name]
        room, gate, up, last = names
        for e in range(down.shape[0]):
            start = f"{layer}{room}.experts.{e}."
            whole = _matrix(both, f"{start}{gate}.weight", e)
            half = replace(whole, shape=(whole.shape[0] // 2, whole.shape[1]), nbytes=whole.nbytes // 2)
            rest = replace(half, name=f"{start}{up}.weight", begin=half.begin + half.nbytes)
            out.update({info.name: info for info in (half, rest, _matrix(down, f"{start}{last}.weight", e))})
        router = out.pop(f"{layer}{block}.gate.weight", None)
        if router is not None:
            out[f"{layer}{room}.gate.weight"] = replace(router, name=f"{layer}{room}.gate.weight")
    return out


def _fitting(parts: Mapping[str, TensorInfo]) -> tuple[TensorInfo, TensorInfo] | None:
    """Gate and up, and down, of a layer, if their shapes are those of experts."""
    both, down = parts.get("gate_up_proj"), parts.get("down_proj")
    if both is None or down is None or len(down.shape) != 3 or not both.nbytes or not down.nbytes:
        return None
    experts, hidden, width = down.shape
    return (both, down) if both.shape == (experts, 2 * width, hidden) and {both.dtype, down.dtype} <= {*PLAIN} else None


def _matrix(info: TensorInfo, name: str, expert: int) -> TensorInfo:
    size = info.nbytes // info.shape[0]
    return replace(info, name=name, shape=info.shape[1:], begin=info.begin + expert * size, nbytes=size)
