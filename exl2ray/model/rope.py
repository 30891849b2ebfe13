"""Rotary position embeddings: frequencies with every scaling variant, and their application.

Calibration uses the frequencies of the run time. For yarn and longrope these follow from the *configured* context
length, not from the length of the sequence at hand, which is where Hugging Face differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exl2ray.errors import SourceError
from exl2ray.formats.json_file import as_number
from exl2ray.model.config_reader import HINT, MAX_INTEGER, hint_for
from exl2ray.model.rules import RopeStyle
from exl2ray.wording import shown

UNSCALED = ("default", "dynamic", "mrope")  # dynamic: only beyond the trained length; mrope: plain RoPE for text
MIN_THETA, MAX_THETA = 2.0, 1e30  # published models have 1e4 to 1e9
MIN_FACTOR, MAX_FACTOR = 1e-3, 1e6
YARN_BETAS = (32, 1)  # rotations at which interpolation starts and ends; the loader does not read the config's


@dataclass(frozen=True)
class Rope:
    """A resolved rotary embedding.

    inv_freq: radians per position of each of the ``dim / 2`` pairs, scaling applied. magnitude: factor on the rotated
    dimensions. The other ``head_dim - dim`` dimensions of a head pass through.
    """

    style: RopeStyle
    dim: int
    inv_freq: tuple[float, ...]
    magnitude: float = 1.0


def scaling_kind(scaling: Mapping[str, Any]) -> str:
    """Type of a ``rope_scaling`` object; both spellings of the selector, which must not contradict each other."""
    kinds = {str(scaling[k]) for k in ("type", "rope_type") if scaling.get(k)} - {"default"}
    if len(kinds) > 1:
        text = f"config.json: rope_scaling has type and rope_type, which disagree: {shown(sorted(kinds))}"
        raise SourceError(text, "keep the one that the model was trained with")
    return kinds.pop() if kinds else "default"


def resolve_rope(
    style: RopeStyle,
    head_dim: int,
    theta: float,
    scaling: Mapping[str, Any] | None,
    max_seq_len: int,
    partial: float,
    scale: float | None = None,
    alpha: float | None = None,
) -> Rope:
    """Frequencies of one rotary embedding.

    theta: base. scaling: ``rope_scaling`` of the config, with ``original_max_position_embeddings`` filled in. partial:
    rotated share of a head. scale: linear factor that replaces the config's; on top of the other variants. alpha: NTK
    alpha. Raises SourceError for unknown variants and missing keys.
    """
    if not MIN_THETA <= theta <= MAX_THETA:
        raise SourceError(
            f"config.json: rope_theta is {theta:g}; a number from {MIN_THETA:g} to {MAX_THETA:g} is needed", HINT
        )
    dim = int(head_dim * partial)
    if dim <= 0 or dim % 2:
        text = f"RoPE rotates {dim} of {head_dim} dimensions; an even positive number is needed"
        raise SourceError(text, "head_dim or partial_rotary_factor in config.json is wrong; fetch it again")
    scaling = scaling or {}
    kind = scaling_kind(scaling)
    if alpha is not None:
        theta = _stretched(theta, alpha, head_dim if kind in ("su", "longrope", "llama3", "yarn") else dim)
    freq = [theta ** (-2.0 * i / dim) for i in range(dim // 2)]
    magnitude = 1.0
    linear = _number(scaling, "factor") if kind == "linear" else 1.0
    if kind == "llama3":
        freq = _llama3(freq, scaling)
    elif kind == "yarn":
        freq, magnitude = _yarn(freq, theta, dim, scaling, max_seq_len)
    elif kind in ("su", "longrope"):
        freq, magnitude = _longrope(freq, scaling, max_seq_len)
    elif kind != "linear" and kind not in UNSCALED:
        raise SourceError(
            f"config.json: rope_scaling type {shown(kind)} is unknown",
            "EXL2 loaders know linear, llama3, yarn, su, longrope and mrope",
        )
    linear = scale if scale is not None else linear
    if not MIN_FACTOR <= linear <= MAX_FACTOR:
        text = f"RoPE: a scale of {linear:g}; a number from {MIN_FACTOR:g} to {MAX_FACTOR:g} is needed"
        raise SourceError(text, "give another --rope-scale; 1 leaves positions as they are")
    return Rope(style, dim, tuple(f / linear for f in freq), magnitude)


def _stretched(theta: float, alpha: float, q: int) -> float:
    """NTK: the base for ``alpha`` times the context; q: dimensions counted."""
    if not (MIN_FACTOR <= alpha <= MAX_FACTOR and q > 2):
        raise SourceError(
            f"RoPE: alpha {alpha:g} with {q} dimensions; from {MIN_FACTOR:g} to {MAX_FACTOR:g} with more than 2 is possible",
            "give another --rope-alpha; 1 leaves the base as it is",
        )
    stretched = theta * alpha ** (q / (q - 2))
    if not MIN_THETA <= stretched <= MAX_THETA:
        raise SourceError(f"RoPE: alpha {alpha:g} turns the base {theta:g} into {stretched:g}", "give an alpha nearer to 1")
    return float(stretched)


def _number(scaling: Mapping[str, Any], key: str, least: float = MIN_FACTOR, most: float = MAX_FACTOR) -> float:
    value = scaling.get(key)
    number = as_number(value)
    if number is None or number <= 0:
        raise SourceError(f"config.json: rope_scaling.{key} is {shown(value)}; a positive number is needed", hint_for(value))
    if not least <= number <= most:
        raise SourceError(
            f"config.json: rope_scaling.{key} is {shown(value)}; a number from {least:g} to {most:g} is needed", HINT
        )
    return number


def _original(scaling: Mapping[str, Any]) -> float:
    """Positions that the model was trained with."""
    if scaling.get("original_max_position_embeddings") is None:
        raise SourceError(
            "config.json: rope_scaling.original_max_position_embeddings is missing: the length that the model had before it "
            "was extended",
            "copy rope_scaling from config.json of the published model that this one was made from (8192 in Llama 3.1)",
        )
    return _number(scaling, "original_max_position_embeddings", 2, MAX_INTEGER)


def _llama3(freq: Sequence[float], scaling: Mapping[str, Any]) -> list[float]:
    """Long wavelengths are interpolated by ``factor``, short ones kept, those between blended."""
    factor, original = _number(scaling, "factor"), _original(scaling)
    low, high = _number(scaling, "low_freq_factor"), _number(scaling, "high_freq_factor")
    if low >= high:
        raise SourceError(
            f"config.json: rope_scaling.low_freq_factor {low:g} is not smaller than high_freq_factor {high:g}", HINT
        )
    out = []
    for f in freq:
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            out.append(f)
        elif wavelength > original / low:
            out.append(f / factor)
        else:
            t = (original / wavelength - low) / (high - low)
            out.append((1 - t) * f / factor + t * f)
    return out


def _yarn(
    freq: Sequence[float], theta: float, dim: int, scaling: Mapping[str, Any], max_seq_len: int
) -> tuple[list[float], float]:
    """YaRN as the loader computes it: correction range from ``max_seq_len``, inactive up to the original length."""
    factor, original = _number(scaling, "factor"), _original(scaling)
    if max_seq_len <= original:
        return list(freq), 1.0

    def corrected(rotations: int) -> float:
        return dim * math.log(max_seq_len / (2 * math.pi * rotations)) / (2 * math.log(theta))

    low = max(math.floor(corrected(YARN_BETAS[0])), 0)
    high: float = min(math.ceil(corrected(YARN_BETAS[1])), dim - 1)
    if high == low:
        high += 0.001
    out = []
    for i, f in enumerate(freq):
        u = min(max((i - low) / (high - low), 0.0), 1.0)
        out.append(f * (1 - u) + f / factor * u)
    return out, 0.1 * math.log(factor) + 1.0


def _longrope(freq: Sequence[float], scaling: Mapping[str, Any], max_seq_len: int) -> tuple[list[float], float]:
    """Per-frequency factors: long ones iff the configured length exceeds the original one (as the loader)."""
    original = _original(scaling)
    longer = max_seq_len > original
    key = "long_factor" if longer else "short_factor"
    factors = scaling.get(key)
    if not isinstance(factors, (list, tuple)) or len(factors) != len(freq):
        found = f"{len(factors)} entries" if isinstance(factors, (list, tuple)) else shown(factors)
        raise SourceError(
            f"config.json: rope_scaling.{key} has {found}; {len(freq)} numbers are needed",
            "one for every two rotated dimensions of a head: the list, head_dim or partial_rotary_factor is another model's; "
            "fetch config.json again",
        )
    numbers = [as_number(x) or 0.0 for x in factors]
    if not all(MIN_FACTOR <= x <= MAX_FACTOR for x in numbers):
        raise SourceError(
            f"config.json: rope_scaling.{key} holds entries that are not numbers from {MIN_FACTOR:g} to {MAX_FACTOR:g}", HINT
        )
    magnitude = math.sqrt(1 + math.log(max_seq_len / original) / math.log(original)) if longer else 1.0
    return [f / x for f, x in zip(freq, numbers, strict=True)], magnitude


class RotaryTable:
    """cos and sin of one Rope on a device, for positions 0, 1, ...; grows with the longest row seen."""

    def __init__(self, rope: Rope, device: torch.device) -> None:
        self.rope = rope
        self.device = device
        self._cos = torch.empty(0, rope.dim // 2, device=device)
        self._sin = self._cos

    def _tables(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        if self._cos.shape[0] < stop:
            freq = torch.tensor(self.rope.inv_freq, dtype=torch.float64)
            angles = torch.outer(torch.arange(stop, dtype=torch.float64), freq)
            self._cos = (self.rope.magnitude * angles.cos()).to(self.device, torch.float32)
            self._sin = (self.rope.magnitude * angles.sin()).to(self.device, torch.float32)
        return self._cos[start:stop], self._sin[start:stop]

    def rotate(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate x (R, T, heads, head_dim) by the positions start .. start + T - 1, in float32; same shape and dtype."""
        tables = self._tables(start, start + x.shape[1])
        if x.is_cuda:
            from exl2ray.cuda import elementwise

            if elementwise.usable(x):
                return elementwise.rotate(x, *tables, neox=self.rope.style == "neox")
        cos, sin = (t[:, None, :] for t in tables)  # (T, 1, dim / 2)
        turned = x[..., : self.rope.dim]
        if self.rope.style == "neox":
            a, b = turned.chunk(2, dim=-1)
            out = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        else:
            a, b = turned.reshape(*turned.shape[:-1], -1, 2).unbind(-1)
            out = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        out = out.to(x.dtype)
        if self.rope.dim == x.shape[-1]:
            return out
        return torch.cat((out, x[..., self.rope.dim :]), dim=-1)
