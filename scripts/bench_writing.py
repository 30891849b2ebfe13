#!/usr/bin/env python3
"""Times the end of a conversion: from the last committed module to the model in its directory, without quantising anything.

    python scripts/bench_writing.py FOLDER [--layers 32] [--pace 1.0] [--shape 7b] [--bits 4] [--elsewhere FOLDER]

Packed tensors of the right sizes, made once, are committed module by module as workers do it, ``--pace`` seconds apart, while
the shards are filled. The source has holes in place of weights. Prints seconds, bytes written by this process, and the most
that work directory and output held on the disk. ``--elsewhere``: the output's folder, on another file system.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from random_models import SHAPES, Shape, byte_tokenizer, model_config, tensor_shapes

from exl2ray.allocation.planning import Plan
from exl2ray.formats.exl2 import PackedLinear
from exl2ray.formats.hf import SourceModel
from exl2ray.formats.layout import GroupLayout, QParams, pad32
from exl2ray.formats.tensorfile import header_bytes
from exl2ray.model.arch import load_spec
from exl2ray.model.spec import LinearSpec
from exl2ray.output.writing import OutputWriter
from exl2ray.recipe import Recipe
from exl2ray.store.file_names import quant_kind
from exl2ray.store.records import Record, hash_inputs, item_file
from exl2ray.store.tensors import put_tensors
from exl2ray.store.workdir import WorkDir

ALL = {"7b": Shape(32, 4096, 11008, 32, 32), **SHAPES}
FILE_BYTES = 32 << 20  # as `exl2ray.team.packed_files` has it


def make_source(directory: Path, shape: Shape) -> None:
    """A model whose tensors are holes."""
    directory.mkdir(parents=True)
    tensors = tensor_shapes(shape)
    header = header_bytes((name, "F16", size) for name, size in tensors.items())
    with (directory / "model.safetensors").open("wb") as f:
        f.write(header)
        f.truncate(len(header) + 2 * sum(torch.Size(s).numel() for s in tensors.values()))
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps(model_config(shape)), encoding="utf-8")


class Packed:
    """Packed linears, one made for each shape."""

    def __init__(self, params: QParams) -> None:
        self.params, self._made = params, dict[tuple[int, int], PackedLinear]()

    def of(self, x: LinearSpec) -> PackedLinear:
        shape = x.in_features, pad32(x.out_features)
        if shape not in self._made:
            self._made[shape] = self._make(*shape, self.params.layout(x.in_features))
        return replace(self._made[shape], key=x.key)

    @staticmethod
    def _make(k: int, n: int, layout: GroupLayout) -> PackedLinear:
        groups = torch.tensor([layout.bits, layout.offsets]).T.reshape(-1)
        return PackedLinear(
            "", torch.randint(-(2**31), 2**31, (layout.packed_rows, n), dtype=torch.int32),
            torch.randint(-(2**31), 2**31, (len(layout.bits), n // 8), dtype=torch.int32),
            torch.ones(len(layout.bits), dtype=torch.float16), groups.to(torch.int16), torch.arange(k, dtype=torch.int32),
        )  # fmt: skip


def occupied(*roots: Path) -> int:
    """Bytes on the disk below folders; a file with two names counts once."""
    found = {}
    for root in roots:
        for folder, _, files in os.walk(root):
            for name in files:
                try:
                    stats = os.lstat(os.path.join(folder, name))
                except FileNotFoundError:
                    continue
                found[stats.st_dev, stats.st_ino] = stats.st_blocks * 512
    return sum(found.values())


def written() -> int:
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["write_bytes"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--pace", type=float, default=1.0, help="seconds a module")
    parser.add_argument("--shape", choices=sorted(ALL), default="7b")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--elsewhere", type=Path)
    args = parser.parse_args()
    shape = replace(ALL[args.shape], layers=args.layers)
    root, target = args.folder / "bench", (args.elsewhere or args.folder / "bench") / "out"
    for place in (root, target):
        shutil.rmtree(place, ignore_errors=True)
    make_source(root / "model", shape)
    source = SourceModel(root / "model")
    spec = load_spec(source)
    packed = Packed(QParams((args.bits,), (1.0,), (128,)))
    params = {x.key: packed.params for x in spec.linears}
    plan = Plan(4.0, params, tuple(hash_inputs(module=m.index) for m in spec.modules), 4.0, 0)
    recipe = Recipe(str(root / "model"), str(root / "work"), bits=(4.0,), compile_full=str(target))
    job = {"identity": {}, "measure": {}, "quantize": {}, "output": {}}
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], occupied(root / "work", target))

    watcher = threading.Thread(target=watch)
    watcher.start()
    with WorkDir.create_or_resume(str(root / "work"), job, resume=True, versions={}) as work, ThreadPoolExecutor(3) as pool:
        writer = OutputWriter(recipe, spec, source, work, fingerprint="0" * 16, calibration_rows=16)
        before, begun = written(), time.monotonic()
        writer.filling.begin(plan, target)
        placing = [pool.submit(writer.filling.place_others, plan)]
        for module in (m for m in spec.modules if m.linears):
            start = time.monotonic()
            commit(work, plan, module.profile_key, plan.hashes[module.index], [packed.of(x) for x in module.linears])
            last = time.monotonic()
            placing.append(pool.submit(writer.filling.place, plan, module.index))
            if module.index < len(spec.modules) - 1:
                time.sleep(max(0.0, start + args.pace - time.monotonic()))
        for future in placing:
            future.result()
        placed = time.monotonic()
        summary = writer.write(plan, writer.records(plan))
        end = time.monotonic()
    over.set()
    watcher.join()
    size = summary.file_bytes
    print(f"output {size / 1e9:.2f} GB in {len(summary.files)} files; modules {last - begun:.1f} s")
    print(f"after the last module: {end - last:.2f} s (waiting for shards {placed - last:.2f}, the rest {end - placed:.2f})")
    print(f"written {(written() - before) / size:.2f} times the output; at most {peak[0] / size:.3f} times on the disk")
    shutil.rmtree(root)
    shutil.rmtree(target, ignore_errors=True)


def commit(work: WorkDir, plan: Plan, key: str, inputs_hash: str, linears: list[PackedLinear]) -> None:
    """As workers do it: files of some size, then the record."""
    files, waiting = [], dict[str, torch.Tensor]()
    for i, linear in enumerate(linears):
        waiting.update(linear.tensors())
        if sum(t.nbytes for t in waiting.values()) >= FILE_BYTES or i == len(linears) - 1:
            rel = item_file(quant_kind(plan.bits), "tensors", linear.key, inputs_hash)
            files.append(put_tensors(work.store, rel, waiting))
            waiting = {}
    payload = {"perplexity": 10.0, "reference_perplexity": 9.0, "error": 0.01, "notes": []}
    work.records.commit(Record(quant_kind(plan.bits), key, inputs_hash, payload, tuple(files)))


if __name__ == "__main__":
    main()
