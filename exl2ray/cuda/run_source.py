"""Source text of the kernels that multiply by packed weights, written out per width, rows and columns.

A weight of b bits takes one of 32 fixed places in the b words of its unit of 32 rows. With every place a constant in
straight-line code a weight costs one shift, one logical instruction, one addition and one multiply-add: its bits go to the
top of the mantissa of 1.0, which makes 1 + q / 2^b, and 1.5 less is (q - 2^(b-1)) / 2^b. The factor 2^b joins the scale.
Loops over local arrays would leave it to the compiler whether the words stay in registers.

The functions are compiled under this file's name, so that Numba's cache on disk takes them; it tells them apart by name
and bytecode.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numba import cuda

WIDTHS = (8, 6, 5, 4, 3, 2)
UNIT = 32  # rows
LANES = 32
SHARED_FLOATS = 12288  # 48 KiB, which every GPU gives a block without being asked

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
        return np.uint32(libdevice.float_as_int(value))


@dataclass(frozen=True)
class Variant:
    """How one kernel is cut: rows of activations, columns per thread (2 or 4), warps per block, units of K per block at most.

    ``chains``: sums that the 32 products of a unit go to in turn; more of them wait less for each other's results.
    ``brain``: activations and results are bfloat16, handed over as their bits in int16; otherwise float16.
    """

    rows: int
    columns: int = 2
    warps: int = 8
    units: int = 64
    brain: bool = False
    chains: int = 1

    @property
    def block_columns(self) -> int:
        return LANES * self.columns

    @property
    def floats(self) -> int:
        """Shared memory: the activations of a block first, the sums of its warps afterwards."""
        return self.rows * max(self.units * UNIT, self.warps * self.block_columns)


def _value(i: int, b: int, name: str) -> str:
    """Expression of (q - 2^(b-1)) / 2^b for weight i of a unit; words are ``name`` + their number.

    A call rather than the operations: Numba takes most of its time per operation, and the compiler inlines it.
    """
    word, place = divmod(i * b, 32)
    shift, mask = place - (23 - b), ((1 << b) - 1) << (23 - b)
    if place + b > 32:
        return f"across({name}{word}, {name}{word + 1}, {shift}, {mask})"
    return f"left({name}{word}, {-shift}, {mask})" if shift < 0 else f"right({name}{word}, {shift}, {mask})"


def _words(b: int, columns: int, at: str) -> Iterator[str]:
    """Loads of one unit's words for a thread: two columns per 64 bits, word j of column c in ``w{b}_{c}_{j}``.

    Here and below names are used once where that can be: Numba takes long over variables with many definitions.
    """
    for j in range(b):
        for h in range(columns // 2):
            yield f"p{b}_{j}_{h} = q[word + {j}, {at} + {h}]"
    for j in range(b):
        for h in range(columns // 2):
            yield f"w{b}_{2 * h}_{j} = np.uint32(p{b}_{j}_{h} & 0xFFFFFFFF)"
            yield f"w{b}_{2 * h + 1}_{j} = np.uint32((p{b}_{j}_{h} >> 32) & 0xFFFFFFFF)"


def _widths(indent: str, body: Any) -> Iterator[str]:
    for n, b in enumerate(WIDTHS):
        yield f"{indent}{'elif' if n else 'if'} bits == {b}:"
        yield from (f"{indent}    {line}" for line in body(b))


def _store(target: str, value: str, brain: bool) -> str:
    return f"{target} = np.int16(brain_bits({value}))" if brain else f"{target} = np.float16({value})"


def product_source(v: Variant) -> str:
    """y (rows, N) = x (rows, K) times the weights. Launch: (N / block_columns, slices of K) blocks of 32 * warps threads.

    Each block sums its slice, warp after warp; the last block of its columns to finish sums the slices in their order, so
    results do not depend on which one that is. ``counters``, one per block of columns, are zero before and after.
    """
    m, c, wide, threads = v.rows, v.columns, v.block_columns, LANES * v.warps
    bits = "np.uint32(np.int32(x[{r}, f]) & 0xFFFF)"
    load = f"as_float(np.int32(np.uint32({bits} << np.uint32(16))))" if v.brain else "np.float32(x[{r}, f])"
    each = [(j, r) for j in range(c) for r in range(m)]

    def unit(b: int) -> Iterator[str]:
        yield from _words(b, c, "pair")
        for i in range(UNIT):
            yield from (f"x{b}_{r}_{i} = shared[k + {i * m + r}]" for r in range(m))
            yield from (f"v{b}_{j}_{i} = {_value(i, b, f'w{b}_{j}_')}" for j in range(c))
        for j, r in each:
            products = [f"x{b}_{r}_{i} * v{b}_{j}_{i}" for i in range(UNIT)]
            sums = [" + ".join(products[n :: v.chains]) for n in range(v.chains)]
            yield f"a{j}_{r} = a{j}_{r} + " + (sums[0] if v.chains == 1 else " + ".join(f"({x})" for x in sums))

    lines = [
        f"def product_{m}_{c}_{v.warps}_{v.units}_{int(v.brain)}_{v.chains}"
        "(x, q, scales, tops, perm, table, bias, biased, columns, units, slice_units, partial, counters, y, rows):",
        f"    shared = cuda.shared.array({v.floats}, np.float32)",
        "    arrived = cuda.shared.array(1, np.int32)",
        "    t = cuda.threadIdx.x",
        "    lane = t % 32",
        "    warp = t // 32",
        "    first = cuda.blockIdx.y * slice_units",
        "    end = min(first + slice_units, units)",
        f"    for i in range(t, (end - first) * {UNIT}, {threads}):",
        f"        f = perm[first * {UNIT} + i]",
    ]
    for r in range(m):
        lines += [
            "        value = np.float32(0.0)",
            f"        if rows > {r}:",
            f"            value = {load.format(r=r)}",
            f"        shared[i * {m} + {r}] = value",
        ]
    lines += [
        "    cuda.syncthreads()",
        f"    column = (cuda.blockIdx.x * 32 + lane) * {c}",
        *(f"    s{j}_{r} = np.float32(0.0)" for j, r in each),
        "    if column < columns:",
        "        pair = column // 2",
        f"        share = (end - first + {v.warps - 1}) // {v.warps}",
        "        begin = first + warp * share",
        *(f"        a{j}_{r} = np.float32(0.0)" for j, r in each),
        *(f"        e{j} = np.float32(0.0)" for j in range(c)),
        "        group = -1",
        "        for u in range(begin, min(begin + share, end)):",
        "            bits = table[u, 0]",
        "            word = table[u, 1]",
        f"            k = (u - first) * {UNIT * m}",
        "            if table[u, 2] != group:",
        "                group = table[u, 2]",
        *(f"                s{j}_{r} += a{j}_{r} * e{j}" for j, r in each),
        *(f"                a{j}_{r} = np.float32(0.0)" for j, r in each),
        "                nibbles = np.uint32(scales[group, column // 8]) >> np.uint32(4 * (column % 8))",
        "                top = tops[group]",
        "                whole = np.float32(1 << bits)",
    ]
    for j in range(c):
        lines += [
            f"                code = np.float32(((nibbles >> np.uint32({4 * j})) & np.uint32(15)) + np.uint32(1))",
            f"                e{j} = np.float32(np.float16(code * code * top)) * whole",
        ]
    lines += [
        *_widths(" " * 12, unit),
        *(f"        s{j}_{r} += a{j}_{r} * e{j}" for j, r in each),
        "    cuda.syncthreads()",
        *(f"    shared[(warp * {m} + {r}) * {wide} + lane * {c} + {j}] = s{j}_{r}" for j, r in each),
        "    cuda.syncthreads()",
        "    slices = cuda.gridDim.y",
        f"    for i in range(t, {m * wide}, {threads}):",
        f"        r = i // {wide}",
        f"        col = cuda.blockIdx.x * {wide} + i % {wide}",
        "        total = shared[i]",
        f"        for n in range(1, {v.warps}):",
        f"            total += shared[n * {m * wide} + i]",
        "        if col < columns and r < rows:",
        "            if slices > 1:",
        f"                partial[(cuda.blockIdx.y * {m} + r) * columns + col] = total",
        "            else:",
        "                if biased:",
        "                    total += np.float32(bias[col])",
        f"                {_store('y[r, col]', 'total', v.brain)}",
        "    if slices > 1:",
        "        cuda.threadfence()",
        "        cuda.syncthreads()",
        "        if t == 0:",
        "            arrived[0] = cuda.atomic.add(counters, cuda.blockIdx.x, 1)",
        "        cuda.syncthreads()",
        "        if arrived[0] == slices - 1:",
        "            cuda.threadfence()",
        f"            for i in range(t, {m * wide}, {threads}):",
        f"                r = i // {wide}",
        f"                col = cuda.blockIdx.x * {wide} + i % {wide}",
        "                if col < columns and r < rows:",
        "                    total = np.float32(0.0)",
        "                    for n in range(slices):",
        f"                        total += partial[(n * {m} + r) * columns + col]",
        "                    if biased:",
        "                        total += np.float32(bias[col])",
        f"                    {_store('y[r, col]', 'total', v.brain)}",
        "            if t == 0:",
        "                counters[cuda.blockIdx.x] = 0",
    ]
    return "\n".join(lines) + "\n"


def unpack_source(brain: bool) -> str:
    """out (K, N), rows in the order of the input. Launch: (N / 2 / threads, K / 32) blocks; a thread has two columns."""

    def unit(b: int) -> Iterator[str]:
        yield from _words(b, 2, "pair")
        for i in range(UNIT):
            yield f"f{b}_{i} = perm[row + {i}]"
            for j in range(2):
                value = f"np.float16(({_value(i, b, f'w{b}_{j}_')}) * e{j})"
                yield _store(f"out[f{b}_{i}, column + {j}]", f"np.float32({value})" if brain else value, brain)

    lines = [
        f"def unpack_{int(brain)}(q, scales, tops, perm, table, columns, out):",
        "    pair = cuda.blockIdx.x * cuda.blockDim.x + cuda.threadIdx.x",
        "    column = 2 * pair",
        "    if column < columns:",
        "        u = cuda.blockIdx.y",
        f"        row = u * {UNIT}",
        "        bits = table[u, 0]",
        "        word = table[u, 1]",
        "        group = table[u, 2]",
        "        nibbles = np.uint32(scales[group, column // 8]) >> np.uint32(4 * (column % 8))",
        "        whole = np.float32(1 << bits)",
    ]
    for j in range(2):
        lines += [
            f"        code = np.float32(((nibbles >> np.uint32({4 * j})) & np.uint32(15)) + np.uint32(1))",
            f"        e{j} = np.float32(np.float16(code * code * tops[group])) * whole",
        ]
    return "\n".join([*lines, *_widths(" " * 8, unit)]) + "\n"


@cuda.jit(device=True)
def _right(word, shift, mask):
    bits = np.uint32(np.uint32(word >> np.uint32(shift)) & np.uint32(mask))
    return _as_float(np.int32(bits | np.uint32(0x3F800000))) - np.float32(1.5)


@cuda.jit(device=True)
def _left(word, shift, mask):
    bits = np.uint32(np.uint32(word << np.uint32(shift)) & np.uint32(mask))
    return _as_float(np.int32(bits | np.uint32(0x3F800000))) - np.float32(1.5)


@cuda.jit(device=True)
def _across(low, high, shift, mask):
    bits = np.uint32(np.uint32(low >> np.uint32(shift)) | np.uint32(high << np.uint32(32 - shift)))
    return _as_float(np.int32(np.uint32(bits & np.uint32(mask)) | np.uint32(0x3F800000))) - np.float32(1.5)


@cuda.jit(device=True)
def _brain_bits(value):
    """The bits of the bfloat16 nearest to a float32, ties to even."""
    bits = _as_bits(value)
    if value != value:
        return np.uint32(0x7FC0)
    return (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)


def _compiled(source: str) -> Any:
    names: dict[str, Any] = {
        "np": np, "cuda": cuda, "as_float": _as_float, "brain_bits": _brain_bits, "right": _right, "left": _left,
        "across": _across,
    }  # fmt: skip
    exec(compile(source, __file__, "exec"), names)
    return cuda.jit(cache=True)(names[source[4 : source.index("(")]])


@cache
def product_kernel(variant: Variant) -> Any:
    assert variant.floats <= SHARED_FLOATS, variant
    return _compiled(product_source(variant))


@cache
def unpack_kernel(brain: bool) -> Any:
    return _compiled(unpack_source(brain))
