"""Tensors that hold nothing: one value throughout, or long runs of one.

Headers do not tell, and a model with two empty layers still speaks. Some pieces of every tensor are looked at; a tensor that
is constant is so in every piece, so none is missed, and what looks constant is then read until a second value turns up (as
far as READ_BYTES go: a model of zeros has no end). Which share of the others is empty is an estimate from the pieces. Of a
fused tensor each part is looked at for itself.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.errors import SourceError
from exl2ray.formats.elsewhere import THREADS, Pieces, remote_file
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.tensorfile import DTYPES, TensorInfo
from exl2ray.model.spec import ModelSpec, Stored
from exl2ray.model.weights import FLOAT_DTYPES
from exl2ray.wording import plural, some

PIECES, PIECE_VALUES = 8, 256  # of a part; fewer on a model with very many
READS = 16384  # of all parts
READ_BYTES = 128 << 20  # of what looks constant, all together; beyond that the pieces are all there is
BLOCK = 64  # values; that many equal ones in a row are no weights, pruned ones neither
MUCH = 0.25  # share of such blocks; padding of vocabularies and expert widths stays below
SHOWN = 5
_CHUNK_BYTES = 16 << 20
_THREADS = 8


@dataclass(frozen=True)
class Part:
    """What a module reads of a tensor. zero: of a norm, the stored value that multiplies with 0; None: no norm."""

    stored: Stored
    zero: float | None = None


@dataclass(frozen=True)
class Flat:
    """value: of all its numbers; None: not constant, but ``share`` of it is empty."""

    part: Part
    value: float | None
    share: float = 1.0


def needed_parts(spec: ModelSpec) -> list[Part]:
    """Every weight that a conversion reads, without biases. That of a norm may be the same for all channels, but not 0."""
    out: dict[Part, None] = {}
    for module in spec.modules:
        for linear in module.linears:
            out[Part(linear.weight)] = None
        for plain in module.plain:
            if not plain.role.endswith(".bias"):
                norm = plain.role.endswith("norm")
                out[Part(plain.stored, -spec.arch.norm_offset(plain.role) if norm else None)] = None
    return list(out)


def flat_parts(source: SourceModel, parts: Sequence[Part], seed: int = 0) -> list[Flat]:
    """Those that are constant, or empty for a good part. Names that the source lacks, and other dtypes, are left out."""
    parts = [p for p in parts if p.stored.name in source and DTYPES[source.dtype(p.stored.name)] in FLOAT_DTYPES]
    pieces = max(1, min(PIECES, READS // max(1, len(parts))))
    by_file: dict[Path, list[Part]] = {}
    computed = [p for p in parts if source.is_computed(p.stored.name)]
    for part in parts:
        if not source.is_computed(part.stored.name):
            by_file.setdefault(source.file(part.stored.name), []).append(part)
    groups, threads = list(by_file.values()), _THREADS
    if any(remote_file(path) is not None for path in by_file):  # the network is waited for
        groups, threads = [[part] for some in groups for part in some], THREADS
    with ThreadPoolExecutor(threads) as pool:
        found = [f for some in pool.map(lambda ps: _scan(source, ps, pieces, seed), groups) for f in some]
        rows = pool.map(lambda p: _judged(p, _some_rows(source, p.stored, pieces)), computed)
        found += [f for f in rows if f is not None]
    order = {part: i for i, part in enumerate(parts)}
    found.sort(key=lambda flat: order[flat.part])
    left = READ_BYTES
    out = []
    for flat in found:
        nbytes = source.nbytes(flat.part.stored.name)
        if flat.value is not None and nbytes <= left:
            left -= nbytes
            if not is_constant(source, flat.part.stored):
                continue
        out.append(flat)
    return out


def _scan(source: SourceModel, parts: Sequence[Part], pieces: int, seed: int) -> list[Flat]:
    """Parts of one file; what cannot be read is left to those who report it."""
    out = []
    try:
        handle = Pieces(source.file(parts[0].stored.name))
    except OSError:
        return []
    with handle:
        for part in parts:
            values = _sample(source.info(part.stored.name), part, handle, pieces, seed)
            flat = None if values is None else _judged(part, values)
            out += [] if flat is None else [flat]
    return out


def _judged(part: Part, values: Tensor) -> Flat | None:
    low, high = (float(v) for v in values.aminmax())
    if low == high:
        if part.zero is not None and low != part.zero:
            return None  # a norm that scales nothing
        return Flat(part, low)
    blocks = values[: len(values) // BLOCK * BLOCK].view(-1, BLOCK)
    if part.zero is not None or len(blocks) < 2 * PIECES:
        return None
    share = float((blocks.amin(1) == blocks.amax(1)).float().mean())
    return Flat(part, None, share) if share >= MUCH else None


def is_constant(source: SourceModel, stored: Stored) -> bool:
    """Whether a part holds one value throughout; reads it in pieces until another turns up. Raises SourceError."""
    info = source.info(stored.name)
    rows = info.shape[0] if info.shape else 1
    step = max(1, _CHUNK_BYTES // max(1, info.nbytes // max(1, rows)))
    first: float | None = None
    for a, b in stored.ranges if stored.ranges and stored.axis == 0 else ((0, rows),):
        for start in range(a, b, step):
            chunk = source.load(stored.name, slice(start, min(start + step, b)))
            if stored.ranges and stored.axis == 1:
                chunk = torch.cat([chunk[:, c:d] for c, d in stored.ranges], dim=1)
            low, high = (float(v) for v in chunk.aminmax())
            first = low if first is None else first
            if not low == high == first:
                return False
    return first is not None


def _some_rows(source: SourceModel, stored: Stored, pieces: int) -> Tensor:
    """Values of evenly spaced rows, of a tensor that is computed from codes and scales."""
    ranges = stored.ranges if stored.ranges and stored.axis == 0 else ((0, source.shape(stored.name)[0]),)
    rows = [row for a, b in ranges for row in range(a, b)]
    picked = sorted({rows[i * len(rows) // pieces] for i in range(pieces)})
    values = torch.cat([source.load(stored.name, slice(row, row + 1)).float() for row in picked])
    if stored.ranges and stored.axis == 1:
        values = torch.cat([values[:, a:b] for a, b in stored.ranges], dim=1)
    return values.flatten()


def _sample(info: TensorInfo, part: Part, handle: Pieces, pieces: int, seed: int) -> Tensor | None:
    """Values from ``pieces`` places, one in each of equal parts; None if the file ends early or there are none."""
    dtype = DTYPES[info.dtype]
    runs = _runs(info, part.stored, dtype.itemsize)
    values = min([PIECE_VALUES, *(n for _, n in runs)]) if runs else 0
    if not values:
        return None
    rng = random.Random(f"{seed}/{info.name}/{part.stored.ranges}")
    ends = list(accumulate(n for _, n in runs))
    raw = bytearray()
    for i in range(pieces):
        at = min(int((i + rng.random()) * ends[-1] / pieces), ends[-1] - 1)
        run = bisect_right(ends, at)
        begin, length = runs[run]
        start = begin + min(at - (ends[run] - length), length - values) * dtype.itemsize
        try:
            piece = handle.read(values * dtype.itemsize, info.begin + start)
        except OSError:
            return None
        if len(piece) != values * dtype.itemsize:
            return None
        raw += piece
    return torch.frombuffer(raw, dtype=dtype).float()


def _runs(info: TensorInfo, stored: Stored, item_bytes: int) -> list[tuple[int, int]]:
    """Where a part lies in its tensor: (byte offset, values) of what is contiguous."""
    total = info.nbytes // item_bytes
    if not stored.ranges or not info.shape:
        return [(0, total)] if total else []
    row = total // info.shape[0] if info.shape[0] else 0
    if stored.axis == 0:
        return [(a * row * item_bytes, (b - a) * row) for a, b in stored.ranges]
    return [((r * row + a) * item_bytes, b - a) for r in range(info.shape[0]) for a, b in stored.ranges]


def flat_warnings(source: SourceModel, spec: ModelSpec, seed: int) -> list[str]:
    """What `flat_parts` finds, in words that name tensors."""
    try:
        found = flat_parts(source, needed_parts(spec), seed)
    except SourceError:
        return []  # the scan of values says so
    constant = [f for f in found if f.value is not None]
    partly = [f for f in found if f.value is None]
    out = []
    if constant:
        names = some([f"{f.part.stored.name} ({f.value:g})" for f in constant], SHOWN)
        out.append(
            f"{plural(len(constant), 'tensor')} of the source with one value throughout: {names}{_layers(constant, spec)}; "
            "the quantised model computes with them too: an incomplete or damaged checkpoint?"
        )
    if partly:
        names = some([f"{f.part.stored.name} ({f.share:.0%})" for f in partly], SHOWN)
        out.append(f"{plural(len(partly), 'tensor')} of the source with one value in long runs (share): {names}")
    return out


def _layers(flats: Sequence[Flat], spec: ModelSpec) -> str:
    """Names the layers without any other weight in their linears."""
    flat = {f.part.stored for f in flats}
    whole: dict[int, bool] = {}
    for module in spec.modules:
        if module.layer is not None:
            empty = all(x.weight in flat for x in module.linears)
            whole[module.layer] = whole.get(module.layer, True) and empty
    empty_layers = [str(n) for n, empty in whole.items() if empty]
    layers = "layer" if len(empty_layers) == 1 else "layers"
    return f"; nothing is left of {layers} {some(empty_layers, SHOWN)}" if empty_layers else ""
