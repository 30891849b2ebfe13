"""Measured options of the modules: error over storage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from exl2ray.errors import Exl2RayError, FormatError
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.measurement import (
    MAX_MEASUREMENT_BYTES,
    ModuleProfile,
    parse_measurement,
    read_measurement,
)
from exl2ray.report.chains import created, read_records
from exl2ray.report.values import layer_of, mapping, module_order, role_of, texts, token_counts
from exl2ray.store.file_names import MEASURE, MEASUREMENT
from exl2ray.store.fs import Store

PARTS = {"self_attn": "attention", "mlp": "MLP", "block_sparse_moe": "experts", "parallel_decoder": "parallel block"}
ATTENTION_ROLES = ("q", "k", "v", "o")


@dataclass(frozen=True)
class Curve:
    """Error over storage of one measured module, or of one half of a parallel one. errors: 1 - accuracy, 0 .. 1.

    weights: of the module, padded columns included; None where the shapes are not known.
    """

    key: str  # as in measurement.json: "model.layers.0.self_attn"
    part: str  # "attention", "MLP", "experts"
    layer: int | None
    total_bits: tuple[int, ...]
    errors: tuple[float, ...]
    weights: int | None = None


def part_of(key: str) -> str:
    """Which kind of module a key names, in words: "attention", "MLP", "experts", "parallel block"."""
    mode = key.rpartition(".")[2]
    return PARTS.get(mode, mode)


def read_profiles(store: Store, given: str | None, problems: list[str]) -> tuple[ModuleProfile, ...]:
    """All measured modules: from measurement.json; else from the file ``given`` with -m; else from the records there are."""
    try:
        if store.exists(MEASUREMENT):
            if store.size(MEASUREMENT) > MAX_MEASUREMENT_BYTES:
                raise FormatError(f"{store.full_name(MEASUREMENT)}: larger than {MAX_MEASUREMENT_BYTES} bytes")
            return parse_measurement(store.get(MEASUREMENT), store.full_name(MEASUREMENT)).profiles
        if given is not None and Path(given).is_file():
            return read_measurement(given).profiles
    except (Exl2RayError, OSError, ValueError) as e:  # a name with odd characters, besides what the file holds
        problems.append(e.message if isinstance(e, Exl2RayError) else f"measurement: {e}")
    return tuple(_recorded_profiles(store, problems))


def _recorded_profiles(store: Store, problems: list[str]) -> list[ModuleProfile]:
    best: dict[str, tuple[float, ModuleProfile]] = {}
    for record in read_records(store, MEASURE, problems):
        if "profile" not in record.payload:
            continue  # rows of tokens, checkpoints
        stored, where = mapping(record.payload["profile"]), f"record of {record.key}"
        try:
            profile = ModuleProfile.from_json(record.key, stored.get("value"), mapping(stored.get("extra")), where)
        except FormatError as e:
            problems.append(e.message)
            continue
        if record.key not in best or created(record) > best[record.key][0]:
            best[record.key] = (created(record), profile)
    return [best[key][1] for key in sorted(best, key=module_order)]


def curves_of(profiles: Iterable[ModuleProfile]) -> list[Curve]:
    """One curve per slot, in the order in which an allocation counts them."""
    out = []
    for p in profiles:
        halves = [("attention", p.attn), ("MLP", p.mlp)] if p.options is None else [(part_of(p.entry_key), p.options)]
        for part, options in halves:
            if options is not None:
                bits, errors = tuple(o.total_bits for o in options), tuple(1 - o.accuracy for o in options)
                out.append(Curve(p.entry_key, part, layer_of(p.entry_key), bits, errors))
    return out


def with_weights(
    curves: Iterable[Curve], linears: Mapping[str, Iterable[str]], shapes: Mapping[str, LinearShape]
) -> list[Curve]:
    """The curves with ``weights``, where all shapes are known. ``linears``: module -> its linears."""
    out = []
    for c in curves:
        names = list(linears.get(c.key, ()))
        if c.key.endswith(".parallel_decoder"):
            names = [x for x in names if (role_of(x) in ATTENTION_ROLES) == (c.part == "attention")]
        known = [shapes[x] for x in names if x in shapes]
        weights = sum(s.padded_weights for s in known) if names and len(known) == len(names) else None
        out.append(replace(c, weights=weights))
    return out


def measured_experts(profiles: Iterable[ModuleProfile]) -> dict[int, tuple[int, ...]]:
    """Layer -> calibration tokens per expert in the measurement pass."""
    found = ((layer_of(p.entry_key), token_counts(p.extra.get("experts"))) for p in profiles)
    return {layer: counts for layer, counts in found if counts and layer is not None}


def measured_notes(profiles: Iterable[ModuleProfile]) -> list[tuple[str, str]]:
    """(module, note) of what happened while measuring, without the coverage in words."""
    out = []
    for p in profiles:
        notes = texts(p.extra.get("notes"))
        out += [(p.entry_key, note) for note in (notes[1:] if p.extra.get("experts") else notes)]
    return out
