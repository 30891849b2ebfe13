"""``exl2ray eval``: perplexity, KL divergence and agreement of model directories."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from exl2ray.console import duration, file_size, human_reporter, is_terminal, show_table
from exl2ray.errors import UsageError
from exl2ray.evaluate.compare import evaluate_many
from exl2ray.evaluate.forward import RunOptions
from exl2ray.evaluate.metrics import Estimate
from exl2ray.evaluate.result import EvalResult
from exl2ray.evaluate.tokens import find_tokenizer, load_tokens
from exl2ray.progress import Reporter, Silent


def evaluate(
    models: Sequence[str],
    reference: str | None,
    tokens: str | None,
    text: str | None,
    rows: int | None,
    length: int | None,
    stride: int | None,
    device: str,
    rope_scale: float | None,
    rope_alpha: float | None,
    quiet: bool,
) -> list[EvalResult]:
    """Results of ``models`` in order. Raises UsageError unless exactly one of ``tokens`` and ``text`` is given."""
    if (tokens is None) == (text is None):
        raise UsageError("eval needs either --tokens F.npy or --text F", "give one of them")
    tokenizer = None
    if text is not None:
        tokenizer = find_tokenizer([*models, *([reference] if reference is not None else [])])
    ids = load_tokens(tokens or text or "", tokenizer, rows, length, stride)
    options = RunOptions(rope_scale=rope_scale, rope_alpha=rope_alpha)
    reporter = Silent() if quiet or not is_terminal(sys.stdout) else human_reporter()
    try:
        progress = _Progress(reporter)
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        results = evaluate_many(models, reference, ids, chosen, stride, options, progress=progress.show)
        progress.end()
        return list(results)
    finally:
        reporter.close()


class _Progress:
    """Turns module counts into stages of a reporter, one per model."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter
        self.stage = ""
        self.start = time.monotonic()

    def show(self, model: Path, done: int, modules: int) -> None:
        stage = f"run {model}"
        if done == 1 or stage != self.stage:  # a model may be its own reference
            self.end()
            self.stage, self.start = stage, time.monotonic()
            self.reporter.event("stage", stage=stage, items=modules, done=0)
        self.reporter.event(
            "item", stage=stage, key=f"module {done}", done=done, items=modules, seconds=0.0, detail=""
        )

    def end(self) -> None:
        if self.stage:
            self.reporter.event("end", stage=self.stage, seconds=time.monotonic() - self.start)


def show(results: Sequence[EvalResult]) -> None:
    rows = [
        [
            str(r.model),
            f"{r.size.linears_bpw:.3f}",
            file_size(r.size.file_bytes),
            _figure(r.perplexity, 4),
            _figure(r.kl, 5),
            _figure(r.top1, 4),
            duration(r.seconds),
        ]
        for r in results
    ]
    first = results[0]
    show_table("", ["model", "bpw", "size", "perplexity", "KL (nats)", "top-1 agreement", "time"], rows)
    print(f"{first.predictions} predictions in {first.rows} rows of {first.length} tokens; +- standard error over rows")
    if first.reference is not None and first.reference_perplexity is not None:
        print(f"reference {first.reference}: perplexity {_figure(first.reference_perplexity, 4)}")
    for text in dict.fromkeys(w for r in results for w in r.warnings):
        print(f"warning: {text}")


def results_json(results: Sequence[EvalResult]) -> dict[str, Any]:
    return {"results": [r.to_json() for r in results]}


def _figure(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else f" +- {estimate.standard_error:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"
