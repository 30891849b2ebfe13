"""In the child: data rows of Arrow files, batch by batch: what `datasets` saves (streams) and Feather (with a footer).

Batches are as large as their writer made them; of each the chosen columns alone are read, and it is checked as a whole, since
offsets beyond their buffers would be followed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa

from exl2ray.calibration.data.arrow_types import BROKEN, Columns, cell, short
from exl2ray.calibration.data.columns import Choice
from exl2ray.calibration.data.problem import DataError

MAGIC = b"ARROW1"  # of a file; a stream begins with a message
AGAIN = "is the download complete?"


class ArrowTable:
    """``columns``: what it holds. Raises DataError."""

    def __init__(self, file: BinaryIO) -> None:
        pa.set_cpu_count(1)
        self._file = file
        self._is_file = file.read(len(MAGIC)) == MAGIC
        try:
            self._schema = self._open().schema
            self.columns = Columns(self._schema)
        except BROKEN as e:
            raise DataError(f"not a readable Arrow file: {short(e)}", AGAIN) from e

    def rows(self, choice: Choice) -> Iterator[tuple[str, list[Any]]]:
        """(where, cells) of every data row, as `exl2ray.calibration.data.parquet.ParquetTable.rows` has them."""
        number = 0
        fields = [i for name in choice.columns for i in self._schema.get_all_field_indices(name)]
        order = sorted(range(len(fields)), key=fields.__getitem__)  # as the file has them, and so as a batch has
        try:
            for batch in self._batches(fields):
                batch.validate(full=True)
                columns = [batch.column(order.index(i)) for i in range(len(fields))]
                for row in range(batch.num_rows):
                    number += 1
                    yield f"data row {number - 1}", [cell(column[row]) for column in columns]
        except MemoryError:  # of Arrow, too, whose own is one of BROKEN
            raise
        except BROKEN as e:
            raise DataError(f"reading failed at data row {number}: {short(e)}", "fetch the file again") from e

    def _open(self, fields: list[int] | None = None) -> Any:
        self._file.seek(0)
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=fields)
        open_it = pa.ipc.open_file if self._is_file else pa.ipc.open_stream
        return open_it(pa.PythonFile(self._file, "r"), options=options)

    def _batches(self, fields: list[int]) -> Iterator[Any]:
        reader = self._open(fields)
        if self._is_file:
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            yield from reader
