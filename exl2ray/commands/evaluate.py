"""``exl2ray eval``: perplexity, KL divergence and agreement of model directories."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from exl2ray.errors import Interrupted, UsageError
from exl2ray.evaluate.compare import evaluate_many
from exl2ray.evaluate.forward import OpenModel, RunOptions, open_model
from exl2ray.evaluate.gguf_model import open_gguf
from exl2ray.evaluate.heldout import DEFAULT_LENGTH, heldout_kinds, heldout_rows
from exl2ray.evaluate.metrics import TAIL, Estimate, Quantile
from exl2ray.evaluate.record import judged, parse_evaluation
from exl2ray.evaluate.result import EvalResult
from exl2ray.evaluate.tokens import check_flags, find_tokenizer, load_tokens
from exl2ray.evaluate.unchanged import Unchanged
from exl2ray.events import Reporter, Silent
from exl2ray.formats.elsewhere import named
from exl2ray.formats.files import atomic_file, refuse_other, refuse_special
from exl2ray.formats.source.kinds import refusal
from exl2ray.output.targets import check_place
from exl2ray.remote.source import local
from exl2ray.report.ladder import plot_ladder
from exl2ray.report.plot_files import check_plot, is_plot
from exl2ray.terminal.console import aside, clean, is_terminal, show_text
from exl2ray.terminal.live import human_reporter, show_table
from exl2ray.terminal.pasted import check_models
from exl2ray.tune.rows import naming
from exl2ray.wording import duration, file_size, plural

PLOT = "ladder.png"


@dataclass(frozen=True)
class Models:
    """What is evaluated, in this order: folders given in either way, then GGUF files; and what they are compared with."""

    models: Sequence[str] = ()
    directories: Sequence[str] = ()
    gguf: Sequence[str] = ()
    reference: str | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        return (*self.models, *self.directories)

    def check(self) -> None:
        """Raises UsageError for what cannot be told from the names alone to be comparable."""
        if not self.folders and not self.gguf:
            raise UsageError("no model to evaluate", "name directories, or give --model")
        if not self.folders and self.reference is None:
            raise UsageError("--gguf needs the model that the file was made from", "give it as --reference MODEL")
        given = (*self.folders, self.reference or "")
        misplaced = next((m for m in given if m.lower().endswith(".gguf") and os.path.isfile(m)), None)
        if misplaced is not None:
            hint = "give it as --gguf FILE, its source as --reference"
            raise UsageError(f"{misplaced}: a GGUF file, not a directory", hint)


@dataclass(frozen=True)
class Text:
    """The tokens to evaluate on: an array of ids, a text, or, with neither, the built-in one; None: not given."""

    tokens: str | None = None
    text: str | None = None
    rows: int | None = None
    length: int | None = None
    stride: int | None = None

    def check(self) -> None:
        """Raises UsageError for flags that contradict each other."""
        if self.tokens is not None and self.text is not None:
            raise UsageError("--tokens and --text are two sources of tokens", "give one, or none for the built-in text")
        check_flags(self.rows, self.length, self.stride)

    def load(self, folders: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Ids (R, T) int64, and which of them are of each kind of text (R, T) bool; the first tokenizer in ``folders`` is
        used."""
        if self.tokens is not None:
            with naming("--text"):
                return load_tokens(self.tokens, None, self.rows, self.length, self.stride), {}
        with find_tokenizer(folders) as tokenizer:
            if self.text is None:
                ids = _builtin(heldout_rows(tokenizer, self.length or DEFAULT_LENGTH), self.rows, self.stride)
                return ids, heldout_kinds(tokenizer, ids)
            with naming("--text"):
                return load_tokens(self.text, tokenizer, self.rows, self.length, self.stride), {}


@dataclass(frozen=True)
class Files:
    """What is written beside the figures. positions: a .npz file for those of every prediction, see `write_positions`.
    ladder: draws them over the size of the files, to plot, else to ladder.png."""

    positions: str | None = None
    ladder: bool = False
    plot: str | None = None

    @property
    def drawn(self) -> str | None:
        return (self.plot or PLOT) if self.ladder or self.plot else None

    def check(self) -> None:
        """Raises UsageError or StoreError where one cannot be written, or would take another file's place."""
        if self.drawn is not None:
            check_plot(self.drawn)
        wanted = self.positions
        if wanted is not None and (not wanted.endswith(".npz") or not os.path.isdir(Path(wanted).parent)):
            raise UsageError(f"--positions {wanted}: a file that ends in .npz, in a folder that exists, is needed")
        figures, plot = ("--positions", wanted, "file of figures by position"), ("--plot", self.drawn, "plot of ours")
        for (flag, file, kind), is_earlier in ((figures, _is_positions), (plot, is_plot)):
            if file is not None:
                refuse_special(file, flag)
                refuse_other(file, flag, kind, is_earlier)
                check_place(flag, file, Path(file).parent)

    def write(self, results: Sequence[EvalResult]) -> None:
        """To be called when the results are out: a disk that is full costs no figures."""
        if self.positions is not None:
            write_positions(Path(self.positions), results)
            aside(f"{self.positions}: figures of every prediction")
        if self.drawn is not None:
            sound = [r for r in results if math.isfinite(r.perplexity.value)]
            labels = [r.model.name.removesuffix(".gguf") for r in sound]
            found = [parse_evaluation(r.to_json(), named(str(r.model))) for r in sound]
            plot_ladder(list(zip(labels, found, strict=True)), self.drawn)
            aside(f"{self.drawn}: quality over the size of the files")


def evaluate(
    models: Models, text: Text, files: Files, device: str, options: RunOptions, quiet: bool = False
) -> list[EvalResult]:
    """Results of all models in order. ``files`` are not written (`Files.write`), but refused if they could not be.

    Raises UsageError and StoreError for what can be refused before anything is run, and what reading and running raise.
    """
    for given in (models, files, text):
        given.check()
    own = [local(m, flag="--model") for m in models.folders]
    reference = None if models.reference is None else local(models.reference, flag="--reference")
    folders = [*own, *([] if reference is None else [reference])]
    _refuse_others(folders)
    ids, kinds = text.load(folders)
    unchanged = Unchanged.of([*folders, *models.gguf])
    like = open_model(reference or own[0], options) if models.gguf else None
    opened: list[str | OpenModel] = [*own, *(open_gguf(f, like, options) for f in models.gguf if like is not None)]
    reporter = Silent() if quiet or not is_terminal(sys.stdout) else human_reporter()
    try:
        progress = _Progress(reporter)
        keep = files.positions is not None
        results = evaluate_many(
            opened, reference, ids, device, text.stride, options, keep, progress=progress.show, kinds=kinds
        )
        progress.end()
        unchanged.check()
        return list(results)
    except KeyboardInterrupt as e:
        raise Interrupted("stopped; an evaluation keeps nothing", "run the same command again: it begins anew") from e
    finally:
        reporter.close()


def _refuse_others(folders: Sequence[str]) -> None:
    """Raises what there is against folders that hold no model."""
    check_models(*folders)
    refused = next(filter(None, map(refusal, folders)), None)
    if refused is not None:
        raise refused


def write_positions(path: Path, results: Sequence[EvalResult]) -> None:
    """One float64 array (rows, length - 1) per figure and model, named ``<number>/nll``, ``/kl``, ``/top1``, ``/top5``.

    Numbers follow the order of the models, whose folders are in ``models``. Entry (r, t) is about token t + 1 of row r.
    """
    arrays = {"models": np.array([named(str(r.model)) for r in results])}
    for i, r in enumerate(results):
        if r.positions is None:
            continue
        figures = {"nll": r.positions.nll, "kl": r.positions.kl, "top1": r.positions.top1, "top5": r.positions.top5}
        arrays |= {f"{i}/{name}": t.numpy() for name, t in figures.items() if t is not None}
    with atomic_file(path) as f:
        np.savez(f, **arrays)  # type: ignore[arg-type]  # the stub takes keywords for options


def _is_positions(content: bytes) -> bool:
    """Whether `write_positions` wrote it: a ZIP file whose first part is ``models``."""
    return content.startswith(b"PK\x03\x04") and b"models.npy" in content[:64]


def _builtin(ids: Tensor, rows: int | None, stride: int | None) -> Tensor:
    """The first rows of the held-out text. Raises UsageError for a stride, or for more rows than there are."""
    if stride is not None:
        raise UsageError(f"--stride {stride}: the built-in text is read row by row", "give a text of your own with --text")
    if rows is not None and not 0 < rows <= len(ids):
        raise UsageError(f"--rows {rows}: the built-in text has {len(ids)} rows of {ids.shape[1]} tokens")
    return ids[:rows]


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
    """Tables: every model; the tail of its KL divergence; its figures by kind of text. Then what they mean."""
    names = [clean(str(r.model)) for r in results]
    rows = [
        [name, f"{s.linears_bpw:.3f}", f"{s.head_bpw:.3f}", f"{s.file_bpw:.3f}", file_size(s.file_bytes),
         _figure(r.perplexity, 4), _figure(r.kl, 5), _flipped(r.top1), "-" if r.top5 is None else f"{r.top5.value:.2%}",
         duration(r.seconds)]
        for name, r in zip(names, results, strict=True) for s in [r.size]
    ]  # fmt: skip
    columns = ["model", "decoder bpw", "head bpw", "file bpw", "size", "perplexity", "KL (nats)"]
    columns += ["flipped top-1", "top-5", "time"]
    show_table("", columns, rows)
    tails = [[name, *map(_quantile, r.kl_tail.values())] for name, r in zip(names, results, strict=True) if r.kl_tail]
    if tails:
        show_table("KL of single tokens: what this share stays below (95 % interval)", ["model", *TAIL], tails)
    kinds = [
        [name, kind, f"{k.predictions}", _figure(k.nll.exp(), 3), _figure(k.kl, 4), _flipped(k.top1)]
        for name, r in zip(names, results, strict=True) for kind, k in r.kinds.items()
    ]  # fmt: skip
    columns = ["model", "text", "tokens", "perplexity", "KL (nats)", "flipped top-1"]
    if kinds:
        show_table("By kind of text", columns, kinds)
    first = results[0]
    rows_text = f"{plural(first.rows, 'row')} of {first.length} tokens"
    show_text(f"{first.predictions} predictions in {rows_text}; +- standard error over rows")
    if first.reference is not None and first.reference_perplexity is not None:
        show_text(f"reference {first.reference}: perplexity {_figure(first.reference_perplexity, 4)}")
        for name, r in zip(names, results, strict=True):
            compared = [e.value if e is not None else None for e in (r.reference_perplexity, r.kl, r.top1)]
            word, sentence = judged(r.perplexity.value, *compared)
            show_text(f"{name}: {word}. {sentence}")
    for text in dict.fromkeys(w for r in results for w in r.warnings):
        show_text(f"warning: {text}")


def _flipped(agreement: Estimate | None) -> str:
    """The share of positions whose most probable token is not the reference's."""
    if agreement is None:
        return "-"
    error = "" if agreement.standard_error is None else f" +- {agreement.standard_error:.2%}"
    return f"{1 - agreement.value:.2%}{error}"


def _quantile(q: Quantile) -> str:
    return f"{q.value:.4f}" + ("" if q.low is None else f" ({q.low:.4f} to {q.high:.4f})")


def _figure(estimate: Estimate | None, digits: int) -> str:
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else f" +- {estimate.standard_error:.{digits}f}"
    return f"{estimate.value:.{digits}f}{error}"
