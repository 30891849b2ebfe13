"""EXL2 tensors: one packed linear, its structural check, and the reader of an EXL2 directory.

The bit streams are packed by `exl2ray.quant.pack`, whose oracle tests/exl2_numpy.py spells the byte layout out; ``verify.py``
has the checks of a whole directory.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.errors import FormatError
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import GroupLayout

MAX_IN_FEATURES = 65536  # the loader keeps the permutation in 16 bits
NOT_SAID = (
    "ExLlamaV2, whose first versions wrote none, loads the model all the same; transformers and vLLM do not know it for EXL2 "
    "unless it has an entry like {\"quant_method\": \"exl2\", \"bits\": 4.0}"
)
QUANTIZED_SUFFIXES = (".q_weight", ".q_scale", ".q_scale_max", ".q_groups", ".q_invperm")


@dataclass(frozen=True, eq=False)
class PackedLinear:
    """One quantised linear as stored; K = in_features, N32 = out_features padded to 32, G groups, Q packed rows."""

    key: str  # module name, e.g. model.layers.7.self_attn.q_proj
    q_weight: Tensor  # (Q, N32) int32, packed unsigned integers
    q_scale: Tensor  # (G, N32 / 8) int32, eight 4-bit codes (minus 1) per word
    q_scale_max: Tensor  # (G,) float16, largest step size of the group, not divided by 256
    q_groups: Tensor  # (2 G,) int16, pairs (width, first q_weight row)
    q_invperm: Tensor  # (K,) int32, stored row of each input feature
    bias: Tensor | None = None  # (N32,) float16, original column order

    @cached_property
    def layout(self) -> GroupLayout:
        """Groups recovered from ``q_groups`` and Q; raises FormatError if they are not legal."""
        return groups_layout(self.q_groups.tolist(), self.q_weight.shape[0], self.key)

    @property
    def in_features(self) -> int:
        return self.q_invperm.shape[0]

    @property
    def out_features(self) -> int:
        """Stored columns: the model's width rounded up to a multiple of 32."""
        return self.q_weight.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        """File name -> tensor, in the order in which shards are written."""
        out = {
            f"{self.key}.q_weight": self.q_weight,
            f"{self.key}.q_scale": self.q_scale,
            f"{self.key}.q_scale_max": self.q_scale_max,
            f"{self.key}.q_groups": self.q_groups,
            f"{self.key}.q_invperm": self.q_invperm,
        }
        if self.bias is not None:
            out[f"{self.key}.bias"] = self.bias
        return out

    @staticmethod
    def from_tensors(key: str, getter: Callable[[str], Tensor | None]) -> PackedLinear:
        """Collect the tensors of ``key``; ``getter`` returns None for an absent name (``dict.get`` will do).

        Raises FormatError if a tensor is missing or the result breaks a rule of ``check_linear``.
        """
        found = [getter(key + suffix) for suffix in QUANTIZED_SUFFIXES]
        missing = [key + s for s, t in zip(QUANTIZED_SUFFIXES, found, strict=True) if t is None]
        q_weight, q_scale, q_scale_max, q_groups, q_invperm = found
        if q_weight is None or q_scale is None or q_scale_max is None or q_groups is None or q_invperm is None:
            raise FormatError(f"quantised linear {key!r}: missing {', '.join(missing)}")
        p = PackedLinear(key, q_weight, q_scale, q_scale_max, q_groups, q_invperm, getter(f"{key}.bias"))
        problems = check_linear(p)
        if problems:
            raise FormatError(f"quantised linear {key!r}: {'; '.join(problems)}")
        return p


def linear_keys(names: Iterable[str]) -> list[str]:
    """Names of the quantised linears among those of the tensors of a model, sorted."""
    return sorted(name.removesuffix(".q_weight") for name in names if name.endswith(".q_weight"))


def groups_layout(pairs: Sequence[int], packed_rows: int, key: str = "linear") -> GroupLayout:
    """``q_groups`` pairs and Q -> layout, as the loader recovers it. Raises FormatError."""
    where = f"{key}.q_groups"
    if not pairs or len(pairs) % 2:
        raise FormatError(f"{where}: {len(pairs)} numbers are not a non-empty list of (width, offset) pairs")
    bits, offsets = tuple(pairs[0::2]), (*pairs[1::2], packed_rows)
    if offsets[0] != 0:
        raise FormatError(f"{where}: the first group starts at q_weight row {offsets[0]}, not 0")
    rows = []
    for g, b in enumerate(bits):
        words = offsets[g + 1] - offsets[g]
        if b <= 0 or words <= 0 or words % b:
            raise FormatError(f"{where}: group {g} of width {b} spans q_weight rows {offsets[g]} to {offsets[g + 1]}")
        rows.append(words // b * 32)
    try:
        return GroupLayout(bits, tuple(rows))
    except FormatError as e:
        raise FormatError(f"{where}: {e.message}") from e


def check_linear(p: PackedLinear) -> list[str]:
    """Every broken rule of the format that one linear shows, as sentences; empty if it is sound.

    ``q_weight`` is judged by dtype and shape alone, so it may be a tensor on the meta device.
    """
    out = _check_types(p)
    if out:
        return out
    k, n, g = p.in_features, p.out_features, p.q_scale_max.shape[0]
    if not 0 < k <= MAX_IN_FEATURES or k % 32:
        out.append(f"in_features {k} is not a multiple of 32 between 32 and {MAX_IN_FEATURES}")
    if n <= 0 or n % 32:
        out.append(f"q_weight has {n} columns, not a positive multiple of 32")
    if tuple(p.q_scale.shape) != (g, n // 8):
        out.append(f"q_scale has shape {tuple(p.q_scale.shape)}; {g} groups of {n} columns need {(g, n // 8)}")
    if p.q_groups.shape[0] != 2 * g:
        out.append(f"q_groups has {p.q_groups.shape[0]} numbers; {g} groups need {2 * g}")
    if p.bias is not None and p.bias.shape[0] != n:
        out.append(f"bias has {p.bias.shape[0]} entries; q_weight has {n} columns")
    try:
        if p.layout.in_features != k:
            out.append(f"the groups hold {p.layout.in_features} rows; q_invperm has {k}")
    except FormatError as e:
        out.append(e.message)
    if not torch.equal(p.q_invperm.sort().values, torch.arange(k, dtype=torch.int32)):
        out.append(f"q_invperm is not a permutation of 0..{k - 1}")
    if not bool(torch.isfinite(p.q_scale_max).all()) or bool((p.q_scale_max < 0).any()):
        out.append("q_scale_max has NaN, infinite or negative entries")
    if p.bias is not None and not bool(torch.isfinite(p.bias).all()):
        out.append("bias has NaN or infinite entries")
    return out


def _check_types(p: PackedLinear) -> list[str]:
    expected = [
        ("q_weight", p.q_weight, torch.int32, 2),
        ("q_scale", p.q_scale, torch.int32, 2),
        ("q_scale_max", p.q_scale_max, torch.float16, 1),
        ("q_groups", p.q_groups, torch.int16, 1),
        ("q_invperm", p.q_invperm, torch.int32, 1),
    ]
    if p.bias is not None:
        expected.append(("bias", p.bias, torch.float16, 1))
    return [
        f"{name} is {t.dtype} with shape {tuple(t.shape)}; {dtype} with {dims} dimension{'s' * (dims > 1)} is needed"
        for name, t, dtype, dims in expected
        if t.dtype != dtype or t.dim() != dims
    ]


class Exl2Model(SourceModel):
    """An EXL2 directory with config.json. Broken content raises FormatError. Weight index files are ignored, since
    the reference copies those of the source model, which no longer describe the weights.

    ``quantization_config``, which ExLlamaV2 does not read, is not in models of its first versions; packed weights tell.
    """

    error = FormatError
    is_source = False

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        if self.config.get("quantization_config") is None and self.keys():
            self.config = {**self.config, "quantization_config": {"quant_method": "exl2"}}
            self.notes.append(f"{self.path}: config.json has no quantization_config: {NOT_SAID}")

    def keys(self) -> list[str]:
        """Module names of the quantised linears, sorted."""
        return linear_keys(self.names())

    def linear(self, key: str, integers: bool = True) -> PackedLinear:
        """Load and check one quantised linear. integers: whether they are read; if not, q_weight is on the meta device."""

        def load(name: str) -> Tensor | None:
            if name not in self:
                return None
            if integers or name != f"{key}.q_weight":
                return self.load(name)
            return torch.empty(self.shape(name), dtype=torch.int32, device="meta")

        try:
            return PackedLinear.from_tensors(key, load)
        except FormatError as e:
            raise self.damaged(key, e) from e

    def damaged(self, key: str, e: FormatError) -> FormatError:
        """``e``, which is of the linear ``key``, with its file and what to do."""
        name = f"{key}.q_weight"
        hint = f"fetch the model again; `exl2ray verify {shlex.quote(str(self.path))}` lists all that is wrong with it"
        return FormatError(f"{self.file(name) if name in self else self.path}: {e.message}", e.hint or hint)
