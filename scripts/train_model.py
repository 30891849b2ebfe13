#!/usr/bin/env python3
"""Train a model of 25 to 60 M parameters for `quality.py`, on text found on this machine. No network is needed.

    python3 scripts/train_model.py --out /tmp/m34 --minutes 5                              # one H100
    python3 scripts/train_model.py --out /tmp/toy --device cpu --minutes 0.3 --hidden 64 --intermediate 192 --layers 2 \\
        --heads 2 --vocab 1024 --megabytes 4 --batch-tokens 2048 --eval-rows 4             # a trial

Text: Python's standard library and installed packages (sources, stubs, documentation), manual pages, /usr/share/doc, the
built-in calibration text. Files are de-duplicated by content (white space aside) and split by the hash of the end of their
path, so that copies of a module in two packages fall on the same side: 2 % to evaluate, 2 % to calibrate on, the rest to
train on. The weights kept are those with the lowest loss on some of the evaluation rows.

Writes to --out: model.safetensors (float16), config.json, tokenizer files, eval-tokens.npy (rows of 1024),
calibration.parquet and training.json. Needs torch, transformers, tokenizers, safetensors and pyarrow.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import math
import random
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import training  # noqa: E402
from training import POSITIONS, as_text, encode, held_out_loss  # noqa: E402

from exl2ray.calibration.text import builtin_documents  # noqa: E402

EVAL_LENGTH = 1024
PER_MILLE = {"eval": 20, "calibration": 20}  # of the files; the rest is for training
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
SMALLEST, LARGEST = 400, 400_000  # characters of a file
DIGITS, LINE = 0.15, 200  # share of digits and mean line length above which a file is a table of data
TOKENIZER_CHARACTERS = 30_000_000
DOCUMENT_TOKENS = 4096  # of one file in the evaluation rows at most
SELECTION_ROWS = 16  # evaluation rows that choose the weights


@dataclass(frozen=True)
class File:
    """``origin``: the package or folder it belongs to. ``side``: eval, calibration or train."""

    origin: str
    side: str
    text: str


def roots() -> list[tuple[Path, bool]]:
    """(folder, whether files of any name are text) to look for text in."""
    paths = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    paths |= {Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))}
    paths |= set(Path("/usr/lib").glob("python3*")) | set(Path("/usr/local/lib").glob("python3*"))
    out = [(p.resolve(), False) for p in sorted(paths) if p.is_dir()]
    return out + [(Path(p), True) for p in ("/usr/share/doc", "/usr/share/man") if Path(p).is_dir()]


def candidates() -> Iterator[tuple[str, Path]]:
    """(origin, path) of files that may be text; a file under two roots comes once."""
    seen: set[Path] = set()
    for root, any_name in roots():
        for path in sorted(root.rglob("*")):
            usual = path.suffix in SUFFIXES
            if path in seen or not (usual or any_name) or path.is_symlink() or not path.is_file():
                continue
            seen.add(path)
            parts = path.relative_to(root).parts
            # The standard library's folder holds that of the packages, which count one by one.
            inner = next((i for i, p in enumerate(parts) if p in ("site-packages", "dist-packages")), -1)
            yield parts[min(inner + 1, len(parts) - 1)], path


def read(path: Path) -> str | None:
    """The text of a file, None if it cannot be read or is not text worth learning."""
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except (OSError, UnicodeDecodeError, EOFError):
        return None
    if not SMALLEST <= len(text) <= LARGEST or "\0" in text:
        return None
    digits = sum(c.isdigit() for c in text[:20_000]) / min(len(text), 20_000)
    return None if digits > DIGITS or len(text) / (text.count("\n") + 1) > LINE else text


def side_of(path: Path) -> str:
    """Which part of the split a file belongs to, by the last two parts of its path."""
    value = int.from_bytes(hashlib.sha256("/".join(path.parts[-2:]).encode()).digest()[:4], "big") % 1000
    for side, share in PER_MILLE.items():
        if value < share:
            return side
        value -= share
    return "train"


def collect(megabytes: float, package_megabytes: float, seed: int) -> list[File]:
    """Files in random order, at most so many characters in all and of one package; none twice."""
    found = list(candidates())
    random.Random(seed).shuffle(found)
    built_in = [(f"calibration/{d.kind}", Path(d.kind) / d.name, as_text(d)) for d in builtin_documents()]
    sizes: Counter[str] = Counter()
    hashes: set[bytes] = set()
    out: list[File] = []

    def add(origin: str, path: Path, text: str) -> None:
        content = hashlib.sha256(" ".join(text.split()).encode()).digest()
        if content not in hashes and sizes[origin] + len(text) <= package_megabytes * 1e6:
            hashes.add(content)
            sizes[origin] += len(text)
            out.append(File(origin, side_of(path), text))

    for origin, path, text in built_in:
        add(origin, path, text)
    with ThreadPoolExecutor(16) as pool:
        for first in range(0, len(found), 512):
            part = found[first : first + 512]
            for (origin, path), text in zip(part, pool.map(read, [p for _, p in part]), strict=True):
                if text is not None:
                    add(origin, path, text)
            if sum(sizes.values()) > megabytes * 1e6:
                break
    random.Random(seed).shuffle(out)
    return out


def some(texts: Sequence[str]) -> list[str]:
    """The first TOKENIZER_CHARACTERS characters, to whole texts."""
    before = accumulate(map(len, texts), initial=0)
    return [text for text, characters in zip(texts, before, strict=False) if characters < TOKENIZER_CHARACTERS]


def build(args: argparse.Namespace) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads or args.heads, head_dim=args.hidden // args.heads,
        max_position_embeddings=POSITIONS, rms_norm_eps=1e-5, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
    ))  # fmt: skip


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True)
    add("--minutes", type=float, default=5.0, help="of the training loop; text and tokenizer come before it")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name, value in (("hidden", 512), ("intermediate", 1408), ("layers", 8), ("heads", 8), ("vocab", 8192)):
        add(f"--{name}", type=int, default=value, help=f"({value})")
    add("--kv-heads", type=int, help="as many as --heads if absent")
    add("--megabytes", type=float, default=250.0, help="million characters of text at most (250)")
    add("--package-megabytes", type=float, default=25.0, help="of one package (25)")
    add("--batch-tokens", type=int, default=65536, help="tokens of a step (65536)")
    add("--lr", type=float, default=2e-3)
    add("--weight-decay", type=float, default=0.1)
    add("--eval-rows", type=int, default=64, help="rows of 1024 tokens (64)")
    add("--reports", type=int, default=20, help="reports of both losses (20)")
    add("--compile", action="store_true", help="torch.compile; takes a minute or so of --minutes to start")
    add("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_args(arguments)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    files = collect(args.megabytes, args.package_megabytes, args.seed)
    texts = {side: [f.text for f in files if f.side == side] for side in ("train", *PER_MILLE)}
    characters = {side: sum(map(len, some)) for side, some in texts.items()}
    print(f"{len(files)} files; characters: {characters}; {time.perf_counter() - start:.0f} s", flush=True)
    tokenizer = training.train_tokenizer(some(texts["train"]), args.vocab)
    ids, eval_ids = encode(tokenizer, texts["train"]), encode(tokenizer, texts["eval"], DOCUMENT_TOKENS)
    if len(eval_ids) < args.eval_rows * EVAL_LENGTH:
        raise SystemExit(f"only {len(eval_ids)} held-out tokens; {args.eval_rows} rows of {EVAL_LENGTH} are needed")
    eval_array = eval_ids[: args.eval_rows * EVAL_LENGTH].reshape(-1, EVAL_LENGTH)
    stream = torch.from_numpy(ids.astype(np.int32)).to(args.device)
    eval_rows = torch.from_numpy(eval_array.astype(np.int64)).to(args.device)
    print(f"{len(stream)} training tokens, {len(eval_ids)} held out; {time.perf_counter() - start:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    np.save(args.out / "eval-tokens.npy", eval_array)
    pq.write_table(pa.table({"text": texts["calibration"]}), args.out / "calibration.parquet")

    model = build(args).to(args.device)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters on {args.device}", flush=True)
    settings = training.Settings(
        seconds=60 * args.minutes, rate=args.lr, weight_decay=args.weight_decay, batch_tokens=args.batch_tokens,
        lengths=(512, 1024, POSITIONS), warm_up=0.03, floor=0.02, reports=args.reports, seed=args.seed,
    )  # fmt: skip
    trained = training.train(model, stream, eval_rows[:SELECTION_ROWS], settings, args.compile)
    training.save(args.out, model, tokenizer)
    final = held_out_loss(LlamaForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(args.device), eval_rows)
    print(f"held-out loss of the saved weights, all rows: {final:.4f}, perplexity {math.exp(final):.2f}; "
          f"training loss {trained.train_loss:.4f}; {time.perf_counter() - start:.0f} s in all")  # fmt: skip
    record = {**asdict(trained), "parameters": count, "training_tokens": len(stream), "files": len(files),
              "characters": characters, "eval_loss": final,
              "settings": {k: v for k, v in vars(args).items() if k != "out"}}  # fmt: skip
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
