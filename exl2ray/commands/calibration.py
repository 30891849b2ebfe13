"""``exl2ray calibration --show``: the rows that a conversion would calibrate on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from exl2ray.calibration.parquet import parquet_rows
from exl2ray.calibration.rows import Plan, builtin_rows
from exl2ray.calibration.show import RowsView, describe_rows
from exl2ray.calibration.tokenizer import load_tokenizer
from exl2ray.config import Recipe
from exl2ray.console import clean, show_table
from exl2ray.formats.hf import SourceModel
from exl2ray.model.arch import load_spec

PASSES: Mapping[str, Plan] = {"measurement": "measure", "quantisation": "quantize"}


def rows_of(recipe: Recipe) -> dict[str, RowsView]:
    """The rows of both passes, by the name of the pass. Raises CalibrationError and SourceError as a conversion would."""
    source = SourceModel(recipe.in_dir)
    spec = load_spec(source)
    hyper = spec.hyper
    tokenizer = load_tokenizer(recipe.in_dir, source.config, hyper.vocab_size)
    settings = {
        "measure": (recipe.measurement_rows, recipe.measurement_length, "-mr", "-ml"),
        "quantize": (recipe.dataset_rows, recipe.length, "-r", "-l"),
    }
    out = {}
    for name, plan in PASSES.items():
        count, length, row_flag, length_flag = settings[plan]
        if recipe.cal_dataset is None:
            rows = builtin_rows(
                tokenizer,
                plan,
                length,
                recipe.seed,
                hyper.vocab_size,
                noise=spec.arch.noise_rows is not None,
                chat_rows=recipe.chat_rows,
                max_positions=hyper.max_seq_len,
            )
        else:
            rows = parquet_rows(
                recipe.cal_dataset,
                tokenizer,
                count,
                length,
                row_flag,
                length_flag,
                hyper.vocab_size,
                max_positions=hyper.max_seq_len,
            )
        out[name] = describe_rows(rows, tokenizer)
    return out


def rows_json(views: Mapping[str, RowsView]) -> dict[str, Any]:
    return dict(views)


def show(views: Mapping[str, RowsView]) -> None:
    for name, view in views.items():
        print(clean(f"{name}: {view.rows} rows of {view.length} tokens, {view.source}"))
        print(f"{view.distinct} of {view.vocab_size} token ids occur")
        rows = [[k.kind, k.rows, k.distinct, k.first_words] for k in view.kinds]
        show_table("", ["kind", "rows", "different ids", "begins"], rows)
        for note in view.notes:
            print(clean(f"note: {note}"))
        print()
