"""Row layouts and bit accounting of one quantised linear layer.

``QParams`` is one option: which share of the rows gets which width, and the group size per width. ``GroupLayout`` is what
an option means for a given K: the groups in stored order. Both, and how bits are counted, are as in ExLlamaV2 0.3.2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from operator import mul
from typing import Any, Protocol

from exl2ray.errors import FormatError, why_not_read

WIDTHS = (2, 3, 4, 5, 6, 8)  # bit widths of the format
FLOAT16_MAX = 65504.0
MAX_GROUP = 1 << 16  # rows; no linear has more


@dataclass(frozen=True)
class GroupLayout:
    """Groups of one linear, in stored order. ``bits[g]`` is the width and ``rows[g]`` the row count of group g."""

    bits: tuple[int, ...]
    rows: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.bits) != len(self.rows) or not self.bits:
            raise FormatError(f"group layout has {len(self.bits)} widths and {len(self.rows)} row counts")
        if not {*self.bits} <= {*WIDTHS} or any(n <= 0 or n % 32 for n in {*self.rows}):
            self._name_the_wrong_one()
        if list(self.bits) != sorted(self.bits, reverse=True):
            raise FormatError(f"widths increase along the stored groups: {self.bits}")

    def _name_the_wrong_one(self) -> None:
        for g, (b, n) in enumerate(zip(self.bits, self.rows, strict=True)):
            if b not in WIDTHS:
                raise FormatError(f"group {g}: width {b} is not one of {WIDTHS}")
            if n <= 0 or n % 32:
                raise FormatError(f"group {g}: {n} rows; the format needs a positive multiple of 32")

    @property
    def in_features(self) -> int:
        return sum(self.rows)

    @property
    def starts(self) -> tuple[int, ...]:
        """First stored row of each group."""
        out, row = [], 0
        for n in self.rows:
            out.append(row)
            row += n
        return tuple(out)

    @property
    def offsets(self) -> tuple[int, ...]:
        """First ``q_weight`` row of each group."""
        out, row = [], 0
        for b, n in zip(self.bits, self.rows, strict=True):
            out.append(row)
            row += n * b // 32
        return tuple(out)

    @property
    def packed_rows(self) -> int:
        """Rows of ``q_weight``."""
        return sum(n * b // 32 for b, n in zip(self.bits, self.rows, strict=True))

    def total_bits(self, out_features: int, has_bias: bool = False) -> int:
        """Bits of all ``q_*`` tensors (and the bias) of a linear with ``out_features`` (padded) columns."""
        k, g, n = self.in_features, len(self.bits), out_features
        weights: int = sum(map(mul, self.rows, self.bits)) * n
        return weights + 16 * g + 32 * g + 4 * g * n + 32 * k + (16 * n if has_bias else 0)


class Sized(Protocol):
    """What decides how many bits a linear takes with an option."""

    @property
    def in_features(self) -> int: ...
    @property
    def padded_out(self) -> int: ...
    @property
    def has_bias(self) -> bool: ...


@dataclass(frozen=True)
class QParams:
    """One quantisation option. ``props[i]`` of the rows get ``bits[i]``, in groups of ``group_sizes[i]`` rows."""

    bits: tuple[int, ...]
    props: tuple[float, ...]
    group_sizes: tuple[int, ...]
    scale_bits: int = 4

    def __hash__(self) -> int:  # kept: an allocation looks tens of thousands of options up
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.bits, self.props, self.group_sizes, self.scale_bits))

    def layout(self, in_features: int) -> GroupLayout:
        """Groups for K = ``in_features`` rows: ceil(share / group size) groups per width, the last one cut at K.

        Raises FormatError if K is not a multiple of 32.
        """
        return _layout(self, in_features)

    def _laid_out(self, in_features: int) -> GroupLayout:
        if in_features <= 0 or in_features % 32:
            raise FormatError(f"in_features {in_features} is not a positive multiple of 32")
        remaining = in_features
        widths: list[int] = []
        rows: list[int] = []
        left = in_features
        for b, p, size in zip(self.bits, self.props, self.group_sizes, strict=True):
            groups = max(0, math.ceil(min(in_features * p, remaining) / size))
            remaining -= groups * size
            whole = min(groups, left // size)
            rows += [size] * whole
            left -= whole * size
            if whole < groups and left:
                rows.append(left)
                left = 0
            widths += [b] * (len(rows) - len(widths))
        if left:
            raise FormatError(f"option {self.desc} covers {in_features - left} of {in_features} rows")
        return GroupLayout(tuple(widths), tuple(rows))

    def bits_of(self, linear: Sized) -> int:
        """Bits of a linear with this option, overheads included; remembered: a model has few sizes and many linears."""
        return _total_bits(self, linear.in_features, linear.padded_out, linear.has_bias)

    @cached_property
    def desc(self) -> str:
        """Text key of the option, e.g. ``0.05:3b_64g/0.95:2b_64g s4``."""
        parts = "/".join(
            f"{p:g}:{b}b_{g}g" for p, b, g in zip(self.props, self.bits, self.group_sizes, strict=True)
        )
        return f"{parts} s{self.scale_bits}"

    def to_json(self) -> dict[str, Any]:
        return {
            "group_size": {str(b): g for b, g in zip(self.bits, self.group_sizes, strict=True)},
            "bits": list(self.bits),
            "bits_prop": [int(p) if p == 1 else p for p in self.props],
            "scale_bits": self.scale_bits,
        }

    @staticmethod
    def from_json(obj: Mapping[str, Any]) -> QParams:
        """Inverse of ``to_json``; raises FormatError naming the offending field."""
        if not isinstance(obj, Mapping):
            raise FormatError(f"quantisation parameters are a {type(obj).__name__}, not an object")
        try:
            bits = tuple(int(b) for b in obj["bits"])
            sizes = {int(k): int(v) for k, v in obj["group_size"].items()}
            props = tuple(float(p) for p in obj["bits_prop"])
            params = QParams(bits, props, tuple(sizes[b] for b in bits), int(obj["scale_bits"]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise FormatError(f"quantisation parameters {str(obj)[:200]}: {why_not_read(e)}") from e
        if not bits or any(b not in WIDTHS for b in bits) or list(bits) != sorted(set(bits), reverse=True):
            raise FormatError(f"bits: widths {str(bits)[:80]} are not strictly falling members of {WIDTHS}")
        if len(props) != len(bits) or any(not p > 0 for p in props) or not abs(sum(props) - 1.0) <= 1e-9:
            raise FormatError(f"bits_prop: shares {str(props)[:80]} are not {len(bits)} positive numbers that sum to 1")
        if any(not 0 < s <= MAX_GROUP or s % 32 for s in params.group_sizes):
            raise FormatError(f"group_size: {str(params.group_sizes)[:80]} are not multiples of 32 up to {MAX_GROUP}")
        if params.scale_bits != 4:
            raise FormatError(f"scale_bits is {params.scale_bits}; the format has 4")
        return params


@lru_cache(maxsize=4096)  # a model has few sizes, and many linears with the same options
def _layout(params: QParams, in_features: int) -> GroupLayout:
    return params._laid_out(in_features)


@cache
def _total_bits(params: QParams, in_features: int, out_features: int, has_bias: bool) -> int:
    return params.layout(in_features).total_bits(out_features, has_bias)


class StoredSize:
    """What follows from the size of a linear; ``out_features`` is as in the model, before padding."""

    in_features: int
    out_features: int

    @property
    def padded_out(self) -> int:
        """Stored columns (N32)."""
        return pad32(self.out_features)

    @property
    def padded_weights(self) -> int:
        """Weights as they are stored, which bitrates count."""
        return self.in_features * self.padded_out


@dataclass(frozen=True)
class LinearShape(StoredSize):
    """Size of one linear layer of a model."""

    in_features: int
    out_features: int
    has_bias: bool = False


def pad32(n: int) -> int:
    """``n`` rounded up to a multiple of 32 (width of all quantised tensors)."""
    return (n + 31) // 32 * 32
