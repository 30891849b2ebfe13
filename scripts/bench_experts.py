#!/usr/bin/env python3
"""Times the forward pass of expert layers: experts one by one against experts in runs (`exl2ray.model.moe`).

    python scripts/bench_experts.py [--device cuda] [--rows 1,4,16] [--tokens 2048]

Random weights are made on the device; the router favours some experts over others, as trained ones do. One table, fastest of
several calls: milliseconds of both ways, the share of the runs' time that copying weights together takes, the padding, and
which way `ExpertBank.runs_pay` chooses. On a CPU, where one by one is the way, the layers are small.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy

if not hasattr(numpy, "row_stack"):  # numba-cuda 0.30 imports it; numpy 2.5 dropped it
    numpy.row_stack = numpy.vstack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from exl2ray.model.half import LinearBank, Norm
from exl2ray.model.moe import Expert, ExpertBank, cut_runs, route
from exl2ray.model.spec import LinearSpec, Stored
from exl2ray.quant.solve import synchronize

REPEAT = 5


@dataclass(frozen=True)
class Layer:
    name: str
    experts: int
    per_token: int
    hidden: int
    width: int


LARGE = (Layer("Qwen3-30B-A3B", 128, 8, 2048, 768), Layer("Mixtral 8x7B", 8, 2, 4096, 14336))
SMALL = (Layer("Qwen3-MoE, small", 128, 8, 128, 48), Layer("Mixtral, small", 8, 2, 256, 896))


def make_bank(layer: Layer, device: torch.device) -> ExpertBank:
    """Random experts on the device, weights as transposed views like those of most checkpoints."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype) * shape[-1] ** -0.5

    def linear(role: str, k: int, n: int, e: int) -> LinearSpec:
        return LinearSpec(role, f"{e}.{role}", k, n, f"{role}.{e}", Stored("", (n, k)), expert=e)

    shapes = (("w1", layer.hidden, layer.width), ("w3", layer.hidden, layer.width), ("w2", layer.width, layer.hidden))
    experts = tuple(Expert(*(linear(*shape, e) for shape in shapes)) for e in range(layer.experts))
    bank = LinearBank(tuple(x for e in experts for x in (e.gate, e.up, e.down)), dtype)
    for x in bank.specs.values():
        bank.weights[x.key] = normal(x.out_features, x.in_features).t()
    favour = torch.linspace(0.5, 1.5, layer.experts, device=device)[:, None]
    norm = Norm("rms", torch.ones(layer.hidden, device=device), 1e-5)
    return ExpertBank(bank, experts, normal(layer.experts, layer.hidden) * favour, layer.per_token, "silu", norm)


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Milliseconds, after one run of warm-up."""
    seconds = []
    for _ in range(REPEAT + 1):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]) * 1e3


def compare(layer: Layer, bank: ExpertBank, tokens: int, device: torch.device) -> list[str]:
    """A row of the table."""
    generator = torch.Generator(device).manual_seed(1)
    h = torch.randn(tokens, layer.hidden, generator=generator, device=device, dtype=bank.bank.dtype)
    routing = route(bank.router, h, layer.per_token)
    size = h.element_size()
    weight_bytes, row_bytes = layer.hidden * layer.width * size, (layer.hidden + 3 * layer.width) * size
    runs = list(cut_runs(routing.counts, weight_bytes, row_bytes))
    rows = sum(len(run.experts) * run.rows for run in runs)

    def copy() -> None:
        for run in runs:
            for role in ("gate", "up", "down"):
                bank._stacked([getattr(bank.experts[e], role) for e in run.experts])

    def peak(in_runs: bool) -> str:
        if device.type != "cuda":
            return ""
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        bank.forward(h, routing, in_runs=in_runs)
        return f"{(torch.cuda.max_memory_allocated(device) - before) / 1e6:.0f}"

    loop = fastest(lambda: bank.forward(h, routing, in_runs=False), device)
    batched = fastest(lambda: bank.forward(h, routing, in_runs=True), device)
    a, b = (bank.forward(h, routing, in_runs=in_runs).float() for in_runs in (True, False))
    return [
        layer.name, str(tokens), f"{min(routing.counts)} to {max(routing.counts)}", f"{loop:.2f}", f"{batched:.2f}",
        f"{loop / batched:.1f}", f"{fastest(copy, device) / batched:.0%}", str(len(runs)),
        f"{1 - sum(routing.counts) / rows:.0%}", f"{peak(False)} / {peak(True)}", f"{(a - b).norm() / b.norm():.0e}",
        "runs" if bank.runs_pay(routing.experts.numel(), device) else "loop",
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", default="1,4,16", help="calibration rows per forward, several with commas")
    parser.add_argument("--tokens", type=int, help="tokens per row; default 2048, on a CPU 128")
    args = parser.parse_args()
    device = torch.device(args.device)
    small = device.type == "cpu"
    tokens = args.tokens or (128 if small else 2048)
    name = "CPU" if small else torch.cuda.get_device_name(device)
    print(f"device: {name}, fastest of {REPEAT}, rows of {tokens} tokens")
    heads = (
        "layer", "tokens", "tokens per expert", "loop ms", "runs ms", "ratio", "copying", "runs", "padding",
        "extra MB, loop / runs", "difference", "chosen",
    )  # fmt: skip
    print("| " + " | ".join(heads) + " |\n" + "|---" * len(heads) + "|")
    for layer in SMALL if small else LARGE:
        bank = make_bank(layer, device)
        for rows in args.rows.split(","):
            print("| " + " | ".join(compare(layer, bank, int(rows) * tokens, device)) + " |", flush=True)
        del bank


if __name__ == "__main__":
    main()
