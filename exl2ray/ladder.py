"""After a conversion: the finished models beside their source, on text that they were not calibrated on."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.config import Recipe
from exl2ray.convert import OutputSummary
from exl2ray.errors import Exl2RayError
from exl2ray.progress import Reporter

if TYPE_CHECKING:
    from exl2ray.evaluate.metrics import Estimate

PLOT = "ladder.png"
STAGE = "evaluate"


def wanted(recipe: Recipe) -> bool:
    """Whether finished models are evaluated: asked for, or a ladder of several complete models."""
    if recipe.compile_full is None:
        return False
    return recipe.evaluate == "always" or (recipe.evaluate == "auto" and len(recipe.bits) > 1)


def evaluate_outputs(
    recipe: Recipe, outputs: Sequence[OutputSummary], device: str, reporter: Reporter
) -> list[OutputSummary]:
    """``outputs`` with perplexity, KL divergence and top-1 agreement on held-out text.

    Keeps the figures on the cards and as evaluation.json in the work directory, and a plot where that is a local folder.
    ``device`` is where the conversion computed. The models are finished and stay so: what goes wrong here becomes a warning.
    """
    try:
        return _evaluated(recipe, outputs, device, reporter)
    except Exl2RayError as e:
        hint = f" ({e.hint})" if e.hint else ""
        reporter.event("warning", message=f"the models are complete, but could not be evaluated: {e.message}{hint}")
        return list(outputs)


def _evaluated(
    recipe: Recipe, outputs: Sequence[OutputSummary], device: str, reporter: Reporter
) -> list[OutputSummary]:
    import torch

    from exl2ray.evaluate.compare import evaluate_many
    from exl2ray.evaluate.forward import RunOptions
    from exl2ray.evaluate.heldout import heldout_rows
    from exl2ray.evaluate.tokens import find_tokenizer, load_tokens
    from exl2ray.publish.card import add_evaluation
    from exl2ray.publish.figures import parse_evaluation
    from exl2ray.quant.solve import forget_recordings
    from exl2ray.report.evaluations import EVALUATION
    from exl2ray.store.fs import Store

    models = [o.directory for o in outputs if o.directory is not None]
    if device == "cuda" and not torch.cuda.is_available():
        reporter.event("note", message="no GPU on this machine: compare the models with `exl2ray eval` where there is one")
        return list(outputs)
    forget_recordings()
    tokenizer = find_tokenizer([recipe.in_dir])
    rows = heldout_rows(tokenizer) if recipe.eval_text is None else load_tokens(recipe.eval_text, tokenizer)
    steps, start = 1 + len(models), time.monotonic()
    reporter.event("stage", stage=STAGE, items=steps, done=0)

    def progress(model: Path, done: int, modules: int) -> None:
        if done == modules:
            number = 1 + ([Path(m) for m in models].index(model) + 1 if str(model) in map(str, models) else 0)
            reporter.event(
                "item", stage=STAGE, key=str(model), done=number, items=steps, seconds=time.monotonic() - start, detail=""
            )

    options = RunOptions(rope_scale=recipe.rope_scale, rope_alpha=recipe.rope_alpha)
    results = evaluate_many(models, recipe.in_dir, rows, device, None, options, progress=progress)
    reporter.event("end", stage=STAGE, seconds=time.monotonic() - start)
    data = json.dumps({"results": [r.to_json() for r in results]}, indent=1).encode()
    Store.open(recipe.out_dir).put(EVALUATION, data)
    for result in results:
        if math.isfinite(result.perplexity.value):  # a broken model is for Job.judge, not for its card
            add_evaluation(result.model, parse_evaluation(result.to_json(), str(result.model)))
    by_model = {str(r.model): r for r in results}
    out = []
    for o in outputs:
        r = by_model.get(str(o.directory))
        if r is None or r.kl is None or r.top1 is None:
            out.append(o)
            continue
        out.append(replace(o, heldout_perplexity=r.perplexity.value, kl=r.kl.value, top1=r.top1.value))
    if len(models) > 1 and "://" not in recipe.out_dir:
        _plot(Path(recipe.out_dir) / PLOT, Path(recipe.in_dir).name, out, results[0].reference_perplexity, reporter)
    return out


def _plot(
    path: Path, model: str, outputs: Sequence[OutputSummary], reference: Estimate | None, reporter: Reporter
) -> None:
    from exl2ray.report.ladder import LadderRow, plot_ladder

    evaluated = [(o, o.heldout_perplexity) for o in outputs if o.heldout_perplexity is not None]
    rows = [LadderRow(o.bits, o.file_bytes, value, o.kl, o.top1) for o, value in evaluated]
    plot_ladder(rows, path, title=model, reference_perplexity=None if reference is None else reference.value)
    reporter.event("note", message=f"size against quality: {path}")
