"""Times the sensitivity pass (one backward pass over the source model) on a model of random weights, files included.

    python scripts/bench_backward.py --shape 7b --layers 32
    python scripts/bench_backward.py --shape 70b --layers 8

Prints seconds of a first and a second run, the peak of the GPU's memory, and a digest of the sums; the shares computed in two
halves must have the same digest, as they would on two workers.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from bench import SHAPES
from random_models import build

from exl2ray.store.file_names import CALIBRATION
from exl2ray.store.open import open_store
from exl2ray.store.tensors import put_tensors
from exl2ray.team.messages import WorkerSetup
from exl2ray.team.runner import Runner
from exl2ray.team.sensitivity import ROWS, TOKENS, ModelSums, backward_pass, deal, share_rows_out


def digest(sums: dict[int, ModelSums]) -> str:
    return hashlib.sha256(json.dumps({n: sums[n] for n in sorted(sums)}).encode()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the sensitivity pass.")
    parser.add_argument("--shape", default="7b", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where the model is made; a temporary folder if absent")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        model, work = Path(temporary, "model"), Path(temporary, "work")
        build(model, replace(SHAPES[args.shape], layers=args.layers, vocab=args.vocab))
        ids = torch.randint(3, args.vocab, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
        put_tensors(open_store(str(work)), CALIBRATION, {"measure": ids, "quantize": ids[:1]})
        setup = WorkerSetup(str(model), str(work), args.device, None, None, 0.12, 120.0, CALIBRATION, "0" * 64, 1)
        runner = Runner(setup)
        shares, tokens = share_rows_out(["text"] * ROWS, TOKENS)
        found = {}
        for run in ("first", "second"):
            if args.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            start = time.monotonic()
            found = backward_pass(runner, shares, tokens)
            seconds = time.monotonic() - start
            peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else float("nan")
            what = f"{args.shape}, {args.layers} layers, {run} run"
            print(f"{what}: {seconds:.2f} s, peak {peak:.1f} GB, {digest(found)}", flush=True)
        halves: dict[int, ModelSums] = {}
        for hand in deal(shares, 2):
            halves.update(backward_pass(runner, hand, tokens))
        print(f"in two halves: {digest(halves)}", "equal" if digest(halves) == digest(found) else "NOT EQUAL", flush=True)


if __name__ == "__main__":
    main()
