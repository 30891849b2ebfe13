"""CUDA kernels that multiply by packed weights, and one that unpacks them.

A weight of b bits takes one of 32 fixed places in the b words of its unit of 32 rows. Its bits go to the top of the mantissa
of 1.0, which makes 1 + q / 2^b: one shift and one logical instruction; 1.5 less is (q - 2^(b-1)) / 2^b, and the factor 2^b
joins the scale. Each width has a branch in which b is a constant: the compiler unrolls all loops over rows, columns and words
in it, works out places and masks, and keeps the arrays of a thread in registers. What became of that is read off without a
GPU by `scripts/gpu_code.py`: 3.4 instructions a weight; straight-line source had 7.3 and took Numba ten times as long.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

UNIT = 32  # rows
LANES = 32
MAX_ROWS = 16  # rows of activations that the fused kernel takes at once
SHARED_FLOATS = 12288  # 48 KiB, which every GPU gives a block without being asked
ONE = 0x3F800000  # bits of 1.0; an argument of the kernels, as the compiler puts constants into registers again and again
u32, u64 = np.uint32, np.uint64  # unsigned: Numba has negative indices count from the end

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":

    def _as_float(bits):
        return np.int32(bits).view(np.float32)

    def _as_bits(value):
        return np.float32(value).view(np.uint32)

else:
    from numba.cuda import libdevice

    _as_float = libdevice.int_as_float

    @cuda.jit(device=True)
    def _as_bits(value):
        return u32(libdevice.float_as_int(value))


@dataclass(frozen=True)
class Variant:
    """How a kernel is cut. rows: of activations at a time, 1 or 4; a kernel for 4 goes through up to 16. columns: per thread,
    2 or 4. ``brain``: activations and results are bfloat16, handed over as their bits in int16; otherwise float16.

    Loading the words of a warp's next unit while it multiplies by one was tried: it takes registers, so that fewer warps are
    at work, and on an H200 4096 x 4096 took 11.7 us and more in place of 10.2.
    """

    rows: int
    columns: int = 2
    warps: int = 8
    brain: bool = False

    @property
    def block_columns(self) -> int:
        return LANES * self.columns

    @property
    def threads(self) -> int:
        return LANES * self.warps

    @property
    def sums(self) -> int:
        """Floats of shared memory for the sums of a block's threads."""
        return (MAX_ROWS if self.rows > 1 else 1) * self.columns * self.threads

    @property
    def places(self) -> int:
        """Units of one row of activations that shared memory has room for."""
        return min((SHARED_FLOATS - self.sums - LANES) // UNIT, 64 * self.rows)

    def units(self, rows: int) -> int:
        """Units of K for which a block has room, with so many rows of activations."""
        return self.places // (-(-rows // self.rows) * self.rows)


@cuda.jit(device=True)
def _weight(b, words, j, i, one):
    """1 + q / 2^b of row i of a unit, column j of a thread."""
    word = i * b // 32
    place = i * b % 32
    shift = place - (23 - b)
    mask = ((1 << b) - 1) << (23 - b)
    if place + b > 32:
        bits = u32(words[j, word] >> u32(shift)) | u32(words[j, word + 1] << u32(32 - shift))
    elif shift < 0:
        bits = u32(words[j, word] << u32(-shift))
    else:
        bits = u32(words[j, word] >> u32(shift))
    return _as_float(np.int32(u32(bits & u32(mask)) | one))


@cuda.jit(device=True)
def _brain_bits(value):
    """The bits of the bfloat16 nearest to a float32, ties to even."""
    bits = _as_bits(value)
    if value != value:
        return u32(0x7FC0)
    return (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)


@cuda.jit(device=True)
def _load(brain, x, r, f):
    """An activation as float32."""
    if brain:
        return _as_float(np.int32(u32(u32(np.int32(x[r, f]) & 0xFFFF) << u32(16))))
    return np.float32(x[r, f])


@cuda.jit(device=True)
def _store(brain, y, r, c, value):
    if brain:
        y[r, c] = np.int16(_brain_bits(value))
    else:
        y[r, c] = np.float16(value)


@cuda.jit(device=True)
def _scale(bits, scales, tops, group, column):
    """What 1 + q / 2^b - 1.5 is multiplied by."""
    code = np.float32(((u32(scales[group, column // u64(8)]) >> u32(4 * u32(column % u64(8)))) & u32(15)) + u32(1))
    return np.float32(np.float16(code * code * tops[group])) * np.float32(1 << bits)


@cuda.jit(device=True)
def _split(columns, loaded, words):
    for h in range(columns // 2):
        for n in range(8):
            words[2 * h, n] = u32(loaded[n, h] & 0xFFFFFFFF)
            words[2 * h + 1, n] = u32((loaded[n, h] >> 32) & 0xFFFFFFFF)


@cuda.jit(device=True)
def _one_row(b, columns, words, shared, k, one, sums):
    """Adds sum x (q - 2^(b-1)) / 2^b of a unit; 1.5 is taken off once for all: sum x (1 + q / 2^b) - 1.5 sum x."""
    less = np.float32(0.0)
    for i in range(UNIT):
        less += shared[k, i]
    less *= np.float32(1.5)
    for j in range(columns):
        total = np.float32(0.0)
        for i in range(UNIT):
            total += shared[k, i] * _weight(b, words, j, i, one)
        sums[j] += total - less


@cuda.jit(device=True)
def _weights_of_width(b, columns, words, weights, one):
    for j in range(columns):
        for i in range(UNIT):
            weights[j, i] = _weight(b, words, j, i, one) - np.float32(1.5)


@cuda.jit(device=True)
def _weights(bits, columns, words, weights, one):
    """(q - 2^(b-1)) / 2^b of a unit, which serve several rows of activations."""
    if bits == 4:
        _weights_of_width(4, columns, words, weights, one)
    elif bits == 3:
        _weights_of_width(3, columns, words, weights, one)
    elif bits == 5:
        _weights_of_width(5, columns, words, weights, one)
    elif bits == 2:
        _weights_of_width(2, columns, words, weights, one)
    elif bits == 6:
        _weights_of_width(6, columns, words, weights, one)
    else:
        _weights_of_width(8, columns, words, weights, one)


@cuda.jit(device=True)
def _load_words(columns, q, table, u, half, pairs, loaded):
    """Two columns are 64 bits. Of any width, so that loads can be under way before it is known what is done with them."""
    bits = table[u, 0]
    for h in range(columns // 2):
        at = u32(table[u, 1] * half + pairs[h])
        for n in range(8):
            if n < bits:
                loaded[n, h] = q[u32(at + half * u32(n))]


@cuda.jit(device=True)
def _place_pairs(columns, pairs, half):
    """A thread has columns 2 * lane and 2 * lane + 1 of every 64 of its block, so that what a warp loads at once lies
    together; where there are no more, the last ones again."""
    for h in range(columns // 2):
        pairs[h] = u32(min((cuda.blockIdx.x * (columns // 2) + h) * LANES + cuda.threadIdx.x % LANES, np.int64(half) - 1))


@cuda.jit(device=True)
def _own_units(units, slice_units, warps):
    """The block's first unit and the one after its last; the same of this warp."""
    first = cuda.blockIdx.y * slice_units
    end = min(first + slice_units, units)
    share = (end - first + warps - 1) // warps
    begin = first + cuda.threadIdx.x // LANES * share
    return first, end, begin, min(begin + share, end)


@cuda.jit(device=True)
def _results(brain, columns, warps, sums, y, partial, counters, arrived, bias, biased, width, rows):
    """From the sums of the threads, (row * columns + column of a thread) * threads + thread, to y (rows, width).

    The last block of its columns to finish sums the slices in their order, so results do not depend on which one that is.
    """
    t, block, threads = cuda.threadIdx.x, LANES * columns, LANES * warps
    slices = cuda.gridDim.y
    for n in range(t, rows * block, threads):
        r = u64(n // block)
        own = n % block
        column = u64(cuda.blockIdx.x * block + own)
        at = (r * u64(columns) + u64(own // 64 * 2 + own % 2)) * u64(threads) + u64(own % 64 // 2)
        total = np.float32(0.0)
        for warp in range(warps):
            total += sums[at + u64(warp * LANES)]
        if column < width:
            if slices > 1:
                partial[(u64(cuda.blockIdx.y) * u64(rows) + r) * width + column] = total
            else:
                if biased:
                    total += np.float32(bias[column])
                _store(brain, y, r, column, total)
    if slices == 1:
        return
    cuda.threadfence()
    cuda.syncthreads()
    if t == 0:
        arrived[0] = cuda.atomic.add(counters, cuda.blockIdx.x, 1)
    cuda.syncthreads()
    if arrived[0] < slices - 1:
        return
    cuda.threadfence()
    step = u64(rows) * width
    for n in range(t, rows * block, threads):
        r = u64(n // block)
        column = u64(cuda.blockIdx.x * block + n % block)
        if column < width:
            at = r * width + column
            total = np.float32(0.0)
            for _ in range(slices):
                total += partial[at]
                at += step
            if biased:
                total += np.float32(bias[column])
            _store(brain, y, r, column, total)
    if t == 0:
        counters[cuda.blockIdx.x] = 0


@cache
def product_kernel(variant: Variant) -> Any:
    """y (rows, N) = x (rows, K) times the weights. Launch: (N / block_columns, slices of K) blocks of 32 * warps threads.

    Arguments: those of `run.Packed`, whether there is a bias, N, units of K and of a slice, a workspace for the slices' sums,
    counters, one per block of columns, zero before and after, the result, its rows, and ``ONE``.
    """
    return cuda.jit(cache=True)(_for_one_row(variant) if variant.rows == 1 else _for_several_rows(variant))


def _for_one_row(variant: Variant) -> Any:
    brain, columns, warps, threads = variant.brain, variant.columns, variant.warps, variant.threads
    pairs_each, places, size = columns // 2, variant.places, variant.sums

    def one_row(
        x, q, scales, tops, perm, table, bias, biased, width, units, slice_units, partial, counters, y, rows, exponent
    ):
        shared = cuda.shared.array((places, UNIT), np.float32)
        sums = cuda.shared.array(size, np.float32)
        arrived = cuda.shared.array(1, np.int32)
        pairs = cuda.local.array(pairs_each, np.uint32)
        loaded = cuda.local.array((8, pairs_each), np.int64)
        words = cuda.local.array((columns, 8), np.uint32)
        group_sums = cuda.local.array(columns, np.float32)
        scaled = cuda.local.array(columns, np.float32)
        t, half, one = cuda.threadIdx.x, u32(width // 2), u32(exponent)
        first, end, begin, last = _own_units(units, slice_units, warps)
        _place_pairs(columns, pairs, half)
        for n in range(t, (end - first) * UNIT, threads):
            shared[u64(n // UNIT), u64(n % UNIT)] = _load(brain, x, 0, u64(perm[u64(first * UNIT + n)]))
        for j in range(columns):
            group_sums[j] = scaled[j] = np.float32(0.0)
        cuda.syncthreads()
        for u in range(begin, last):
            bits, group = table[u64(u), 0], table[u64(u), 2]
            _load_words(columns, q, table, u64(u), half, pairs, loaded)
            _split(columns, loaded, words)
            k = u64(u - first)
            if bits == 4:
                _one_row(4, columns, words, shared, k, one, group_sums)
            elif bits == 3:
                _one_row(3, columns, words, shared, k, one, group_sums)
            elif bits == 5:
                _one_row(5, columns, words, shared, k, one, group_sums)
            elif bits == 2:
                _one_row(2, columns, words, shared, k, one, group_sums)
            elif bits == 6:
                _one_row(6, columns, words, shared, k, one, group_sums)
            else:
                _one_row(8, columns, words, shared, k, one, group_sums)
            if u + 1 == last or table[u64(u + 1), 2] != group:
                for j in range(columns):
                    column = u64(pairs[j // 2]) * u64(2) + u64(j % 2)
                    scaled[j] += group_sums[j] * _scale(bits, scales, tops, u64(group), column)
                    group_sums[j] = np.float32(0.0)
        for j in range(columns):
            sums[u64(j * threads + t)] = scaled[j]
        cuda.syncthreads()
        _results(brain, columns, warps, sums, y, partial, counters, arrived, bias, biased, u64(width), 1)

    return one_row


def _for_several_rows(variant: Variant) -> Any:
    brain, columns, warps, threads = variant.brain, variant.columns, variant.warps, variant.threads
    pairs_each, places, size = columns // 2, variant.places, variant.sums

    def four_rows(
        x, q, scales, tops, perm, table, bias, biased, width, units, slice_units, partial, counters, y, rows, exponent
    ):
        shared = cuda.shared.array((places, UNIT), np.float32)
        sums = cuda.shared.array(size, np.float32)
        arrived = cuda.shared.array(1, np.int32)
        pairs = cuda.local.array(pairs_each, np.uint32)
        loaded = cuda.local.array((8, pairs_each), np.int64)
        words = cuda.local.array((columns, 8), np.uint32)
        weights = cuda.local.array((columns, UNIT), np.float32)
        scale = cuda.local.array(columns, np.float32)
        t, half, one = cuda.threadIdx.x, u32(width // 2), u32(exponent)
        first, end, begin, last = _own_units(units, slice_units, warps)
        fours = (rows + 3) // 4
        _place_pairs(columns, pairs, half)
        for n in range(t, (end - first) * UNIT, threads):
            f = u64(perm[u64(first * UNIT + n)])
            for r in range(4 * fours):
                value = np.float32(0.0)
                if r < rows:
                    value = _load(brain, x, u64(r), f)
                shared[u64(r * slice_units + n // UNIT), u64(n % UNIT)] = value
        for n in range(t, 4 * fours * columns * threads, threads):
            sums[u64(n)] = np.float32(0.0)
        cuda.syncthreads()
        for u in range(begin, last):
            bits, group = table[u64(u), 0], u64(table[u64(u), 2])
            _load_words(columns, q, table, u64(u), half, pairs, loaded)
            _split(columns, loaded, words)
            for j in range(columns):
                scale[j] = _scale(bits, scales, tops, group, u64(pairs[j // 2]) * u64(2) + u64(j % 2))
            _weights(bits, columns, words, weights, one)
            for four in range(fours):
                for r in range(4):
                    k = u64((4 * four + r) * slice_units + u - first)
                    for j in range(columns):
                        total = np.float32(0.0)
                        for i in range(UNIT):
                            total += shared[k, i] * weights[j, i]
                        sums[u64(((4 * four + r) * columns + j) * threads + t)] += scale[j] * total
        cuda.syncthreads()
        _results(brain, columns, warps, sums, y, partial, counters, arrived, bias, biased, u64(width), rows)

    return four_rows


@cache
def unpack_kernel(brain: bool) -> Any:
    """out (K, N), rows in the order of the input. Launch: (N / 2 / threads, K / 32) blocks; a thread has two columns."""

    def unpack(q, scales, tops, perm, table, width, out, exponent):
        pair = u32(cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x)
        half = u32(width // 2)
        pairs = cuda.local.array(1, np.uint32)
        loaded = cuda.local.array((8, 1), np.int64)
        words = cuda.local.array((2, 8), np.uint32)
        weights = cuda.local.array((2, UNIT), np.float32)
        scale = cuda.local.array(2, np.float32)
        one = u32(exponent)
        if pair < half:
            u = u64(cuda.blockIdx.y)
            pairs[0] = pair
            bits, group = table[u, 0], u64(table[u, 2])
            _load_words(2, q, table, u, half, pairs, loaded)
            _split(2, loaded, words)
            _weights(bits, 2, words, weights, one)
            column = u64(pair) * u64(2)
            for j in range(2):
                scale[j] = _scale(bits, scales, tops, group, column + u64(j))
            for i in range(UNIT):
                f = u64(perm[u * u64(UNIT) + u64(i)])
                for j in range(2):  # one after the other: they meet in the cache on their way to the memory
                    _store(brain, out, f, column + u64(j), np.float32(np.float16(weights[j, i] * scale[j])))

    return cuda.jit(cache=True)(unpack)
