"""Where the calibration data of ``-c`` are, on this machine or on the Hub; the rows of a pass; what identifies them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from exl2ray.calibration.data.sources import BUILTIN, HUB, WRITTEN, Source, local_source
from exl2ray.errors import CalibrationError, UsageError, unreadable
from exl2ray.recipe import Recipe
from exl2ray.units import parse_count

if TYPE_CHECKING:
    from exl2ray.calibration.data.stream import CalibrationData
    from exl2ray.calibration.rows import Rows, RowSet
    from exl2ray.calibration.tokenizer import ModelTokenizer
    from exl2ray.model.spec import ModelSpec

BUILTIN_PERPLEXITY_ROWS = 19  # rows of the built-in measurement set


def sources_of(recipe: Recipe) -> list[Source]:
    """Every -c of a recipe. Raises UsageError, CalibrationError, and HubError for a Hub that does not answer."""
    return [source_of(place) for place in recipe.calibration_data]


def source_of(place: str) -> Source:
    """The files that one -c names. Raises as `sources_of`."""
    if not place.startswith(HUB):
        return local_source(place)
    from exl2ray.remote.hub_data import hub_source

    return hub_source(place)


def text_source(place: str, files: Callable[[str], Source] = source_of) -> Source:
    """What one place of text to tune on names: "builtin", "self" or "self:COUNT" (tokens that the source model writes), or
    files, as -c has them. The first two have no files. Raises UsageError for a count that is none, of -c like ``files``, and
    as that does."""
    name, colon, count = place.partition(":")
    if name not in (BUILTIN, WRITTEN) or (name == BUILTIN and count):
        return files(place)
    if not colon:
        return Source(name, name, (), None)
    try:
        return Source(f"{name}:{parse_count(count, place)}", name, (), None)
    except UsageError as e:
        why = e.message.removeprefix(f"{place} {count[:40]}: ")
        raise UsageError(f"-c {place[:60]}: {why}", f"self:COUNT, {e.hint}") from e


def tuning_text(recipe: Recipe) -> tuple[str, tuple[Source, ...]]:
    """(flag that names it, places) of the text to tune on. Raises as `text_source`, naming the flag."""
    from exl2ray.tune.rows import naming

    flag = "-c" if recipe.tune_text is None else "--tune-text"
    with naming(flag):
        return flag, tuple(text_source(place) for place in recipe.tuning_text)


def check_tuning_text(recipe: Recipe, spec: ModelSpec, tokenizer: ModelTokenizer) -> None:
    """Raises what reading the text would end the tuning with, after all else is done."""
    from exl2ray.tune.rows import check_text, naming
    from exl2ray.tune.settings import LENGTH

    flag, sources = tuning_text(recipe)
    bos_id = spec.needed_bos(lambda: tokenizer.bos_id)
    with naming(flag):
        check_text(sources, tokenizer, LENGTH, spec.hyper.vocab_size, bos_id, flag)


def pass_rows(
    recipe: Recipe, row_set: RowSet, tokenizer: ModelTokenizer, vocabulary: int, spec: ModelSpec | None, data: CalibrationData
) -> Rows:
    """The rows of tokens of one pass: of ``data`` with -c, else of the built-in set. ``spec``: None if it cannot be read.

    For families that need BOS every row begins with it; with --quality reference rows are those of the plain algorithm.
    Raises CalibrationError, naming the flags of the pass, for lengths and numbers of rows that cannot be had.
    """
    from exl2ray.calibration.rows import begun_with

    rows = _rows(recipe, row_set, tokenizer, vocabulary, spec, data)
    bos_id = None if recipe.quality == "reference" or spec is None else spec.needed_bos(lambda: tokenizer.bos_id)
    return rows if bos_id is None or not 0 <= bos_id < vocabulary else begun_with(rows, bos_id)


def _rows(
    recipe: Recipe, row_set: RowSet, tokenizer: ModelTokenizer, vocabulary: int, spec: ModelSpec | None, data: CalibrationData
) -> Rows:
    from exl2ray.calibration.rows import builtin_rows
    from exl2ray.calibration.text import builtin_documents

    measuring, longest = row_set == "measure", None if spec is None else spec.hyper.max_seq_len
    length = recipe.measurement_length if measuring else recipe.length
    if recipe.cal_dataset is None:
        return builtin_rows(
            tokenizer, row_set, length, recipe.seed, vocabulary, noise=spec is not None and spec.arch.noise_rows is not None,
            chat_rows=recipe.chat_rows, max_positions=longest,
            documents=builtin_documents(more=recipe.builtin_text == "all"),
        )  # fmt: skip
    flags = ("-mr", "-ml") if measuring else ("-r", "-l")
    count = recipe.measurement_rows if measuring else recipe.dataset_rows
    return data.rows(count, length, *flags, vocabulary, max_positions=longest)


def reported_rows(recipe: Recipe) -> int:
    """Leading rows of the quantisation set whose perplexity is reported; of the built-in one as many as the reference."""
    return BUILTIN_PERPLEXITY_ROWS if recipe.cal_dataset is None else recipe.measurement_rows


def stored_places(places: Sequence[str]) -> str | list[str] | None:
    """As job.json keeps them: one as a text, several as a list."""
    return None if not places else places[0] if len(places) == 1 else list(places)


def data_hashes(recipe: Recipe, rows: Mapping[str, Rows]) -> tuple[str | None, str | None]:
    """What identifies the data in job.json, for the two passes.

    Of one Parquet file without a column it is the SHA-256 of the file, else that of the texts that the rows are made of: a
    folder may be larger than what is read of it. Raises CalibrationError if the file cannot be read.
    """
    measured, quantised = rows["measure"], rows["quantize"]
    taken = quantised.taken
    one = recipe.calibration_data[0] if len(recipe.calibration_data) == 1 else None
    if one is None or [(t.source, t.format) for t in taken] != [(os.path.abspath(one), "Parquet")]:
        return measured.digest, quantised.digest
    from exl2ray.formats.files import sha256_of

    try:
        found = sha256_of(Path(one))
    except OSError as e:
        raise unreadable(CalibrationError, f"-c {one}", e, "give a Parquet file with text") from e
    return found, found
