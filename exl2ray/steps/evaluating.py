"""After a conversion: the finished models beside their source, on text that they were not calibrated on."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exl2ray.errors import Exl2RayError, StoreError, unreadable
from exl2ray.events import OutputSummary, Reporter
from exl2ray.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from exl2ray.store.fs import Store

PLOT = "ladder.png"
STAGE = "evaluate"


def evaluate_outputs(
    recipe: Recipe, outputs: Sequence[OutputSummary], device: str, reporter: Reporter
) -> list[OutputSummary]:
    """``outputs`` with perplexity, KL divergence and top-1 agreement on held-out text.

    Keeps the figures on the cards and as evaluation.json in the work directory, and a plot where that is a local folder.
    ``device`` is where the conversion computed. Models that were evaluated before, on the same text, are not run again. The
    models are finished and stay so: what goes wrong here becomes a warning.
    """
    try:
        return _evaluated(recipe, outputs, device, reporter)
    except Exl2RayError as e:
        hint = f" ({e.hint})" if e.hint else ""
        reporter.event("warning", message=f"the models are complete, but could not be evaluated: {e.message}{hint}")
        drop_outdated(recipe, outputs, reporter)
        return list(outputs)


def drop_outdated(recipe: Recipe, outputs: Sequence[OutputSummary], reporter: Reporter) -> None:
    """Once models were written without being evaluated, by a patch for one: says that evaluation.json is of what they were
    before, if it is, and removes the plot, which nobody can tell that from."""
    from exl2ray.evaluate.record import EVALUATION, MAX_BYTES, parse_evaluations
    from exl2ray.evaluate.standing import EARLIER, standing
    from exl2ray.store.open import open_store

    written = {os.path.realpath(o.directory) for o in outputs if o.directory is not None}
    with suppress(Exl2RayError):
        store = open_store(recipe.out_dir)
        if not store.exists(EVALUATION) or store.size(EVALUATION) > MAX_BYTES:
            return
        found = parse_evaluations(store.get(EVALUATION), store.full_name(EVALUATION))
        earlier = [e.model for e in found if os.path.realpath(e.model) in written and standing(e, [e.model]) == EARLIER]
        if not earlier:
            return
        removed = f", and {PLOT} is removed" if store.exists(PLOT) else ""
        store.delete(PLOT)
        again = f"again with: exl2ray convert -o {shlex.quote(recipe.out_dir)} --evaluate always"
        text = f"{store.full_name(EVALUATION)} is of {', '.join(earlier)} before this{removed}; {again}"
        reporter.event("note", message=text)


def _evaluated(
    recipe: Recipe, outputs: Sequence[OutputSummary], device: str, reporter: Reporter
) -> list[OutputSummary]:
    from exl2ray.evaluate.heldout import heldout_kinds, heldout_rows
    from exl2ray.evaluate.record import EVALUATION, Evaluation, parse_evaluation
    from exl2ray.evaluate.tokens import find_tokenizer, load_tokens
    from exl2ray.publish.card import add_evaluation
    from exl2ray.report.ladder import plot_ladder
    from exl2ray.store.open import open_store
    from exl2ray.tune.rows import naming

    with find_tokenizer([recipe.in_dir]) as tokenizer:
        builtin = recipe.eval_text is None
        with naming("--eval-text"):
            rows = heldout_rows(tokenizer) if builtin else load_tokens(recipe.eval_text or "", tokenizer)
        kinds = heldout_kinds(tokenizer, rows) if builtin else {}
    store, identity = open_store(recipe.out_dir), _identity(recipe, outputs, rows)
    results = _stored(store, identity)
    drawn = results is not None and store.exists(PLOT)
    if results is None:
        results = _measured(recipe, outputs, rows, kinds, device, reporter)
        if not results:
            return list(outputs)
        store.put(EVALUATION, json.dumps({"results": results, "inputs": identity}, indent=1).encode())
    by_model: dict[str, Evaluation] = {}
    for result in results:
        if (result.get("perplexity") or {}).get("value") is not None:  # a broken model is for Job.judge, not for its card
            model = os.path.realpath(result["model"])
            by_model[model] = parse_evaluation(result, model)
            add_evaluation(model, by_model[model])
    out = []
    for o in outputs:
        e = by_model.get(os.path.realpath(o.directory or ""))
        if e is None or e.kl is None or e.top1 is None:
            out.append(o)
            continue
        out.append(replace(o, heldout_perplexity=e.perplexity.value, kl=e.kl.value, top1=e.top1.value))
    if len(results) > 1 and "://" not in recipe.out_dir and not drawn:
        found = ((f"{o.bits:g}", by_model.get(os.path.realpath(o.directory or ""))) for o in outputs)
        labels = [(label, e) for label, e in found if e is not None]
        try:
            plot_ladder(labels, Path(store.root) / PLOT, title=Path(recipe.in_dir).name)
            reporter.event("note", message=f"size against quality: {Path(store.root) / PLOT}")
        except Exl2RayError as e:  # the figures are there without it
            reporter.event("warning", message=f"no plot of size against quality: {e.message}")
    return out


def _measured(
    recipe: Recipe, outputs: Sequence[OutputSummary], rows: Tensor, kinds: Mapping[str, Tensor], device: str,
    reporter: Reporter,
) -> list[dict[str, Any]]:
    """Results as JSON values; none where there is no GPU for models that were made on one."""
    import torch

    from exl2ray.evaluate.compare import evaluate_many
    from exl2ray.evaluate.forward import RunOptions
    from exl2ray.quant.solve import forget_recordings

    given = {os.path.abspath(o.directory): o.directory for o in outputs if o.directory is not None}
    if device == "cuda" and not torch.cuda.is_available():
        reporter.event("note", message="no GPU on this machine: compare the models with `exl2ray eval` where there is one")
        return []
    forget_recordings()
    steps, start = 1 + len(given), time.monotonic()
    ends = [start]
    reporter.event("stage", stage=STAGE, items=steps, done=0)

    def progress(model: Path, done: int, modules: int) -> None:
        if done == modules:
            ends.append(time.monotonic())
            number, seconds = len(ends) - 1, ends[-1] - ends[-2]
            key = given.get(str(model), str(model))
            reporter.event("item", stage=STAGE, key=key, done=number, items=steps, seconds=seconds, detail="")

    options = RunOptions(rope_scale=recipe.rope_scale, rope_alpha=recipe.rope_alpha)
    results = evaluate_many(list(given), recipe.in_dir, rows, device, None, options, progress=progress, kinds=kinds)
    reporter.event("end", stage=STAGE, seconds=time.monotonic() - start)
    return [r.to_json() for r in results]


def _identity(recipe: Recipe, outputs: Sequence[OutputSummary], rows: Tensor) -> str:
    """Hash of what is evaluated: the models' files, by name, size and time of writing, and the tokens."""
    from exl2ray.store.records import hash_inputs

    files = []
    for o in outputs:
        for path in map(Path, o.files):
            try:
                found = path.stat()
            except OSError as e:
                raise unreadable(StoreError, path, e, "the same command writes it again") from e
            files.append([os.path.realpath(path), found.st_size, found.st_mtime_ns])
    tokens = [list(rows.shape), hashlib.sha256(rows.numpy().tobytes()).hexdigest()]
    return hash_inputs(files=files, tokens=tokens, rope=[recipe.rope_scale, recipe.rope_alpha])


def _stored(store: Store, identity: str) -> list[dict[str, Any]] | None:
    """The results of evaluation.json if they are of these models on these tokens."""
    from exl2ray.evaluate.record import EVALUATION

    if not store.exists(EVALUATION):
        return None
    try:
        found = json.loads(store.get(EVALUATION))
        return list(found["results"]) if found["inputs"] == identity else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
