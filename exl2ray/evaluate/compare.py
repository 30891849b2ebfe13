"""Evaluate models, directories or opened ones, on rows of tokens: alone, or against one reference that runs once for all.

Steps: open every directory and check that tokens and vocabularies fit (nothing is computed before that); run the
reference up to its head (``forward``); per model, run it likewise, then walk over blocks of predictions, make the
logits of both, and keep the figures (``metrics``). In memory at any time: the states of two models,
two heads, one module.

Families that need BOS (Gemma, Cohere) get it in front of every row as context. The predictions that count are the same
as for every other family: tokens 1 to T - 1 of a row, each from the tokens of the row before it (and BOS).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exl2ray.errors import CalibrationError, SourceError, UsageError
from exl2ray.evaluate.forward import (
    ModelOutput,
    OpenModel,
    Progress,
    RunOptions,
    checked_device,
    checked_ids,
    open_model,
    run_model,
)
from exl2ray.evaluate.gguf_model import GgufModel
from exl2ray.evaluate.metrics import Estimate, Scores, counted_predictions, mean_over_rows, score, tail
from exl2ray.evaluate.result import EvalResult, KindResult, model_size


def evaluate_many(
    model_dirs: Sequence[str | Path | OpenModel],
    reference_dir: str | Path | None,
    ids: Tensor,  # (R, T) integers
    device: torch.device | str,
    stride: int | None = None,  # the rows are windows that start this many tokens apart; None: separate texts
    options: RunOptions | None = None,
    keep_positions: bool = False,
    progress: Progress | None = None,
    kinds: Mapping[str, Tensor] | None = None,  # kind of text -> (R, T) bool: its tokens
) -> tuple[EvalResult, ...]:
    """Perplexity of each directory and, with a reference, KL divergence and agreement; in the order given.

    Raises before computing: SourceError or FormatError for a directory that cannot be used or a vocabulary of another
    size than the reference's, CalibrationError for tokens that do not fit, UsageError for the device. NumericError for
    NaN or infinite logits.
    """
    options = options or RunOptions()
    device = checked_device(device)
    if not model_dirs:
        raise UsageError("--model: no model directory given")
    models = [m if isinstance(m, OpenModel) else open_model(m, options) for m in model_dirs]
    reference = open_model(reference_dir, options) if reference_dir is not None else None
    for model in models:
        if reference is not None:
            _check_vocabularies(model, reference)
        ids = checked_ids(ids, model)
    if stride is not None:
        _check_windows(ids, stride)
    sizes = [model_size(model) for model in models]
    counted = counted_predictions(ids.shape[0], ids.shape[1], stride)
    expected, reference_seconds = _timed(reference, ids, device, options, progress)
    results = []
    for model, size in zip(models, sizes, strict=True):
        start = time.perf_counter()
        scores = score(run_model(model, ids, device, options, progress), expected, ids)
        seconds = time.perf_counter() - start
        nll = mean_over_rows(scores.nll, counted)
        increase = None if scores.reference_nll is None else scores.nll - scores.reference_nll
        results.append(
            EvalResult(
                model=model.path,
                reference=None if reference is None else reference.path,
                rows=ids.shape[0],
                length=ids.shape[1],
                predictions=int(counted.sum()),
                bos=model.bos_id is not None,
                nll=nll,
                reference_nll=_mean(scores.reference_nll, counted),
                nll_increase=_mean(increase, counted),
                kl=_mean(scores.kl, counted),
                top1=_mean(scores.top1, counted),
                top5=_mean(scores.top5, counted),
                size=size,
                seconds=seconds,
                reference_seconds=reference_seconds,
                warnings=(*_warnings(model, ids, nll), *(() if reference is None else reference.as_reference())),
                positions=scores if keep_positions else None,
                kl_tail={} if scores.kl is None else tail(scores.kl, counted),
                kinds={name: _kind(scores, counted & tokens[:, 1:]) for name, tokens in (kinds or {}).items()},
                weights=None if isinstance(model.source, GgufModel) else model.source.weights_fingerprint(),
            )
        )
    return tuple(results)


def _timed(
    model: OpenModel | None, ids: Tensor, device: torch.device, options: RunOptions, progress: Progress | None
) -> tuple[ModelOutput | None, float | None]:
    if model is None:
        return None, None
    start = time.perf_counter()
    return run_model(model, ids, device, options, progress), time.perf_counter() - start


def _kind(scores: Scores, counted: Tensor) -> KindResult:
    kl, top1 = _mean(scores.kl, counted), _mean(scores.top1, counted)
    return KindResult(int(counted.sum()), mean_over_rows(scores.nll, counted), kl, top1)


def _mean(values: Tensor | None, counted: Tensor) -> Estimate | None:
    return None if values is None else mean_over_rows(values, counted)


def _check_vocabularies(model: OpenModel, reference: OpenModel) -> None:
    if model.vocab_size != reference.vocab_size:
        raise SourceError(
            f"--model {model.path} has {model.vocab_size} words, --reference {reference.path} {reference.vocab_size}",
            "the reference must be the model that the other one was converted from",
        )


def _check_windows(ids: Tensor, stride: int) -> None:
    rows, length = ids.shape
    if not 1 <= stride <= length:
        raise UsageError(f"--stride {stride} is not between 1 and --length {length}")
    if not torch.equal(ids[:-1, stride:], ids[1:, : length - stride]):
        raise CalibrationError(
            f"--stride {stride}: the {rows} rows of {length} tokens are not windows that start {stride} tokens apart",
            "a stride is for one running text; leave it out for rows that are separate texts",
        )


def _warnings(model: OpenModel, ids: Tensor, nll: Estimate) -> tuple[str, ...]:
    out = list(model.notes)
    longest = model.spec.hyper.max_seq_len
    if ids.shape[1] > longest:
        out.append(f"{model.path}: rows of {ids.shape[1]} tokens, but config.json says that the model is for {longest}")
    if nll.value >= math.log(model.vocab_size):
        out.append(
            f"{model.path}: perplexity {nll.exp().value:.6g} is that of guessing among {model.vocab_size} words or "
            "worse; the model is broken, or the tokens are of another tokenizer"
        )
    return tuple(out)
