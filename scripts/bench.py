#!/usr/bin/env python3
"""Times the numerics on one GPU (or the CPU): one layer of a model of a given shape, random weights and states.

    python scripts/bench.py --shape 7b --passes measure,quantize,solve,pack [--json]
    python scripts/bench.py --shape qwen3-moe --passes quantize --quality balanced --profile 25

Every pass is run `--repeat` times after one warm-up (kernel compilation, graph recording) and the fastest is shown. The
table has the reference's seconds where they are known (ExLlamaV2 0.3.2 on an H200) and the floor that counted FLOPs and the
device's matrix rate set. ``--quality balanced`` quantises as a conversion does by default: targets corrected towards states
of the source model, refined scales, sweeps. ``--profile N`` runs everything once more and shows the N kernels that took most,
what they took together, and the seconds of the run: the rest is the processor's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy

if not hasattr(numpy, "row_stack"):  # numba-cuda 0.30 imports it; numpy 2.5 dropped it
    numpy.row_stack = numpy.vstack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from random_models import Shape, build
from torch.profiler import ProfilerActivity, profile

from exl2ray.allocation.knapsack import Slot, budget, solve
from exl2ray.datasets import BUILTIN_PERPLEXITY_ROWS
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import GroupLayout, QParams, pad32
from exl2ray.model.arch import load_spec
from exl2ray.model.blocks import check_states, load_block
from exl2ray.quality import PRESETS, Quality
from exl2ray.quant import pack as packing
from exl2ray.quant.entering import Entered, enter_module
from exl2ray.quant.memory import settings_for, states_fit
from exl2ray.quant.module import cut, measure_module, quantize_module
from exl2ray.quant.qparams import attention_options, head_option, mlp_options
from exl2ray.quant.rows import share_rows
from exl2ray.quant.solve import synchronize

CALLS = 10  # of a kernel per timing
MATRIX_RATE = {"H200": 700e12, "H100": 700e12}  # fp16 FLOP/s reached by cuBLAS on large products


SHAPES = {
    "7b": Shape(1, 4096, 11008, 32, 32),
    "70b": Shape(1, 8192, 28672, 64, 8),
    "mixtral": Shape(1, 4096, 14336, 32, 8, experts=8),
    "qwen3-moe": Shape(1, 2048, 768, 32, 4, experts=128, per_token=8, head=128),
    "tiny": Shape(1, 256, 704, 4, 2),
}
REFERENCE = {"7b": (26.0, 13.5), "70b": (88.1, 56.6)}  # seconds of the reference: measure one layer, quantise one layer


class Packed(dict[str, PackedLinear]):
    """Keeps what is packed."""

    add = dict[str, PackedLinear].update

    def flush(self) -> None:
        pass


class Bench:
    def __init__(
        self, name: str, device: torch.device, repeat: int, frugal: bool = False, quality: Quality = "reference",
        profiled: int = 0,
    ) -> None:  # fmt: skip
        self.frugal = frugal  # source weights wait on the host, as they do in a conversion
        self.numerics, self.profiled = PRESETS[quality], profiled
        self.name, self.shape, self.device, self.repeat = name, SHAPES[name], device, repeat
        self.folder = tempfile.TemporaryDirectory()
        build(Path(self.folder.name), self.shape)
        self.source = SourceModel(self.folder.name)
        self.spec = load_spec(self.source)
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.rows: list[dict[str, object]] = []

    def states(self, rows: int, tokens: int, measuring: bool = False) -> torch.Tensor:
        """Random states, where a conversion would keep them."""
        generator = torch.Generator(self.device).manual_seed(1)
        nbytes = 2 * rows * tokens * self.shape.hidden
        on_device = self.device.type == "cpu" or states_fit(
            self.spec.modules, nbytes, tokens, self.device, self.numerics.target_correction > 0, measuring
        )
        x = torch.empty(rows, tokens, self.shape.hidden, dtype=torch.float16, device=self.device if on_device else "cpu")
        for r in range(rows):
            x[r] = torch.randn(tokens, self.shape.hidden, generator=generator, device=self.device).half()
        return x

    def time(self, work: Callable[[], object]) -> tuple[float, float]:
        """(fastest, first) seconds."""
        seconds = []
        for _ in range(self.repeat + 2 if self.repeat else 1):  # the first compiles, the second records graphs
            synchronize(self.device)
            start = time.perf_counter()
            work()
            synchronize(self.device)
            seconds.append(time.perf_counter() - start)
        if self.profiled:
            self.profile(work)
        return min(seconds[2:] or seconds), seconds[0]

    def profile(self, work: Callable[[], object]) -> None:
        """One more run, and what took most of it, on standard error."""
        gpu = self.device.type == "cuda"
        synchronize(self.device)
        with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as found:
            start = time.perf_counter()
            work()
            synchronize(self.device)
            seconds = time.perf_counter() - start
        spent = {e.key: (e.self_device_time_total if gpu else e.self_cpu_time_total, e.count) for e in found.key_averages()}
        total = sum(us for us, _ in spent.values()) / 1e6
        print(f"profile: {seconds:.3f} s, {total:.3f} s of kernels", file=sys.stderr)
        for key, (us, count) in sorted(spent.items(), key=lambda item: -item[1][0])[: self.profiled]:
            print(f"{us / 1e3:10.2f} ms {count:8d}  {key[:100]}", file=sys.stderr)

    def add(self, work: str, seconds: float, first: float, reference: float | None = None, flop: float = 0.0) -> None:
        rate = next((r for n, r in MATRIX_RATE.items() if n in device_name(self.device)), None)
        self.rows.append({
            "shape": self.name, "work": work, "seconds": round(seconds, 4), "first": round(first, 2),
            "reference": reference, "ratio": round(reference / seconds, 1) if reference else None,
            "floor": round(flop / rate, 3) if flop and rate else None,
            "peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 1) if self.device.type == "cuda" else None,
        })  # fmt: skip
        print(self.rows[-1], file=sys.stderr, flush=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def measure(self, rows: int, tokens: int) -> None:
        x = self.states(rows, tokens, measuring=True)
        total = first_total = 0.0
        for index in (1, 2):
            module = self.spec.modules[index]
            block = load_block(self.spec, module, self.source, self.device, self.dtype)
            settings = settings_for(module, rows, tokens, self.device, 0.12)
            seconds, first = self.time(
                lambda b=block, s=settings: measure_module(enter_module(b, x, s, check_states), lambda note: None)
            )
            self.add(f"measure {module.kind}", seconds, first)
            total, first_total = total + seconds, first_total + first
        reference = REFERENCE.get(self.name, (None, None))[0]
        self.add("measure layer", total, first_total, reference, self.measure_flop(rows * tokens))

    def measure_flop(self, tokens: int) -> float:
        """FLOPs of the distinct projection outputs of all options, without attention."""
        s = self.shape
        attention = 2 * tokens * s.hidden * s.head_width * (33 * s.heads + 29 * s.kv_heads)
        active = s.per_token if s.experts else 1
        return attention + 2 * tokens * active * s.hidden * s.wide * (13 + 13 + 17)

    def quantize(self, rows: int, tokens: int) -> None:
        x = self.states(rows, tokens)
        other = (x.float() * 1.01).half()  # of the source model, whose reported rows alone go along without corrected targets
        total = first_total = 0.0
        for index, table in ((1, attention_options()[10]), (2, mlp_options()[9])):
            module = self.spec.modules[index]
            roles = ("q_proj", "k_proj", "v_proj", "o_proj") if index == 1 else (
                ("w1", "w3", "w2") if self.shape.experts else ("gate_proj", "up_proj", "down_proj"))  # fmt: skip
            chosen = dict(zip(roles, table, strict=True))
            settings = replace(settings_for(module, rows, tokens, self.device, 0.12), numerics=self.numerics)
            source = load_block(self.spec, module, self.source, self.device, self.dtype)
            originals = {key: w.cpu() if self.frugal else w for key, w in source.weights.items()}

            def work(b=source, m=module, o=originals, c=chosen, s=settings) -> None:
                for key, weight in o.items():
                    b.weights[key] = weight.to(self.device)
                params = {y.key: c[y.role] for y in m.linears}
                beside = other if s.numerics.target_correction else other[:BUILTIN_PERPLEXITY_ROWS]
                sources = {share: beside[r.start : r.stop].clone() for share, r in enumerate(share_rows(len(beside)))}
                quantize_module(b, cut(x.clone()), sources, len(x), params, s, check_states, Packed())

            seconds, first = self.time(work)
            self.add(f"quantize {module.kind}", seconds, first)
            total, first_total = total + seconds, first_total + first
        reference = REFERENCE.get(self.name, (None, None))[1]
        s = self.shape
        heads = 2 * (s.heads + s.kv_heads) * s.head_width
        active = s.per_token if s.experts else 1
        per_token = 2 * s.hidden * (heads + 3 * active * s.wide)
        self.add("quantize layer", total, first_total, reference, 2 * per_token * rows * tokens)

    def quantized(self, entered: Entered, params: dict[str, QParams]) -> None:
        x, packed = entered.x, Packed()
        quantize_module(entered.block, cut(x), {}, len(x), params, entered.settings, check_states, packed, entered=entered)

    def head(self, rows: int, tokens: int) -> None:
        x = self.states(rows, tokens)
        module = self.spec.modules[-1]
        block = load_block(self.spec, module, self.source, self.device, self.dtype)
        settings = settings_for(module, rows, tokens, self.device, 0.12)
        original = dict(block.weights)

        def work() -> None:
            block.weights.update(original)
            self.quantized(enter_module(block, x, settings, check_states), {module.linears[0].key: head_option(6)})

        self.add("quantize head", *self.time(work))

    def pack(self) -> None:
        k, n = pad32(self.shape.hidden), pad32(self.shape.wide)
        for bits in (4, 3):
            layout = GroupLayout((bits,) * (k // 128), (128,) * (k // 128))
            codes = torch.randint(0, 2**bits, (k, n), dtype=torch.uint8, device=self.device)
            moved = codes.numel() * (1 + bits / 8)
            seconds, first = self.time(self.replayed(lambda c=codes, y=layout: packing.pack_rows(c, y)))
            self.add(f"pack {bits} bit: {moved * CALLS / seconds / 1e9:.0f} GB/s", seconds / CALLS, first)
            if self.device.type == "cuda":
                self.dequantise(codes, layout)

    def dequantise(self, codes: torch.Tensor, layout: GroupLayout) -> None:
        from exl2ray.cuda.packing import dequantize_cuda

        k, n = codes.shape
        words = packing.pack_rows(codes, layout)
        tables = packing.unit_tables(layout, self.device)
        steps = torch.full((len(layout.rows), n), 0.01, dtype=torch.float16, device=self.device)
        perm = torch.randperm(k, device=self.device)
        seconds, first = self.time(self.replayed(lambda: dequantize_cuda(words, steps, perm, *tables)))
        moved = k * n * (2 + layout.bits[0] / 8)
        self.add(f"dequantise {layout.bits[0]} bit: {moved * CALLS / seconds / 1e9:.0f} GB/s", seconds / CALLS, first)

    def replayed(self, work: Callable[[], object]) -> Callable[[], object]:
        """CALLS runs of ``work``; on a GPU as one CUDA graph, so that launches from Python do not count."""
        if self.device.type != "cuda":
            return lambda: [work() for _ in range(CALLS)]
        work()
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                work()
        return graph.replay

    def solve(self) -> None:
        import random

        rng = random.Random(0)
        slots, weights = [], 0
        for i in range(160):
            n = (19, 17)[i % 2]
            size = (4 * self.shape.hidden**2, 3 * self.shape.hidden * self.shape.wide)[i % 2]
            bits = sorted(rng.uniform(2.2, 8.1) for _ in range(n))
            scale = rng.lognormvariate(-2, 1)
            slots.append(Slot(str(i), tuple(int(b * size) for b in bits), tuple(scale * 2.5 ** -(b - 2) for b in bits)))
            weights += size
        start = time.perf_counter()
        result = solve(slots, budget(weights, 4.0))
        seconds = time.perf_counter() - start
        self.add(f"solve 160 slots, gap {result.gap:.1e}", seconds, seconds, 20.2 if self.name == "70b" else 21.5)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="7b", help=f"{', '.join(SHAPES)}; several with commas")
    parser.add_argument("--passes", default="measure,quantize,solve,pack", help="measure, quantize, head, solve, pack")
    parser.add_argument("--measure-rows", type=int, default=19)
    parser.add_argument("--quantize-rows", type=int, default=115)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=2, help="timed runs after two of warm-up; 0: one cold run, for memory")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--vram-gb", type=float, help="limit torch to this much GPU memory")
    parser.add_argument("--quality", choices=["reference", "balanced"], default="reference", help="of quantising")
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="show the N kernels that take most")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if args.vram_gb is not None:
        torch.cuda.set_per_process_memory_fraction(args.vram_gb * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    rows: list[dict[str, object]] = []
    for name in args.shape.split(","):
        bench = Bench(name, device, args.repeat, args.vram_gb is not None, args.quality, args.profile)
        for work in args.passes.split(","):
            if work == "measure":
                bench.measure(args.measure_rows, args.tokens)
            elif work == "quantize":
                bench.quantize(args.quantize_rows, args.tokens)
            elif work == "head":
                bench.head(args.quantize_rows, args.tokens)
            else:
                {"pack": bench.pack, "solve": bench.solve}[work]()
        rows += bench.rows
    if args.json:
        print(json.dumps({"device": device_name(device), "rows": rows}))
        return
    print(f"device: {device_name(device)}, {args.measure_rows} and {args.quantize_rows} rows of {args.tokens} tokens")
    print("| shape | work | seconds | first run | reference | ratio | floor | peak GB |\n|---|---|---|---|---|---|---|---|")
    for r in rows:
        cells = [r[k] for k in ("shape", "work", "seconds", "first", "reference", "ratio", "floor", "peak_gb")]
        print("| " + " | ".join("" if c is None else str(c) for c in cells) + " |")


if __name__ == "__main__":
    main()
