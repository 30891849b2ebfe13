"""Calibration rows from a Parquet file (``-c``), converter-algorithm section 3.

The cells of a data row become strings joined with one space; each data row is encoded separately, without BOS or EOS;
the token streams are concatenated until rows * length tokens exist. The file is read in batches, so that only as much
of it as needed is read, tokenised and kept. Too little data is an error here, before any other work.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from exl2ray.calibration.rows import Rows, check_ids, check_length
from exl2ray.calibration.tokenizer import ModelTokenizer
from exl2ray.errors import CalibrationError

BATCH_ROWS = 64  # data rows per read; a row may be a whole book


def parquet_rows(
    path: str | Path,
    tokenizer: ModelTokenizer,
    rows: int,
    length: int,
    row_flag: str,  # "-r" or "-mr", for messages
    length_flag: str,  # "-l" or "-ml"
    vocab_size: int,  # rows of the model's embedding
    *,
    max_positions: int | None = None,  # longest sequence the model takes
) -> Rows:
    """The first rows * length tokens of the file, int64 (rows, length).

    Empty cells (null) are left out of their data row. Raises CalibrationError for an unusable row count or length, a
    file that is missing or not Parquet, columns that hold no text, and too little data; SourceError for an id without
    an embedding row.
    """
    if rows < 1:
        raise CalibrationError(f"{row_flag} {rows}: at least one calibration row is needed")
    check_length(length, length_flag, max_positions)
    file = Path(path)
    needed = rows * length
    parts: list[NDArray[np.int64]] = []
    have = 0
    with _open(file) as parquet:
        columns = _text_columns(file, parquet.schema_arrow)
        for texts in _texts(file, parquet, columns):
            for ids in tokenizer.encode_batch(texts):
                parts.append(ids)
                have += len(ids)
            if have >= needed:
                break
        data_rows = parquet.metadata.num_rows
    if have < needed:
        usable = have // length
        raise CalibrationError(
            f"{file}: {row_flag} {rows} x {length_flag} {length} needs {needed} tokens, file gives {have} "
            f"({data_rows} data rows)",
            f"use {f'{row_flag} {usable}' if usable else f'a smaller {length_flag}'}, or a larger file",
        )
    tokens = torch.from_numpy(np.concatenate(parts)[:needed]).reshape(rows, length)
    check_ids(tokens, vocab_size, tokenizer, [file.name] * rows)
    return Rows(tokens, ("parquet",) * rows, str(file))


def _open(file: Path) -> pq.ParquetFile:
    if not file.is_file():
        what = "is a directory" if file.is_dir() else "does not exist"
        raise CalibrationError(f"-c {file}: {what}", "give one Parquet file")
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as e:
        raise CalibrationError(f"-c {file}: not a readable Parquet file: {e}") from e


def _text_columns(file: Path, schema: pa.Schema) -> list[str]:
    """Names of the columns, less a stored pandas index. Refuses columns with no text form worth calibrating on."""
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    fields = [field for field in schema if field.name not in index]
    if not fields:
        raise CalibrationError(f"-c {file}: the file has no columns")
    for field in fields:
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        binary = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
        if binary or pa.types.is_nested(kind) or pa.types.is_null(kind):
            raise CalibrationError(
                f"-c {file}: column {field.name!r} has type {field.type}, which is not text",
                "leave the column out of the file, or write it as strings",
            )
    return [field.name for field in fields]


def _texts(file: Path, parquet: pq.ParquetFile, names: list[str]) -> Iterator[list[str]]:
    """Batches of data rows as text; data rows without any content are left out."""
    batches = parquet.iter_batches(batch_size=BATCH_ROWS, columns=names)
    while True:
        try:
            batch = next(batches, None)
            columns = [] if batch is None else [column.to_pylist() for column in batch.columns]
        except (OSError, pa.ArrowException, UnicodeDecodeError) as e:
            raise CalibrationError(f"-c {file}: reading failed: {e}") from e
        if batch is None:
            return
        joined = (" ".join(str(v) for v in row if v is not None) for row in zip(*columns, strict=True))
        texts = [text for text in joined if text]
        if texts:
            yield texts
