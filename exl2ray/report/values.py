"""Values from files of a work directory, believed only after a look: records and events come from other machines."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from exl2ray.errors import FormatError
from exl2ray.formats.json_file import as_number
from exl2ray.formats.layout import QParams

_LAYER = re.compile(r"(?:^|\.)(\d{1,6})(?:\.|$)")
_ROLES = {"w1": "gate", "w3": "up", "v1": "up", "w2": "down", "c_fc": "up", "fc1": "up", "fc2": "down"}
_OPTION = re.compile(r"(\S+) s(\d+)")
_PART = re.compile(r"([\d.e+-]+):(\d+)b_(\d+)g")


def texts(value: Any) -> tuple[str, ...]:
    """The strings of a list; () for everything else."""
    return tuple(v for v in value if isinstance(v, str)) if isinstance(value, (list, tuple)) else ()


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def token_counts(value: Any) -> tuple[int, ...]:
    """Calibration tokens per expert, of the coverage that a record holds; () if there is none or it is not one."""
    if not isinstance(value, (list, tuple)):
        return ()
    counts = [as_number(mapping(e).get("tokens")) for e in value]
    return tuple(int(c) for c in counts if c is not None and c >= 0) if None not in counts else ()


def layer_of(key: str) -> int | None:
    """Index of the decoder layer in a module's or linear's key; None for the head."""
    found = _LAYER.search(key)
    return int(found[1]) if found else None


def role_of(linear: str) -> str:
    """What a linear is for, whatever its family calls it: "q", "k", "v", "o", "gate", "up", "down", else its own name."""
    name = linear.rsplit(".", 1)[-1]
    if name == "c_proj":
        return "o" if "attn" in linear else "down"
    return _ROLES.get(name, name.removesuffix("_proj"))


def module_order(key: str) -> tuple[float, int, str]:
    """Sort key of modules: by layer, attention first; the head last."""
    layer = layer_of(key)
    return (math.inf if layer is None else layer, 0 if "attn" in key else 1, key)


def parse_option(desc: str) -> QParams | None:
    """Inverse of ``QParams.desc``: "0.05:3b_64g/0.95:2b_64g s4"; None for text that is no description of an option."""
    whole = _OPTION.fullmatch(desc)
    parts = [_PART.fullmatch(p) for p in whole[1].split("/")] if whole else []
    if whole is None or None in parts:
        return None
    found = [p.groups() for p in parts if p is not None]
    try:
        shares, bits, sizes = zip(*found, strict=True)
        groups = dict(zip(bits, sizes, strict=True))
        return QParams.from_json({"bits": bits, "bits_prop": shares, "group_size": groups, "scale_bits": whole[2]})
    except (FormatError, ValueError):
        return None


def nominal_bpw(option: QParams) -> float:
    """Bits per weight of an option for a linear of any shape: its widths, and a scale per group and column.

    Leaves out what depends on the shape (permutation, maxima of scales, an incomplete last group), which is little for
    linears with thousands of columns.
    """
    parts = zip(option.props, option.bits, option.group_sizes, strict=True)
    return sum(share * (bits + option.scale_bits / size) for share, bits, size in parts)
