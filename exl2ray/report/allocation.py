"""What was chosen: bits per weight over layer and projection."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from exl2ray.beneath import reopenable
from exl2ray.errors import Exl2RayError, FormatError
from exl2ray.formats.layout import LinearShape
from exl2ray.formats.tensorfile import TensorFile
from exl2ray.report.chains import Chain
from exl2ray.report.values import layer_of, nominal_bpw, parse_option, role_of
from exl2ray.store.fs import Store
from exl2ray.store.records import FileRef

ROLES = ("q", "k", "v", "o", "gate", "up", "down")  # order of rows; others follow


@dataclass(frozen=True)
class Allocation:
    """``bpw``: (layer, role) -> bits per weight; experts of a layer share a cell. exact: as stored, all overhead
    included; else without what depends on the shapes."""

    layers: tuple[int, ...]
    roles: tuple[str, ...]
    bpw: Mapping[tuple[int, str], float]
    exact: bool


def allocation_of(options: Mapping[str, str], shapes: Mapping[str, LinearShape]) -> Allocation:
    """One bitrate from the description of every linear's option. Linears outside of layers (the head) do not count."""
    found = ((linear, layer_of(linear), parse_option(text)) for linear, text in options.items())
    parsed = [(linear, layer, option) for linear, layer, option in found if layer is not None and option is not None]
    exact = bool(parsed) and all(linear in shapes for linear, _, _ in parsed)
    sums: dict[tuple[int, str], list[float]] = {}
    for linear, layer, option in parsed:
        cell = sums.setdefault((layer, role_of(linear)), [0.0, 0.0])
        total, weights = nominal_bpw(option), 1
        if exact:
            s = shapes[linear]
            try:
                total, weights = option.bits_of(s), s.padded_weights
            except FormatError:
                continue  # an option that does not fit the tensor: the directory is not ours, or damaged
        cell[0] += total
        cell[1] += weights
    bpw = {cell: total / weights for cell, (total, weights) in sums.items() if weights}
    roles = sorted({role for _, role in bpw}, key=lambda r: (ROLES.index(r) if r in ROLES else len(ROLES), r))
    return Allocation(tuple(sorted({layer for layer, _ in bpw})), tuple(roles), bpw, exact)


def linear_shapes(store: Store, chains: Iterable[Chain], problems: list[str]) -> dict[str, LinearShape]:
    """Shapes of the quantised linears (columns as stored), from the headers of their tensor files.

    Local directories only: on an object store each header is a request.
    """
    out: dict[str, LinearShape] = {}
    if not store.is_local:
        return out
    for module in (m for chain in chains for m in chain.modules):
        if all(linear in out for linear in module.options):
            continue
        for file in module.files:
            try:
                out.update(_piece_shapes(file) if file.pieces else _stored_shapes(store, file.rel))
            except Exl2RayError as e:
                problems.append(e.message)
    return out


def _stored_shapes(store: Store, rel: str) -> dict[str, LinearShape]:
    handle, name = store.descriptor(rel), store.full_name(rel)
    if handle is None:
        return {}
    path = reopenable(handle, Path(name))
    try:
        return _linears({n: t.shape for n, t in TensorFile(path, FormatError).tensors.items()})
    except FormatError as e:
        raise FormatError(e.message.replace(path, name), e.hint) from e
    finally:
        os.close(handle)


def _piece_shapes(file: FileRef) -> dict[str, LinearShape]:
    return _linears({p.name: p.shape for p in file.pieces})


def _linears(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, LinearShape]:
    out = {}
    for name, shape in shapes.items():
        key, _, suffix = name.rpartition(".")
        order = shapes.get(f"{key}.q_invperm", ())
        if suffix == "q_weight" and len(shape) == 2 and len(order) == 1:
            out[key] = LinearShape(order[0], shape[1], f"{key}.bias" in shapes)
    return out
