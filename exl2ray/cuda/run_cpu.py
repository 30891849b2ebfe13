"""Products with packed weights on the CPU, compiled by Numba; called by `run.Packed`, whose
docstring has the shapes of the tensors.

A tile of 32 rows by COLUMNS columns is decoded into the cache of a core, then used up: multiplied, or written out.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

COLUMNS = 64


@numba.njit(cache=True, inline="always")
def _decode(q, bits, word, first, width, tile):
    """tile (32, COLUMNS) float32 = the integers less their middle of one unit, columns first .. first + width."""
    mask = np.uint32((1 << bits) - 1)
    zero = np.float32(1 << (bits - 1))
    for i in range(32):
        w = word + (i * bits) // 32
        place = (i * bits) % 32
        for j in range(width):
            v = np.uint32(q[w, first + j]) >> np.uint32(place)
            if place + bits > 32:
                v |= np.uint32(q[w + 1, first + j]) << np.uint32(32 - place)
            tile[i, j] = np.float32(v & mask) - zero


@numba.njit(cache=True, parallel=True)
def _product(x, q, steps, table, y):
    """y (rows, N) = x (rows, K), its columns in stored order, times the weights; steps (G, N), all float32."""
    count, columns = x.shape[0], q.shape[1]
    for block in numba.prange((columns + COLUMNS - 1) // COLUMNS):
        first = block * COLUMNS
        width = min(COLUMNS, columns - first)
        tile = np.empty((32, COLUMNS), np.float32)
        total = np.zeros((count, COLUMNS), np.float32)
        part = np.empty(COLUMNS, np.float32)
        for u in range(table.shape[0]):
            _decode(q, table[u, 0], table[u, 1], first, width, tile)
            for r in range(count):
                part[:] = np.float32(0.0)
                for i in range(32):
                    v = x[r, 32 * u + i]
                    for j in range(width):
                        part[j] += v * tile[i, j]
                for j in range(width):
                    total[r, j] += part[j] * steps[table[u, 2], first + j]
        for r in range(count):
            for j in range(width):
                y[r, first + j] = total[r, j]


@numba.njit(cache=True, parallel=True)
def _unpack(q, steps, perm, table, out):
    """out (K, N) float32, rows in the order of the input; not yet rounded to halves."""
    columns = q.shape[1]
    for u in numba.prange(table.shape[0]):
        tile = np.empty((32, COLUMNS), np.float32)
        for first in range(0, columns, COLUMNS):
            width = min(COLUMNS, columns - first)
            _decode(q, table[u, 0], table[u, 1], first, width, tile)
            for i in range(32):
                for j in range(width):
                    out[perm[32 * u + i], first + j] = tile[i, j] * steps[table[u, 2], first + j]


def _steps(q_scale: Tensor, tops: Tensor) -> Any:
    """Step size of each group and column, (G, N) float32 holding halves."""
    nibbles = (q_scale.unsqueeze(-1) >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    codes = (nibbles.reshape(q_scale.shape[0], -1) + 1).float()
    return (codes * codes * tops.unsqueeze(-1)).half().float().numpy()


def product(
    x: Tensor, q_weight: Tensor, q_scale: Tensor, tops: Tensor, perm: Tensor, table: Tensor, bias: Tensor | None
) -> Tensor:
    """x (rows, K) -> (rows, N) of its dtype; sums in float32."""
    stored = x.float().index_select(1, perm).numpy()
    y = np.empty((x.shape[0], q_weight.shape[1]), np.float32)
    _product(stored, q_weight.numpy().view(np.uint32), _steps(q_scale, tops), table.numpy(), y)
    out = torch.from_numpy(y)
    return (out if bias is None else out + bias.float()).to(x.dtype)


def unpack(out: Tensor, q_weight: Tensor, q_scale: Tensor, tops: Tensor, perm: Tensor, table: Tensor) -> None:
    """The weights into ``out`` (K, N), rounded as the loader does it."""
    exact = out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
    _unpack(q_weight.numpy().view(np.uint32), _steps(q_scale, tops), perm.numpy(), table.numpy(), exact.numpy())
    out.copy_(exact.half())
