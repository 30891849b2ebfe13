"""``exl2ray calibration --show``: the rows that a conversion would calibrate on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from exl2ray.calibration.data.stream import CalibrationData
from exl2ray.calibration.data.taken import describe
from exl2ray.calibration.rows import RowSet
from exl2ray.calibration.show import RowsView, describe_rows
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.datasets import pass_rows, sources_of
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec
from exl2ray.recipe import Recipe
from exl2ray.remote.source import localised
from exl2ray.terminal.console import show_text
from exl2ray.terminal.live import show_table

PASSES: Mapping[str, RowSet] = {"measurement": "measure", "quantisation": "quantize"}


def rows_of(recipe: Recipe) -> dict[str, RowsView]:
    """The rows of both passes, by the name of the pass. Raises CalibrationError and SourceError as a conversion would."""
    recipe = localised(recipe)
    source = SourceModel(recipe.in_dir)
    spec = load_spec(source)
    with load_tokenizer(recipe.in_dir, source.config, spec.hyper.vocab_size) as tokenizer:
        with CalibrationData(sources_of(recipe), tokenizer, recipe.chat_rows, recipe.most_tokens) as data:
            rows = partial(pass_rows, recipe, tokenizer=tokenizer, vocabulary=spec.hyper.vocab_size, spec=spec, data=data)
            return {name: describe_rows(rows(row_set), tokenizer) for name, row_set in PASSES.items()}


def show(views: Mapping[str, RowsView]) -> None:
    """Prints where the rows of each pass come from, and how they begin."""
    for name, view in views.items():
        show_text(f"{name}: {view.rows} rows of {view.length} tokens, {view.source}")
        print(f"{view.distinct} of {view.vocab_size} token ids occur")
        rows = [[k.kind, k.rows, k.distinct, k.first_words] for k in view.kinds]
        show_table("", ["kind", "rows", "different ids", "begins"], rows)
        for taken in view.taken:
            show_text(describe(taken))
        for note in view.notes:
            show_text(f"note: {note}")
        print()
