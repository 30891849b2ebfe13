"""Both models of a tuning, opened, compared and loaded: the EXL2 model as modules to be trained, its source as blocks."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.errors import FormatError, SourceError, UsageError
from exl2ray.evaluate.forward import OpenModel, RunOptions, linear_reader, load_module, open_model
from exl2ray.formats.exl2 import Exl2Model
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.readahead import ReadAhead
from exl2ray.formats.side_files import check_side_files
from exl2ray.model.blocks import Block, load_block
from exl2ray.model.rotated import rotated
from exl2ray.model.spec import LinearSpec, ModelSpec, ModuleSpec, PlainTensor
from exl2ray.model.weights import read_linear, read_stored
from exl2ray.tune.gains import Gain
from exl2ray.tune.grid import Grid
from exl2ray.tune.judge import PARTS
from exl2ray.tune.module import NORM_ROLES, NORMS, Snapshot, TunedLinear, TunedModule, install, part_of


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
    if isinstance(start.source, Exl2Model) and not start.source.keys():
        raise UsageError(f"{directory}: holds no quantised linear", "its weights are unquantised: see `exl2ray verify`")
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
    return turned if turned.rotation_entry.get("rotation") == found else None


def load_tuned(
    pair: Pair, module: ModuleSpec, device: torch.device, dtype: torch.dtype,
    rank: int = 0, size: int = 1, latents: Mapping[str, Tensor] | None = None, ahead: ReadAhead | None = None,
) -> TunedModule:  # fmt: skip
    """One module of the start on the device, computing in ``dtype``, the residual stream in float32.

    rank, size: which of how many workers this is. latents: of its linears, by key, in place of those to begin with. ahead:
    the source's tensors, if some are read in advance.
    """
    linears, gains = {}, []
    for linear in module.linears:
        if f"{linear.key}.q_weight" not in pair.exl2:
            continue  # kept in float16, as a head may be
        packed = pair.exl2.linear(linear.key, integers=latents is None or linear.key not in latents)
        grid = Grid.of(packed, linear.out_features, device)
        if latents is None:
            mine: Tensor | None = grid.latents(grid.integers(packed), _weight(pair, linear, device, ahead))
        else:
            kept = latents.get(linear.key)
            mine = None if kept is None else kept.to(device, copy=True, non_blocking=True)
        linears[linear.key] = TunedLinear(packed, grid, mine)
        if packed.bias is not None:
            gains.append(_bias_gain(linear, packed.bias, device))
    gains += _norm_gains(pair, module, device)
    stored = linear_reader(device)

    def read(spec: ModelSpec, linear: LinearSpec, source: SourceModel) -> tuple[Tensor, Tensor | None]:
        found = linears.get(linear.key)
        return stored(spec, linear, source) if found is None else (found.weight(), found.before.bias)

    block = load_block(pair.start.spec, module, pair.exl2, device, dtype, torch.float32, read)
    return TunedModule(block, linears, gains, rank, size)


def _bias_gain(linear: LinearSpec, bias: Tensor, device: torch.device) -> Gain:
    return Gain.of(f"{linear.key}.bias", linear.key, bias[: linear.out_features], 0.0, device)


def _norm_gains(pair: Pair, module: ModuleSpec, device: torch.device) -> list[Gain]:
    out = []
    for plain in module.plain:
        if _is_gain(plain):
            offset = 0.0 if plain.role.endswith(".bias") else pair.start.spec.arch.norm_offset(plain.role)
            stored = read_stored(plain.stored, pair.exl2)
            out.append(Gain.of(plain.stored.name, plain.role, stored, offset, device))
    return out


def load_source(pair: Pair, module: ModuleSpec, device: torch.device, ahead: ReadAhead | None = None) -> Block:
    """The module of the source that is in the place of ``module``, as it is evaluated. ahead: as of `load_tuned`."""
    return load_module(pair.source, pair.source.spec.modules[module.index], device, RunOptions(), ahead)


def load_finished(pair: Pair, module: ModuleSpec, device: torch.device) -> Block:
    """A module of the start, as it is evaluated."""
    return load_module(pair.start, module, device, RunOptions())


def install_snapshot(pair: Pair, block: Block, device: torch.device, found: Snapshot, parts: Collection[str]) -> None:
    """Gives a module of `load_finished` the weights of a snapshot; those of the beginning for what is none of ``parts``
    (`exl2ray.tune.judge.PARTS`)."""
    module, weights, gains = block.module, {}, _norm_gains(pair, block.module, device)
    for linear in module.linears:
        if linear.key in found.codes:
            packed = pair.exl2.linear(linear.key)
            grid = Grid.of(packed, linear.out_features, device)
            tuned = part_of(module, linear) in parts
            weights[linear.key] = grid.weight(grid.signed(found.codes[linear.key]) if tuned else grid.integers(packed))
            if packed.bias is not None:
                gains.append(_bias_gain(linear, packed.bias, device))
    install(block, weights, [(g, found.values[g.name].to(device) if NORMS in parts else g.stored) for g in gains])


def parts_of(spec: ModelSpec, pair: Pair) -> list[str]:
    """The parts (`exl2ray.tune.judge.PARTS`) that something is trained of."""
    linears = {part_of(m, x) for m in spec.modules for x in m.linears if f"{x.key}.q_weight" in pair.exl2}
    gains = any(_is_gain(p) for m in spec.modules for p in m.plain) or any(x.has_bias for x in spec.linears)
    return [p for p in PARTS if p in linears or (p == NORMS and gains)]


def _weight(pair: Pair, linear: LinearSpec, device: torch.device, ahead: ReadAhead | None) -> Tensor | None:
    """(K, N) float32 as it was quantised."""
    if pair.latents_from is None:
        return None
    theirs = next(x for x in pair.latents_from.linears if x.key == linear.key)
    return read_linear(pair.latents_from, theirs, ahead or pair.source.source, device)[0]


def _is_gain(plain: PlainTensor) -> bool:
    whole = not plain.stored.ranges and not plain.stored.transpose
    return whole and plain.role.removesuffix(".bias") in NORM_ROLES
