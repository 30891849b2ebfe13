"""Source models of `quality.py` with the rows that they are judged by, and the figures of what was made of them."""

from __future__ import annotations

import argparse
import hashlib
import time
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import quality_text
import torch
from torch import Tensor

from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.errors import UsageError
from exl2ray.evaluate.forward import ModelOutput, RunOptions, open_model, run_model
from exl2ray.evaluate.metrics import score
from exl2ray.evaluate.result import model_size
from exl2ray.evaluate.tokens import load_tokens
from exl2ray.formats.hf import SourceModel

TAILS = {"kl_p90": 0.9, "kl_p99": 0.99, "kl_p999": 0.999}
Figures = dict[str, Any]


class Model:
    """A source model with its evaluation rows; runs it once, when first compared with.

    ids: int64 (R, T). kinds: of the text of each row; empty where tokens came from a file.
    """

    def __init__(self, name: str, path: Path, tokens: Path, args: argparse.Namespace) -> None:
        self.name, self.path, self.device = name, path, args.device
        self.kinds: tuple[str, ...] = ()
        self.ids: Tensor
        if args.heldout:
            source = SourceModel(path)
            with load_tokenizer(str(path), source.config, open_model(path).vocab_size) as tokenizer:
                documents = quality_text.load(Path(args.heldout))
                self.ids, self.kinds = quality_text.heldout_rows(documents, tokenizer, args.length, args.rows)
        else:
            if not tokens.is_file():
                raise UsageError(f"--model {name}: no evaluation tokens in {tokens}", "give --heldout FILE, or --tokens FILE")
            flat = np.load(tokens, mmap_mode="r").ndim == 1
            self.ids = load_tokens(tokens, length=args.length if flat else None)[: args.rows]
        self.options = RunOptions(dtype=getattr(torch, args.dtype))
        self.tokens_sha256 = hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()

    @cached_property
    def fingerprint(self) -> str:
        return SourceModel(self.path).fingerprint()

    @cached_property
    def expected(self) -> ModelOutput:
        """States in front of the head; logits are made from them slice by slice."""
        return run_model(self.path, self.ids, self.device, self.options)

    def judge(self, directory: Path) -> Figures:
        """Figures of a converted model, means of each row of tokens, tails of all of them, and its sizes."""
        start = time.perf_counter()
        scores = score(run_model(directory, self.ids, self.device, self.options), self.expected, self.ids)
        named = {"nll": scores.nll, "source_nll": scores.reference_nll, "kl": scores.kl, "top1": scores.top1}
        size = model_size(open_model(directory))
        return {
            **figures_of({k: v for k, v in named.items() if v is not None}, self.kinds),
            "file_bytes": size.file_bytes, "linears_bpw": size.linears_bpw, "head_bpw": size.head_bpw,
            "evaluate_seconds": round(time.perf_counter() - start, 3),
        }  # fmt: skip


def figures_of(tokens: dict[str, Tensor], kinds: tuple[str, ...]) -> Figures:
    """What is kept of figures of single predictions (R, T - 1): row means, tails of KL, and the kinds of the rows."""
    out: Figures = {"rows": {k: [_short(x) for x in v.mean(dim=1).tolist()] for k, v in tokens.items()}}
    kl = np.sort(tokens["kl"].double().flatten().numpy())
    out["tails"] = {name: _short(kl[min(len(kl) - 1, int(share * len(kl)))]) for name, share in TAILS.items()}
    return {**out, "kinds": list(kinds)} if kinds else out


def _short(x: float) -> float:
    return float(f"{x:.9g}")
