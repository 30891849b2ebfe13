"""A look at the values of the weights: a seeded sample of every tensor, in seconds also for hundreds of gigabytes.

A conversion checks every value when it reads a tensor; the sample finds a broken checkpoint before hours of work, if what is
broken is more than a few values.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from exl2ray.errors import SourceError, unreadable
from exl2ray.formats.elsewhere import THREADS, Pieces, remote_file
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.tensorfile import DTYPES, TensorInfo
from exl2ray.model.spec import ModelSpec
from exl2ray.model.weights import FLOAT_DTYPES, check_weights

PIECE_BYTES = 4096
MOST_PIECES = 16  # of a tensor
COMPUTED_ROWS = 2  # looked at, of a tensor that is stored in FP8 or MXFP4
READS = 16384  # of all tensors, on a model with very many
_THREADS = 8
REMOTE = 8  # tensors of a remote file that a thread looks at


def stored_names(spec: ModelSpec) -> list[str]:
    """Tensors of the source that a conversion reads and checks, each once."""
    linears = [s for x in spec.linears for s in (x.weight, x.bias) if s is not None]
    plain = [p.stored for m in spec.modules for p in m.plain]
    return list(dict.fromkeys(s.name for s in linears + plain))


def scan_values(source: SourceModel, names: Sequence[str], seed: int = 0) -> list[SourceError]:
    """What `exl2ray.model.weights.check_weights` says of samples: NaN, infinity, values beyond float16, other dtypes.

    ``names`` that the source lacks are left out. Tensors up to MOST_PIECES pieces of PIECE_BYTES are read whole. The same
    seed looks at the same places.
    """
    infos = [source.info(name) for name in names if name in source and not source.is_computed(name)]
    pieces = max(1, min(MOST_PIECES, READS // max(1, len(infos))))
    threads = THREADS if infos and remote_file(infos[0].file) is not None else _THREADS
    with ThreadPoolExecutor(threads) as pool:  # waiting for the disk or the network is what takes time
        found = pool.map(lambda part: _scan(part, pieces, seed), _by_file(infos))
        scaled = [n for n in names if n in source and source.is_computed(n)]
        computed = pool.map(lambda name: _rows(source, name, seed), scaled)
    return [e for errors in (*found, *computed) for e in errors]


def _rows(source: SourceModel, name: str, seed: int) -> list[SourceError]:
    """A tensor that is computed from codes and scales: some of its rows."""
    rows = source.shape(name)[0]
    picked = sorted(random.Random(f"{seed}/{name}").sample(range(rows), min(rows, COMPUTED_ROWS)))
    try:
        for row in picked:
            check_weights(source.load(name, slice(row, row + 1)), f"{source.where(name)}, row {row}")
    except SourceError as e:
        return [e]
    return []


def _by_file(infos: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    out: dict[Any, list[TensorInfo]] = {}
    for info in infos:
        out.setdefault(info.file, []).append(info)
    groups = [sorted(part, key=lambda i: i.begin) for part in out.values()]
    return [g[i : i + n] for g in groups for n in [REMOTE if remote_file(g[0].file) else len(g)] for i in range(0, len(g), n)]


def _scan(infos: Sequence[TensorInfo], pieces: int, seed: int) -> list[SourceError]:
    """Tensors of one file."""
    errors = []
    try:
        handle = Pieces(infos[0].file)
    except OSError as e:
        return [unreadable(SourceError, infos[0].file, e)]
    with handle:
        for info in infos:
            try:
                _check(info, handle, pieces, seed)
            except SourceError as e:
                errors.append(e)
    return errors


def _check(info: TensorInfo, handle: Pieces, pieces: int, seed: int) -> None:
    where = f"{info.file}: tensor {info.name}"
    dtype = DTYPES[info.dtype]
    if dtype not in FLOAT_DTYPES:
        raise SourceError(
            f"{where} has dtype {info.dtype}; floating-point numbers are needed",
            "the model is quantised already? Start from the original weights",
        )
    starts, size = _places(info, dtype.itemsize, pieces, seed)
    raw = bytearray()
    for start in starts:
        try:
            piece = handle.read(size, info.begin + start)
        except OSError as e:
            raise unreadable(SourceError, where, e) from e
        if len(piece) != size:
            raise SourceError(f"{where}: the file ends early; it was longer when opened")
        raw += piece
    if len(raw) < info.nbytes:
        where += f" ({len(raw) // dtype.itemsize} of its {info.nbytes // dtype.itemsize} values looked at)"
    check_weights(torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype), where)


def _places(info: TensorInfo, item_bytes: int, pieces: int, seed: int) -> tuple[list[int], int]:
    """(byte offsets in the tensor, bytes of each piece): one piece at random in each of equal parts of the tensor."""
    if info.nbytes <= pieces * PIECE_BYTES:
        return [0], info.nbytes
    rng = random.Random(f"{seed}/{info.name}")
    part = info.nbytes // pieces
    starts = [i * part + rng.randrange(part - PIECE_BYTES + 1) // item_bytes * item_bytes for i in range(pieces)]
    return [s // item_bytes * item_bytes for s in starts], PIECE_BYTES
