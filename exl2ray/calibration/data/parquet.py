"""In the child: data rows of a Parquet file, a few at a time, since a few kilobytes of it can hold gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from exl2ray.calibration.data.arrow_types import BROKEN, Columns, cell, short
from exl2ray.calibration.data.columns import Choice
from exl2ray.calibration.data.plain import MIB
from exl2ray.calibration.data.problem import DataError

BATCH_ROWS, BATCH_BYTES = 64, 4 * MIB  # of a read, by what the file says; a row may be a whole book
THRIFT_STRING_BYTES, THRIFT_ITEMS = 64 * MIB, 1_000_000  # of the file's own description


class ParquetTable:
    """``columns``: what it holds. Raises DataError."""

    def __init__(self, file: BinaryIO) -> None:
        pa.set_cpu_count(1)
        try:
            self._file = pq.ParquetFile(
                pa.PythonFile(file, "r"), pre_buffer=False, buffer_size=MIB, memory_map=False,
                thrift_string_size_limit=THRIFT_STRING_BYTES, thrift_container_size_limit=THRIFT_ITEMS,
            )  # fmt: skip
            self.columns = Columns(self._file.schema_arrow)
        except BROKEN as e:
            raise DataError(f"not a readable Parquet file: {short(e)}", "is the download complete?") from e

    def rows(self, choice: Choice) -> Iterator[tuple[str, list[Any]]]:
        """(where, cells) of every data row; cells of text are bytes or memoryview, others as Python has them; None: null."""
        number = 0
        try:
            leaves = self._leaves(choice.columns)
            groups = self._file.num_row_groups
        except BROKEN as e:
            raise DataError(f"reading failed: {short(e)}", "is the download complete?") from e
        for group in range(groups):
            size, done = self._batch_rows(group, leaves), 0
            while True:
                try:
                    for cells in self._group(group, choice, size, done):
                        done += 1
                        number += 1
                        yield f"data row {number - 1}", cells
                    break
                except MemoryError:
                    if size == 1:
                        raise
                    size = 1  # once more from where it was
                except BROKEN as e:
                    raise DataError(f"reading failed at data row {number}: {short(e)}", "fetch the file again") from e

    def _group(self, group: int, choice: Choice, size: int, skip: int) -> Iterator[list[Any]]:
        names = list(choice.columns)
        seen = 0
        batches = self._file.iter_batches(batch_size=size, row_groups=[group], columns=names, use_threads=False)
        for batch in batches:
            columns = [batch.column(i) for i in range(batch.num_columns)]
            for i in range(batch.num_rows):
                seen += 1
                if seen > skip:
                    yield [cell(column[i]) for column in columns]

    def _leaves(self, names: tuple[str, ...]) -> list[int]:
        schema = self._file.metadata.schema
        paths = [schema.column(i).path for i in range(self._file.metadata.num_columns)]
        return [i for i, path in enumerate(paths) if any(path == n or path.startswith(n + ".") for n in names)]

    def _batch_rows(self, group: int, leaves: list[int]) -> int:
        """Rows that a read may take at once, by what the file says: it may not be true."""
        try:
            found = self._file.metadata.row_group(group)
            declared: int = sum(max(0, found.column(i).total_uncompressed_size) for i in leaves)
            rows: int = max(1, found.num_rows)
        except BROKEN as e:
            raise DataError(f"row group {group} cannot be read: {short(e)}", "fetch the file again") from e
        return max(1, min(BATCH_ROWS, BATCH_BYTES * rows // max(1, declared)))
