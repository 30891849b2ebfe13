#!/usr/bin/env python3
"""Times the kernels that run EXL2 models, on one GPU, and whole models under transformers and in ExLlamaV2.

    python scripts/bench_run.py linears [--bits 4.0] [--rows 1,16] [--columns 2,4] [--warps 4,8] [--blocks 2,4]
    python scripts/bench_run.py model [--layers 32] [--prompt 512] [--tokens 128] [--batches 1,2,4] [--compile] [--generate]
    python scripts/bench_run.py directory DIR [--engine exllamav2] [--prompt 512] [--tokens 128] [--batches 1,2] [--generate]

linears: one launch of the fused kernel for each shape of a 7B model and each variant, in a CUDA graph over copies of the
linear that together exceed the L2 cache: microseconds, GB/s of packed tensors and the share of what copying on the device
reaches; the unpacking kernel; the first call, which compiles or reads Numba's cache. Every variant is checked against the
unpacked weights. model: a Llama of 7B shape whose linears are random packed tensors made on the device: decoding with a
static cache in a CUDA graph, one prompt of 2048 tokens, peak memory. Random integers: figures of speed only. directory: the
same for an EXL2 model, with the time of loading it; with --engine exllamav2 by that package's own forward, one call a token.
--generate: by transformers' own ``generate`` with a static cache, which compiles and records the decoding, and without that.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy

if not hasattr(numpy, "row_stack"):  # numba-cuda 0.30 imports it; numpy 2.5 dropped it
    numpy.row_stack = numpy.vstack

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from exl2ray.cuda.run import VARIANTS
from exl2ray.cuda.run_kernels import Variant
from exl2ray.formats.layout import QParams
from exl2ray.run.linear import Exl2Linear

SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))
MIXES = {  # average bits of the weights -> widths, shares, group sizes
    4.0: QParams((5, 4, 3), (0.1, 0.8, 0.1), (64, 128, 64)),
    3.0: QParams((4, 3, 2), (0.1, 0.8, 0.1), (64, 128, 64)),
    2.5: QParams((4, 3, 2), (0.1, 0.3, 0.6), (64, 64, 64)),
    6.0: QParams((8, 6, 5), (0.1, 0.7, 0.2), (128, 128, 128)),
}
PROMPT = 2048  # tokens
L2_BYTES = 200 << 20  # more than any L2 cache


def random_linear(k: int, n: int, mix: QParams, seed: int) -> Exl2Linear:
    """A legal linear with random integers and permutation, made on the GPU; weights of about 1 / sqrt(K)."""
    torch.manual_seed(seed)
    layout = mix.layout(k)
    groups = len(layout.bits)
    linear = Exl2Linear(k, n, layout.packed_rows, groups, device="cuda")
    linear.q_weight.random_(-(1 << 31), 1 << 31)
    linear.q_scale.random_(-(1 << 31), 1 << 31)
    steps = torch.tensor([4.0 / (1 << b) * k**-0.5 for b in layout.bits])
    linear.q_scale_max.copy_(steps)
    pairs = [x for pair in zip(layout.bits, layout.offsets, strict=True) for x in pair]
    linear.q_groups.copy_(torch.tensor(pairs, dtype=torch.int16))
    linear.q_invperm.copy_(torch.randperm(k, device="cuda"))
    return linear


def size(linear: Exl2Linear) -> int:
    return sum(b.numel() * b.element_size() for b in linear.buffers())


def seconds(work: Callable[[], object], repeat: int = 5) -> float:
    """Fastest of several runs of a CUDA graph of ``work``."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    best = float("inf")
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 1000)
    return best


def copy_speed() -> float:
    """Bytes per second, read and written, of copying 1 GiB on the device."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / seconds(lambda: b.copy_(a))


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]


def bench_linears(args: argparse.Namespace) -> None:
    peak = copy_speed()
    print(f"{torch.cuda.get_device_name()}: copying {peak / 1e9:.0f} GB/s; {args.bits} bits per weight")
    for k, n in SHAPES:
        first = random_linear(k, n, MIXES[args.bits], 0)
        copies = [first, *(random_linear(k, n, MIXES[args.bits], s) for s in range(1, -(-L2_BYTES // size(first)) + 1))]
        seconds_unpack = seconds(lambda c=copies: [x.weight_matrix(torch.float16) for x in c]) / len(copies)
        moved = size(first) + 2 * k * n
        speed = moved / seconds_unpack / 1e9
        print(f"{k} x {n}: {size(first) / 1e6:.1f} MB, unpacking {seconds_unpack * 1e6:.1f} us {speed:.0f} GB/s")
        for rows in numbers(args.rows):
            x = torch.randn(rows, k, device="cuda", dtype=torch.float16)
            expected = x @ first.weight_matrix(torch.float16)
            for line in variants_of(args, rows, copies, x, expected, peak):
                print(line, flush=True)


def variants_of(
    args: argparse.Namespace, rows: int, copies: list[Exl2Linear], x: Tensor, expected: Tensor, peak: float
) -> Iterator[str]:
    for columns, warps in itertools.product(numbers(args.columns), numbers(args.warps)):
        v = Variant(1 if rows == 1 else 4, columns, warps)
        if v.units(rows) < warps:  # too little room for activations
            continue
        for blocks in numbers(args.blocks):
            for linear in copies:
                p = linear.packed()
                p.variants, p.blocks_per_sm = ((v, VARIANTS[1]) if rows == 1 else (VARIANTS[0], v)), blocks
                p._launches.clear()
            began = time.perf_counter()
            y = copies[0].packed().product(x)
            torch.cuda.synchronize()
            compiled = time.perf_counter() - began
            off = float((y - expected).float().norm() / expected.float().norm())
            took = seconds(lambda: [c.packed().product(x) for c in copies]) / len(copies)
            speed = size(copies[0]) / took
            yield (
                f"  rows {rows:2} columns {columns} warps {warps:2} blocks/SM {blocks:2}: {took * 1e6:7.2f} us "
                f"{speed / 1e9:5.0f} GB/s {100 * speed / peak:3.0f} %, first call {compiled:.1f} s, error {off:.1e}"
            )
            if not off < 2e-3:
                raise SystemExit("wrong product")


def bench_model(args: argparse.Namespace) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=args.layers, max_position_embeddings=4096)
    began = time.perf_counter()
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.float16)
    mix = MIXES[args.bits]
    for seed, (name, module) in enumerate(list(model.named_modules())):
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name:
            parent, _, leaf = name.rpartition(".")
            linear = random_linear(module.in_features, module.out_features, mix, seed)
            setattr(model.get_submodule(parent), leaf, linear)
    for name, parameter in list(model.named_parameters()):
        parent, _, leaf = name.rpartition(".")
        made = torch.ones if "norm" in name else torch.randn
        value = made(parameter.shape, dtype=torch.float16, device="cuda") * (1 if "norm" in name else 0.02)
        setattr(model.get_submodule(parent), leaf, torch.nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).cuda()
    model.eval()
    packed = sum(size(m) for m in model.modules() if isinstance(m, Exl2Linear))
    print(f"{args.layers} layers, packed {packed / 1e9:.2f} GB, made in {time.perf_counter() - began:.1f} s")
    run_model(model, args)


def run_model(model: torch.nn.Module, args: argparse.Namespace) -> None:
    """Decoding in every batch size, then a prompt: of a transformers model on the GPU."""
    from transformers import StaticCache

    config, held = model.config, torch.cuda.memory_allocated()
    print(f"model {held / 1e9:.2f} GB")
    if args.compile:
        model.model.compile(fullgraph=True, dynamic=False)
    if args.generate:
        for batch in numbers(args.batches):
            time_generate(model, batch, args)
        return
    with torch.inference_mode():
        for batch in numbers(args.batches):
            decode(model, StaticCache(config, args.prompt + args.tokens + 8), batch, args, held)
        ids = torch.randint(config.vocab_size, (1, PROMPT), device="cuda")
        time_prompt(lambda: model(ids, use_cache=False, logits_to_keep=1))


def time_generate(model: torch.nn.Module, batch: int, args: argparse.Namespace) -> None:
    """Seconds of ``generate`` for one token are taken off, so what is left is decoding; the first call compiles."""
    ids = torch.randint(model.config.vocab_size, (batch, args.prompt), device="cuda")
    for compiled in (False, True):
        took = []
        for count in (args.tokens, args.tokens, 1):  # the second with the cache and the graph of the first
            torch.cuda.synchronize()
            began = time.perf_counter()
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                max_length=None, cache_implementation="static", disable_compile=not compiled,
            )  # fmt: skip
            torch.cuda.synchronize()
            took.append(time.perf_counter() - began)
            if out.shape[1] != args.prompt + count:
                raise SystemExit(f"{out.shape[1] - args.prompt} tokens in place of {count}")
        speed = batch * (args.tokens - 1) / (took[1] - took[2])
        how = "compiled" if compiled else "eager"
        print(f"generate, batch {batch:2}, {how:8}: {speed:8.1f} tokens/s, first call {took[0]:.1f} s", flush=True)


def time_prompt(forward: Callable[[], object]) -> None:
    took = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        began = time.perf_counter()
        forward()
        torch.cuda.synchronize()
        took = min(took, time.perf_counter() - began)
    peak = torch.cuda.max_memory_allocated()
    print(f"prompt of {PROMPT}: {took * 1e3:.1f} ms, {PROMPT / took:.0f} tokens/s, peak {peak / 1e9:.2f} GB", flush=True)


def bench_directory(args: argparse.Namespace) -> None:
    if args.directory is None:
        raise SystemExit("name the directory of an EXL2 model")
    free = torch.cuda.mem_get_info()[0]
    began = time.perf_counter()
    if args.engine == "exllamav2":
        run_exllamav2(args, began, free)
        return
    from transformers import AutoModelForCausalLM

    import exl2ray.transformers  # noqa: F401  registers the method "exl2"

    imported = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(args.directory, device_map="cuda", dtype=torch.float16)
    torch.cuda.synchronize()
    print(f"imported in {imported - began:.1f} s, loaded in {time.perf_counter() - imported:.1f} s")
    run_model(model.eval(), args)
    print(f"of the card {(free - torch.cuda.mem_get_info()[0]) / 1e9:.2f} GB")


def run_exllamav2(args: argparse.Namespace, began: float, free: int) -> None:
    from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config

    config = ExLlamaV2Config(str(args.directory))
    config.max_seq_len = PROMPT
    config.no_sdpa = True  # without flash-attn that path is not causal
    model = ExLlamaV2(config)
    model.load()
    torch.cuda.synchronize()
    print(f"loaded in {time.perf_counter() - began:.1f} s, imports included")
    with torch.inference_mode():
        for batch in numbers(args.batches):
            cache = ExLlamaV2Cache(model, batch_size=batch, max_seq_len=args.prompt + args.tokens + 8)
            ids = torch.randint(config.vocab_size, (batch, args.prompt))
            token = model.forward(ids, cache, last_id_only=True)[:, -1:, : config.vocab_size].argmax(-1).cpu()
            for count in (4, args.tokens - 4):  # the first are not timed
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(count):
                    token = model.forward(token, cache, last_id_only=True)[:, -1:, : config.vocab_size].argmax(-1).cpu()
                took = time.perf_counter() - began
            print(f"batch {batch:2}: {count / took:7.1f} steps/s, {batch * count / took:8.1f} tokens/s", flush=True)
            del cache
        ids = torch.randint(config.vocab_size, (1, PROMPT))
        cache = ExLlamaV2Cache(model, max_seq_len=PROMPT)

        def prompt() -> object:
            cache.current_seq_len = 0
            return model.forward(ids, cache, last_id_only=True)

        time_prompt(prompt)
    print(f"of the card {(free - torch.cuda.mem_get_info()[0]) / 1e9:.2f} GB")


def decode(model: torch.nn.Module, cache: object, batch: int, args: argparse.Namespace, held: int) -> None:
    """Greedy decoding: the prompt, then one token after the other from one recorded graph."""
    torch.cuda.reset_peak_memory_stats()
    ids = torch.randint(model.config.vocab_size, (batch, args.prompt), device="cuda")
    keys = torch.arange(args.prompt + args.tokens + 8, device="cuda")
    at = keys[: args.prompt]
    mask = (keys <= at[:, None])[None, None].expand(batch, 1, -1, -1)
    logits = model(ids, attention_mask=mask, past_key_values=cache, position_ids=at[None], logits_to_keep=1).logits
    token = logits[:, -1:].argmax(-1)
    position = torch.full((1,), args.prompt, device="cuda")

    def step() -> None:
        # A ready-made mask: making its own, transformers may look at numbers on the device, which a graph cannot.
        seen = (keys <= position)[None, None, None].expand(batch, 1, 1, -1)
        out = model(token, attention_mask=seen, past_key_values=cache, position_ids=position[None]).logits
        token.copy_(out[:, -1:].argmax(-1))
        position.add_(1)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(args.tokens):
        graph.replay()
    torch.cuda.synchronize()
    took = time.perf_counter() - began
    print(
        f"batch {batch:2}: {args.tokens / took:7.1f} steps/s, {batch * args.tokens / took:8.1f} tokens/s, "
        f"{held * args.tokens / took / 1e9:5.0f} GB/s of weights, peak {torch.cuda.max_memory_allocated() / 1e9:.2f} GB",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("linears", "model", "directory"))
    parser.add_argument("directory", nargs="?", type=Path)
    parser.add_argument("--engine", choices=("exl2ray", "exllamav2"), default="exl2ray")
    parser.add_argument("--compile", action="store_true", help="torch.compile; minutes for a deep model")
    parser.add_argument("--generate", action="store_true", help="by transformers' generate, static cache")
    parser.add_argument("--bits", type=float, default=4.0, choices=sorted(MIXES))
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--columns", default="2,4")
    parser.add_argument("--warps", default="4,8,16")
    parser.add_argument("--blocks", default="1,2,4")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batches", default="1,2,4,8,16")
    args = parser.parse_args()
    {"linears": bench_linears, "model": bench_model, "directory": bench_directory}[args.what](args)


if __name__ == "__main__":
    main()
