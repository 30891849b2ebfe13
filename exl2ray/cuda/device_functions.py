"""What the kernels of `exl2ray.cuda.kernels` have in common: functions of one thread.

The compiler for the GPU puts them where they are used. Numba would do so too if asked (inline=True), for the same
instructions and twice the time: a machine compiles all kernels before its first conversion. `step_of` is the exception, for
which the instructions of `settle` come out in another order.

|d|^3.5 = d^4 / sqrt(d): one reciprocal root, no power function. Rounding to the nearest integer by adding and removing
1.5 * 2^23 costs two additions where the conversion unit would be a bottleneck; fastmath stays off, it would remove them
and make the final division approximate.

Numba's cache on disk looks at the file of a kernel, not at this one: after an edit here, touch kernels.py.
"""

from __future__ import annotations

import math
import os

import numpy as np
from numba import cuda

# Places in arrays are unsigned: Numba has signed ones count from the end, and looks. Both kinds together are a float to it.
u64 = np.uint64
R1, R2, R3, R4, R5, R6, R7 = u64(1), u64(2), u64(3), u64(4), u64(5), u64(6), u64(7)

ROUND = np.float32(12582912.0)  # 1.5 * 2^23
_TINY = np.float32(1e-12)
SMALLEST = np.float32(1e-30)

if os.environ.get("NUMBA_ENABLE_CUDASIM") == "1":

    def _rsqrt(x):
        return np.float32(1.0) / np.float32(math.sqrt(x))

    def fmin(a, b):
        return a if a < b else b

    def fmax(a, b):
        return a if a > b else b

else:
    from llvmlite import ir
    from numba import types
    from numba.cuda import libdevice
    from numba.cuda.extending import intrinsic

    @intrinsic
    def _rsqrt(typingctx, x):
        """rsqrt.approx.ftz.f32: libdevice's form spends three more instructions on subnormals, which _TINY rules out."""

        def codegen(context, builder, signature, args):
            form = ir.FunctionType(ir.FloatType(), [ir.FloatType()])
            return builder.call(ir.InlineAsm(form, "rsqrt.approx.ftz.f32 $0, $1;", "=f,f"), args)

        return types.float32(types.float32), codegen

    # The builtin min and max keep Python's order of NaNs, which takes two instructions where the hardware has one.

    @cuda.jit(device=True)
    def fmin(a, b):
        return libdevice.fminf(a, b)

    @cuda.jit(device=True)
    def fmax(a, b):
        return libdevice.fmaxf(a, b)


@cuda.jit(device=True)
def error_term(t, p, inverse, low, high):
    """|clamp(rint(t / p)) p - t|^3.5 for one weight in units of its column's step."""
    q = (t * inverse + ROUND) - ROUND
    q = fmin(fmax(q, low), high)
    d = abs(q * p - t) + _TINY
    square = d * d
    return square * square * _rsqrt(d)


@cuda.jit(device=True)
def nearest(v, step, zero, high):
    """Nearest integer of v / step within -zero .. high; a step that underflowed to zero gives the end on v's side."""
    q = np.float32(0.0)
    if step > np.float32(0.0):
        # The quotient may be huge where the step is tiny: clamp before rounding.
        q = fmin(fmax(v / step, -zero), high)
        q = (q + ROUND) - ROUND
    elif v > np.float32(0.0):
        q = high
    elif v < np.float32(0.0):
        q = -zero
    return q


@cuda.jit(device=True, inline=True)
def step_of(code, top):
    """Between two integers of a column whose scale code and whose segment's maximum these are, in the loader's halves."""
    m = np.float32(np.float16(np.float32(top) / np.float32(256.0)))
    return np.float32(np.float16(np.float32(code) * np.float32(code) * m))


@cuda.jit(device=True)
def settled(v, old, pivot, step, zero, high, sweep):
    """(integer, e) of one weight: v and e = (v - new) / pivot in a first pass; in a sweep v is its row of S = H E, the weight
    goes to the nearest of old + v / pivot, and e = new - old."""
    q = nearest(old + v / pivot if sweep else v, step, zero, high)
    new = np.float32(np.float16(q * step))
    return q, new - old if sweep else (v - new) / pivot


@cuda.jit(device=True)
def passed_on(v, factor, s, k, e0, e1, e2, e3, e4, e5, e6, e7):
    """The weight v of row k less what the errors of rows s .. s+8 of ``factor`` mean for it, one after another."""
    v -= factor[s, k] * e0
    v -= factor[s + R1, k] * e1
    v -= factor[s + R2, k] * e2
    v -= factor[s + R3, k] * e3
    v -= factor[s + R4, k] * e4
    v -= factor[s + R5, k] * e5
    v -= factor[s + R6, k] * e6
    v -= factor[s + R7, k] * e7
    return v
