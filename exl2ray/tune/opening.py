"""Both models of a tuning, opened, compared and loaded: the EXL2 model as modules to be trained, its source as blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.errors import FormatError, SourceError, UsageError
from exl2ray.evaluate.forward import OpenModel, RunOptions, linear_reader, load_module, open_model
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.side_files import check_side_files
from exl2ray.model.blocks import Block, load_block
from exl2ray.model.rotated import rotated
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec, PlainTensor
from exl2ray.model.weights import read_linear, read_stored
from exl2ray.tune.gains import Gain
from exl2ray.tune.grid import REACH, Grid
from exl2ray.tune.module import NORM_ROLES, TunedLinear, TunedModule


@dataclass(frozen=True, eq=False)
class Pair:
    """``start``: EXL2. ``source``: what it was made from. ``latents_from``: the source as it was quantised (a rotated one, if
    the start says so); None where its weights cannot be read as such."""

    start: OpenModel
    source: OpenModel
    latents_from: ModelSpec | None

    @property
    def exl2(self) -> Exl2Model:
        if not isinstance(self.start.source, Exl2Model):
            raise FormatError(f"{self.start.path}: is no EXL2 model")
        return self.start.source


def open_pair(directory: str | Path, reference: str | Path) -> Pair:
    """Opens both; reads no weights. Raises UsageError, SourceError and FormatError for what does not fit together."""
    start, source = open_model(directory), open_model(reference)
    if not start.quantized:
        raise UsageError(f"{directory}: is no EXL2 model", "tune takes the folder of a converted model, and its --reference")
    if os.path.samefile(start.path, source.path):
        raise UsageError(f"--reference {reference}: is the model to be tuned itself", "give the model that it was made from")
    check_side_files(start.path)
    theirs, ours = _shapes(source.spec), _shapes(start.spec)
    if theirs != ours or source.vocab_size != start.vocab_size:
        different = next((k for k in ours if theirs.get(k) != ours[k]), None)
        what = "vocabulary" if different is None else different
        raise SourceError(
            f"{directory}: {what} is of another size than in --reference {reference}",
            "the reference must be the model that the other one was converted from",
        )
    return Pair(start, source, None if source.quantized else _as_quantised(start, source.spec))


def _shapes(spec: ModelSpec) -> dict[str, tuple[int, int]]:
    return {x.key: (x.in_features, x.out_features) for x in spec.linears}


def _as_quantised(start: OpenModel, spec: ModelSpec) -> ModelSpec | None:
    found = start.source.config.get("quantization_config", {}).get("rotation")
    if found is None:
        return spec
    turned = rotated(spec)
    return turned if turned.rotation is not None and turned.rotation.identity() == found else None


def load_tuned(
    pair: Pair, module: ModuleSpec, device: torch.device, dtype: torch.dtype, reach: float = REACH
) -> TunedModule:
    """One module of the start on the device, computing in ``dtype``, the residual stream in float32."""
    start = pair.exl2
    block = load_block(pair.start.spec, module, start, device, dtype, torch.float32, linear_reader(device))
    linears, gains = {}, []
    for linear in module.linears:
        if f"{linear.key}.q_weight" not in start:
            continue  # kept in float16, as a head may be
        packed = start.linear(linear.key)
        grid = Grid.of(packed, linear.out_features, device)
        latents = grid.latents(grid.integers(packed), _weight(pair, linear, device), reach)
        linears[linear.key] = TunedLinear(packed, grid, latents)
        if packed.bias is not None:
            bias = packed.bias[: linear.out_features]
            gains.append(Gain.of(f"{linear.key}.bias", linear.key, bias, 0.0, device))
    for plain in module.plain:
        if _is_gain(plain):
            offset = 0.0 if plain.role.endswith(".bias") else _offset(pair.start.spec, plain.role)
            stored = read_stored(plain.stored, start)
            gains.append(Gain.of(plain.stored.name, plain.role, stored, offset, device))
    return TunedModule(block, linears, gains)


def load_source(pair: Pair, device: torch.device) -> list[Block]:
    """All modules of the source, as they are evaluated."""
    return [load_module(pair.source, module, device, RunOptions()) for module in pair.source.spec.modules]


def load_finished(pair: Pair, device: torch.device) -> list[Block]:
    """All modules of the start, as they are evaluated."""
    return [load_module(pair.start, module, device, RunOptions()) for module in pair.start.spec.modules]


def _weight(pair: Pair, linear: LinearSpec, device: torch.device) -> Tensor | None:
    """(K, N) float32 as it was quantised."""
    if pair.latents_from is None:
        return None
    theirs = next(x for x in pair.latents_from.linears if x.key == linear.key)
    return read_linear(pair.latents_from, theirs, pair.source.source, device)[0]


def _is_gain(plain: PlainTensor) -> bool:
    whole = not plain.stored.ranges and not plain.stored.transpose
    return whole and plain.role.removesuffix(".bias") in NORM_ROLES


def _offset(spec: ModelSpec, role: str) -> float:
    rule = spec.arch.head_norm if role in ("q_norm", "k_norm") else spec.arch.norm
    return 0.0 if rule is None else rule.offset


def trainable(modules: Sequence[TunedModule]) -> tuple[int, int]:
    """(integers, values of norms and biases)."""
    integers = sum(x.latents.numel() for m in modules for x in m.linears.values())
    return integers, sum(g.delta.numel() for m in modules for g in m.gains.values())
