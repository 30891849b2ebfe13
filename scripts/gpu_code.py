#!/usr/bin/env python3
"""Compiles the kernels that run EXL2 models for a GPU, without one, and counts what a warp executes for a unit of 32 rows.

    pip install numba-cuda nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-nvdisasm nvidia-cuda-runtime nvidia-cuda-cccl
    python scripts/gpu_code.py [--arch 90] [--rows 1] [--columns 4] [--warps 8] [--most 128]

Prints the seconds that Numba takes, registers and spilled bytes (with at most --most registers a thread), and the straight
pieces of more than 100 instructions with their kinds: with one row, each of the six widths has one, in which a thread
multiplies 32 weights of each of its columns.
"""

from __future__ import annotations

import argparse
import collections
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
from pathlib import Path

import numba.cuda.dispatcher as dispatcher
from numba import cuda
from numba.types import Array, boolean, float16, float32, int32, int64

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from exl2ray.cuda.run_kernels import Variant, product_kernel, unpack_kernel

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9]+)")


def tool(name: str) -> str:
    """Path of a program of the CUDA toolkit that pip installed."""
    found = sorted(Path(sysconfig.get_paths()["purelib"]).glob(f"nvidia/**/bin/{name}"))
    if not found:
        raise SystemExit(f"{name} is not installed: see --help")
    return str(found[0])


def pieces(listing: str) -> list[list[str]]:
    """Instructions between labels and branches."""
    found: list[list[str]] = [[]]
    for line in listing.splitlines():
        if line.strip().startswith(".L_"):
            found.append([])
        if match := INSTRUCTION.search(line):
            found[-1].append(match[1])
            if match[1] == "BRA":
                found.append([])
    return found


def show(name: str, kernel: object, signature: tuple[object, ...], arch: str, most: int) -> None:
    began = time.process_time()
    ptx, _ = cuda.compile_ptx(kernel.py_func, signature, cc=(int(arch[:-1]), int(arch[-1])))
    took = time.process_time() - began
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(ptx)
        command = [tool("ptxas"), f"-arch=sm_{arch}", "-O3", "-v", f"-maxrregcount={most}", source, "-o", binary]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
        listing = subprocess.run([tool("nvdisasm"), "-c", binary], capture_output=True, text=True, check=True).stdout
    registers, spilled = (re.search(p, said)[1] for p in (r"Used (\d+) registers", r"(\d+) bytes spill stores"))
    print(f"{name}: compiled in {took:.1f} s of processor time, {registers} registers, {spilled} bytes spilled")
    for piece in pieces(listing):
        if len(piece) > 100:
            kinds = ", ".join(f"{n} {kind}" for kind, n in collections.Counter(piece).most_common(8))
            print(f"  {len(piece)} instructions: {kinds}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="90")
    parser.add_argument("--rows", type=int, choices=(1, 4), default=1)
    parser.add_argument("--columns", type=int, choices=(2, 4), default=4)
    parser.add_argument("--warps", type=int, default=8)
    parser.add_argument("--most", type=int, default=128)
    args = parser.parse_args()
    arch = (int(args.arch[:-1]), int(args.arch[-1]))
    dispatcher.get_current_device = lambda: types.SimpleNamespace(compute_capability=arch)  # device functions ask for it

    def array(kind: object, dimensions: int) -> Array:
        return Array(kind, dimensions, "C")

    packed = (array(int64, 1), array(int32, 2), array(float32, 1), array(int32, 1), array(int32, 2))
    product = (
        array(float16, 2), *packed, array(float16, 1), boolean, *[int64] * 3, array(float32, 1), array(int32, 1),
        array(float16, 2), int64, int64,
    )  # fmt: skip
    variant = Variant(args.rows, args.columns, args.warps)
    show(str(variant), product_kernel(variant), product, args.arch, args.most)
    show("unpacking", unpack_kernel(False), (*packed, int64, array(float16, 2), int64), args.arch, args.most)


if __name__ == "__main__":
    main()
