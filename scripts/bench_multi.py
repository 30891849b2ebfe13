"""Two GPUs against one, on a 70B-shaped model of a few layers with random weights (hidden 8192, 64 heads, 8 of keys).

    python scripts/bench_multi.py --work /dev/shm/exl2ray-bench --gpus 1 2

Per number of GPUs: a measurement, a quantisation on quantised states and one on reference states, through `convert` as a
user would run it. Workers are warmed up (kernels compiled) before the clock of a stage starts. Prints one JSON line per
run, the ratios, and whether all measurements and all outputs have the same bytes. Needs some 10 GB in --work for four layers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers

import exl2ray.steps
from exl2ray.config import Recipe
from exl2ray.convert import convert
from exl2ray.dist.items import WorkerSetup
from exl2ray.dist.worker import Worker
from exl2ray.formats.shards import TensorEntry, write_shards
from exl2ray.model.blocks import check_states
from exl2ray.progress import Silent
from exl2ray.quant.measure import reference_pass, score_options


class WarmWorker(Worker):
    """A worker that has compiled its kernels: one short row through the first attention and MLP, all options."""

    def __init__(self, setup: WorkerSetup) -> None:
        super().__init__(setup)
        run = self.runner
        x = run.load(run.spec.modules[0]).forward(torch.arange(128)[None] % 200)
        for module in run.spec.modules[1:3]:
            block = run.load(module)
            settings = run.settings(module, x)
            y, hessians = reference_pass(block, x, settings, check_states)
            score_options(block, x, y, hessians, settings)
            x = y
        self.release()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/dev/shm/exl2ray-bench"))
    parser.add_argument("--gpus", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--wide", type=int, default=28672)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", choices=("measure", "quantized", "reference"), nargs="+")
    parser.add_argument("--keep", action="store_true", help="keep the model and the work directories")
    args = parser.parse_args()
    exl2ray.steps.Worker = WarmWorker  # type: ignore[misc]
    args.work.mkdir(parents=True, exist_ok=True)
    try:
        model = args.work / "model"
        if not (model / "config.json").exists():
            start = time.monotonic()
            build(model, args)
            report("model", seconds=time.monotonic() - start, bytes=size_of(model))
        figures = {n: runs(model, args, n) for n in args.gpus}
        summary(figures)
    finally:
        if not args.keep:
            shutil.rmtree(args.work, ignore_errors=True)


def runs(model: Path, args: argparse.Namespace, gpus: int) -> dict[str, Any]:
    """Seconds of each stage and digests of what came out, for one number of GPUs."""
    wanted = args.only or ["measure", "quantized", "reference"]
    out: dict[str, Any] = {}
    measurement = None
    for propagate in ("quantized", "reference"):
        if propagate not in wanted and not (propagate == "quantized" and "measure" in wanted):
            continue
        work = args.work / f"work-{gpus}-{propagate}"
        for old in (work, Path(f"{work}-out")):
            shutil.rmtree(old, ignore_errors=True)
        recipe = Recipe(
            in_dir=str(model), out_dir=str(work), bits=(args.bits,), length=args.length, measurement_length=args.length,
            device=args.device, gpus=gpus, executor="ray", propagate=propagate, measurement=measurement,
            checkpoint_seconds=1e6,
            output_measurement=None if propagate in wanted else str(args.work / "m.json"),
            compile_full=str(work) + "-out" if propagate in wanted else None,
        )  # fmt: skip
        seconds, items = run(recipe)
        for stage, taken in seconds.items():
            name = "measure" if stage == "measure" else f"{propagate} {stage.split()[0]}"
            out[name] = taken
            report(name, gpus=gpus, seconds=round(taken, 3), items=items.get(stage))
        if measurement is None:
            kept = args.work / f"measurement-{gpus}.json"
            shutil.copy(work / "measurement.json", kept)
            measurement = str(kept)
            out["measurement sha256"] = digest(kept)
        for shard in sorted(Path(f"{work}-out").glob("output*.safetensors")):
            out[f"{propagate} {shard.name} sha256"] = digest(shard)
        for old in (work, Path(f"{work}-out")):
            shutil.rmtree(old, ignore_errors=True)
    return out


def run(recipe: Recipe) -> tuple[dict[str, float], dict[str, list[float]]]:
    """(seconds of each stage, seconds of each item by stage) of a conversion."""
    events = Silent()
    convert(recipe, events)
    for name, fields in events.events:
        if name in ("warning", "error"):
            report(name, message=str(fields.get("message")))
    seconds = {f["stage"]: f["seconds"] for name, f in events.events if name == "end"}
    items: dict[str, list[float]] = {}
    for name, f in events.events:
        if name == "item":
            items.setdefault(f["stage"], []).append(round(f["seconds"], 2))
    return seconds, items


def summary(figures: dict[int, dict[str, Any]]) -> None:
    first, *others = figures
    for n in others:
        for name, value in figures[first].items():
            other = figures[n].get(name)
            if name.endswith("sha256"):
                report(name, gpus=n, equal=value == other)
            elif other and not name.endswith("compile"):
                report(f"speed-up {name}", gpus=n, over=first, ratio=round(value / other, 3))


def build(directory: Path, args: argparse.Namespace) -> None:
    """A Llama with random weights, written tensor by tensor."""
    h, w, heads, kv = args.hidden, args.wide, max(1, args.hidden // 128), max(1, args.hidden // 1024)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (args.vocab, h)}
    for i in range(args.layers):
        p = f"model.layers.{i}"
        shapes |= {f"{p}.{n}.weight": (h,) for n in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{p}.self_attn.q_proj.weight": (h, h), f"{p}.self_attn.o_proj.weight": (h, h)}
        shapes |= {f"{p}.self_attn.{n}_proj.weight": (kv * 128, h) for n in "kv"}
        shapes |= {f"{p}.mlp.{n}_proj.weight": (w, h) for n in ("gate", "up")} | {f"{p}.mlp.down_proj.weight": (h, w)}
    shapes |= {"model.norm.weight": (h,), "lm_head.weight": (args.vocab, h)}
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def make(name: str, seed: int) -> torch.Tensor:
        shape = shapes[name]
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.float16)
        generator = torch.Generator(device).manual_seed(seed)
        scale = 1.0 if "embed" in name else shape[-1] ** -0.5
        dtype = torch.float16 if device == "cuda" else torch.float32
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(scale).half().cpu()

    directory.mkdir(parents=True, exist_ok=True)
    entries = [
        TensorEntry(name, "F16", shape, lambda n=name, s=seed: make(n, s))  # type: ignore[misc]
        for seed, (name, shape) in enumerate(shapes.items())
    ]
    for shard in write_shards(directory, entries, 4 << 30):
        (directory / shard.name).rename(directory / shard.name.replace("output", "model"))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": h, "intermediate_size": w,
        "num_hidden_layers": args.layers, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128,
        "vocab_size": args.vocab, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "hidden_act": "silu",
        "torch_dtype": "float16",
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def digest(path: Path) -> str:
    out = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 24):
            out.update(chunk)
    return out.hexdigest()[:16]


def size_of(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.iterdir())


def report(name: str, **fields: Any) -> None:
    print(json.dumps({"figure": name, **fields}), flush=True)


if __name__ == "__main__":
    main()
