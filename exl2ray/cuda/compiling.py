"""Kernels that a conversion needs before its first module, compiled into Numba's cache without torch.

Importing torch takes longer than compiling any of them. So the types of their arguments, which a launch finds out from
tensors (`exl2ray.cuda.launch`), stand here once more; a test compares them with those of real launches.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# "file.kernel" -> its arguments. An array is a letter and its dimensions: float32, half, l(ong: int64), int32, char (uint8);
# a number is n (int64), b(oolean) or x (float32). In the order in which a conversion comes to them.
FORWARD = {
    "elementwise_kernels.rms_norm": "h2 f1 x h2",
    "elementwise_kernels.rotate": "h1 f2 f2 n n n n n b h1",
    "elementwise_kernels.gated_silu": "h1 h1 h1",
    "elementwise_kernels.residual_errors": "h2 h2 h2 f2",
    "elementwise_kernels.distances": "h2 h2 f3",
}
CORRECTED = {"elementwise_kernels.plus_behind": "h1 h1 h1 x h1"}  # with corrected targets
SOLVER = {
    "settle.settle": "f2 n n f2 b b i2 i2 i1 h2 c2 l1 n h2 c2 b f2",
    "kernels.column_tops": "f2 n n i2 f1 f1",
    "kernels.grid_errors": "f2 n n i2 i1 i2 n f1 f1 f1 c2 f1 f2",
    "kernels.choose": "f2 i1 f1 f1 n h2 f1",
}
REFINED = {  # with scale codes by error feedback
    "kernels.trial": "f2 n n f2 i2 i2 n f1 c2 i1 n x f2",
    "kernels.pick": "f2 i2 i2 n c2 i1 n",
}
PACKING = {"packing_kernels.pack": "i2 i1 i1 i2", "packing_kernels.dequantize": "i2 h2 l1 i1 i1 i1 h2"}
SIGNATURES = FORWARD | CORRECTED | SOLVER | REFINED | PACKING
SLOWEST = "settle.settle"  # takes two fifths of the time of all
FEW_CORES = 4


def needed(corrected: bool, refined: bool) -> list[str]:
    """Names of kernels, with corrected targets, and with scale codes by error feedback."""
    return [*FORWARD, *(CORRECTED if corrected else ()), *SOLVER, *(REFINED if refined else ()), *PACKING]


def shared_out(names: Sequence[str], cores: int) -> list[list[str]]:
    """What each of up to three processes is to compile, in about the same time; one on a machine of few processor cores."""
    if cores < FEW_CORES:
        return [list(names)] if names else []
    search = [n for n in (*SOLVER, *REFINED) if n != SLOWEST]
    shares = ([SLOWEST], search, [n for n in SIGNATURES if n != SLOWEST and n not in search])
    return [found for share in shares if (found := [n for n in names if n in share])]


def cached(name: str) -> bool:
    """Whether Numba's cache has this version of a kernel; Numba itself looks closer."""
    file, kernel = name.split(".")
    with suppress(OSError):
        changed = Path(__file__).with_name(f"{file}.py").stat().st_mtime
        found = Path(os.environ["NUMBA_CACHE_DIR"]).glob(f"**/{file}.{kernel}-*.nbi")
        return any(path.stat().st_mtime >= changed for path in found)
    return False


def argument_types(name: str) -> tuple[Any, ...]:
    """Numba's types of the arguments of a kernel."""
    from numba import types

    arrays = {"f": types.float32, "h": types.float16, "l": types.int64, "i": types.int32, "c": types.uint8}
    numbers = {"n": types.int64, "b": types.boolean, "x": types.float32}
    return tuple(
        numbers[text] if text in numbers else types.Array(arrays[text[0]], int(text[1:]), "C")
        for text in SIGNATURES[name].split()
    )


def compile_kernels(names: list[str]) -> None:
    """Compiles kernels for the first GPU, as torch counts them. Whoever needs them finds them in the cache."""
    for name in names:
        file, kernel = name.split(".")
        getattr(import_module(f"exl2ray.cuda.{file}"), kernel).compile(argument_types(name))
